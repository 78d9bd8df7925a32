"""The request router that is plugged into Ray Serve: a call goes to the replica that its first argument names."""

from __future__ import annotations

from typing import Any

from ray.serve.request_router import PendingRequest, RequestRouter, RunningReplica

from sparsex_jax.serving.fleet import roster


class Addressed(RequestRouter):
    """Of calls with an address as first argument. If that replica is gone, another one takes the call."""

    def initialize_state(self, **_: Any) -> None:
        roster.enroll(self._deployment_id.name, self._names)

    def _names(self) -> list[str]:
        return [each.unique_id for each in list(self.curr_replicas)]

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        args = pending_request.args if pending_request is not None else []
        wanted = args[0].replica if args else None
        named = [each for each in candidate_replicas if each.replica_id.unique_id == wanted]
        return [named or candidate_replicas]
