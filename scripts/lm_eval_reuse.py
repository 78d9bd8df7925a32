"""lm-eval's command line with one more model, `sparsex-completions`: `local-completions` on reused KV.

    python scripts/lm_eval_reuse.py --model sparsex-completions --model_args reuse=sparsex,model=NAME,base_url=...

Every request names a method of reuse. One that scores a continuation also says where that begins: its tokens and the
one before them are computed, and what stands before those is found in what earlier requests left, as the method has it.
`scripts/lm_eval_reuse.md` says how to compare.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from lm_eval.__main__ import cli_evaluate
from lm_eval.api.registry import register_model
from lm_eval.models.openai_completions import LocalCompletionsAPI


@register_model("sparsex-completions")
class ReusingCompletions(LocalCompletionsAPI):
    """Completions that reuse. One prompt a request, since each continuation begins elsewhere."""

    def __init__(self, reuse: str = "sparsex", salt: str | None = None, **options: Any) -> None:
        """
        Args:
          reuse: a method.
          salt: requests find only what requests with the same salt left. None: the method's name.
          options: of `local-completions`.
        """
        if int(options.get("batch_size", 1)) != 1:
            raise ValueError("batch_size must be 1; num_concurrent sends several requests at once")
        super().__init__(**options)
        # What pays on this server's devices is another question than what it costs in quality.
        self._asked = {"reuse": {"method": reuse, "only_if_faster": False}, "cache_salt": salt or reuse}
        self._starts: dict[tuple[int, ...], int] = {}

    def batch_loglikelihood_requests(self, chunks: Iterable[Any]) -> tuple[list[list[int]], list[int], list[Any]]:
        inputs, starts, keys = super().batch_loglikelihood_requests(chunks)
        for tokens, start in zip(map(tuple, inputs), starts, strict=True):
            self._starts[tokens] = min(start, self._starts.get(tokens, start))
        return inputs, starts, keys

    def _create_payload(self, messages: Any, generate: bool = False, **options: Any) -> dict[str, Any]:
        payload = super()._create_payload(messages, generate=generate, **options) | self._asked
        return payload if generate else payload | {"prompt_logprobs_start": self._starts[tuple(messages[0])]}


if __name__ == "__main__":
    cli_evaluate()
