"""What `scripts/serve_ray.py` refuses before it starts Ray, which takes longer to say less."""

import types

import pytest
import serve_ray

from sparsex_jax import InvalidRequestError


def test_a_secret_that_cannot_be_read_is_named(tmp_path):
    with pytest.raises(InvalidRequestError, match=r"fleet_key='.*nothing' cannot be read: No such file"):
        serve_ray.fleet_key(tmp_path / "nothing")
    (tmp_path / "key").write_bytes(b"a secret of a fleet")
    assert serve_ray.fleet_key(tmp_path / "key") == b"a secret of a fleet"


def test_replicas_that_this_machine_has_no_room_for_are_refused():
    scale = types.SimpleNamespace(min_replicas=3, num_cpus=1.0, num_gpus=2)
    serve_ray.require_room(scale, {"CPU": 3.0, "GPU": 6.0})
    with pytest.raises(InvalidRequestError, match="3 replicas with 2 GPU each need 6, and Ray finds 0 here"):
        serve_ray.require_room(scale, {"CPU": 8.0})
