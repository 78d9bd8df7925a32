"""Methods as objects: their options, their names, and the one parser that makes them."""

import copy
import dataclasses
import pickle
import subprocess
import sys

import numpy as np
import pytest

import sparsex_jax
from sparsex_jax import CacheBlend, Epic, Focus, Full, InvalidRequestError, Naive, Prefix, ReuseConfig, SparseX
from sparsex_jax.cli.options import parse_method
from sparsex_jax.reuse.methods import METHODS, Method, Oracle, Phase, Share
from sparsex_jax.serving.schemas import ReuseOptions

OF_ALL = {"min_segment_tokens", "only_if_faster"}
BUDGET = {"recompute_ratio", "coverage", "max_ratio"}
OPTIONS = {
    "full": set(),
    "prefix": set(),
    "naive": set(),
    "epic": {"head_tokens"},
    "cacheblend": BUDGET | {"boundary_layer"},
    "sparsex": BUDGET
    | {"boundary_layer", "overflow_tokens", "tail_tokens", "second_boundary", "head_tokens", "pool_tokens"},
    "prophetkv": BUDGET | {"head_tokens", "pool_tokens"},
    "qcfuse": BUDGET | {"probe_layer", "head_tokens", "pool_tokens"},
    "excerpt": {"coverage", "keep_ratio", "first_layer", "end_layer", "piece_tokens", "boundary_layer"},
    "focus": BUDGET | {"power", "overflow_tokens", "tail_tokens", "second_boundary", "head_tokens", "pool_tokens"},
}


def options_of(method):
    return {field.name for field in dataclasses.fields(method)}


@pytest.mark.parametrize(("name", "options"), OPTIONS.items(), ids=OPTIONS)
def test_a_method_has_its_own_options(name, options):
    assert options_of(METHODS[name]) == options | OF_ALL
    assert METHODS[name]().method == name
    assert getattr(sparsex_jax, METHODS[name].__name__) is METHODS[name]


def test_random_and_oracle_have_sparsexs_options():
    assert options_of(METHODS["random"]) == options_of(SparseX)
    assert options_of(Oracle) == options_of(SparseX) | {"scores"}
    assert "oracle" not in METHODS


@pytest.mark.parametrize(
    ("made", "expected"),
    [
        (ReuseConfig(), SparseX()),
        (ReuseConfig("focus", pool_tokens=16), Focus(pool_tokens=16)),
        (ReuseConfig(method="sparsex", boundary_layer=5), SparseX(boundary_layer=5)),
        (ReuseConfig(method="naive", only_if_faster=True), Naive(only_if_faster=True)),
        (parse_method("epic:head_tokens=4"), Epic(head_tokens=4)),
        (parse_method("oracle:recompute_ratio=0.2"), Oracle(recompute_ratio=0.2)),
        (ReuseConfig(**CacheBlend(boundary_layer=2).to_dict()), CacheBlend(boundary_layer=2)),
        (SparseX(tail_tokens=3).updated(recompute_ratio=0.5), SparseX(tail_tokens=3, recompute_ratio=0.5)),
        (SparseX(tail_tokens=3).updated(method="focus", pool_tokens=2), Focus(pool_tokens=2)),
        (ReuseConfig.fitting("prefix", recompute_ratio=0.5), Prefix()),
        (ReuseConfig.fitting("sparsex", recompute_ratio=0.5), SparseX(recompute_ratio=0.5)),
        (dataclasses.replace(SparseX(), boundary_layer=1), SparseX(boundary_layer=1)),
        (pickle.loads(pickle.dumps(SparseX(boundary_layer=1))), SparseX(boundary_layer=1)),
        (copy.deepcopy(Full()), Full()),
    ],
)
def test_every_way_to_make_a_method_gives_its_class(made, expected):
    assert made == expected
    assert hash(made) == hash(expected)
    assert isinstance(made, type(expected))
    assert isinstance(made, ReuseConfig)


def test_methods_with_the_same_options_differ():
    assert len({Full(), Prefix(), Naive(), SparseX(), METHODS["random"]()}) == 5


def test_numbers_of_numpy_become_plain_ones():
    made = SparseX(boundary_layer=np.int64(3), recompute_ratio=np.float32(0.5))
    assert (type(made.boundary_layer), type(made.recompute_ratio)) == (int, float)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Naive(head_tokens=4), "head_tokens=4 has no meaning for method 'naive'; its options: min_segment_tok"),
        (lambda: ReuseConfig("cacheblend", pool_tokens=8), "pool_tokens=8 has no meaning for method 'cacheblend'"),
        (lambda: ReuseConfig("epic", boundary_layer=1), "boundary_layer=1 .*; its options: .*head_tokens"),
        (lambda: dataclasses.replace(Full(), tail_tokens=1), "tail_tokens=1 has no meaning for method 'full'"),
        (lambda: SparseX().updated(depth=3), "depth=3 has no meaning for method 'sparsex'"),
        (lambda: ReuseConfig(cls=3), "cls=3 has no meaning for method 'sparsex'"),
        (lambda: parse_method("sparsex:method=full"), "method='full' has no meaning for method 'sparsex'"),
        (lambda: ReuseConfig.fitting("full", depth=3), "no method has the option 'depth'"),
        (lambda: ReuseConfig("magic"), "method='magic' is unknown; there are: full, prefix, naive"),
        (lambda: ReuseConfig(["sparsex"]), r"method=\['sparsex'\] is unknown"),
    ],
)
def test_what_a_method_does_not_have_is_refused_by_name(make, message):
    with pytest.raises(InvalidRequestError, match=message):
        make()


@pytest.mark.parametrize("option", ["sum_layers", "per_segment", "focus"])
def test_options_without_a_use_are_gone(option):
    with pytest.raises(InvalidRequestError, match=f"{option}=1 has no meaning for method 'sparsex'"):
        ReuseConfig(**{option: 1})


@pytest.mark.parametrize(
    ("field", "value", "limit"),
    [
        ("boundary_layer", -1, "an integer >= 0 or None"),
        ("boundary_layer", True, "an integer >= 0 or None"),
        ("second_boundary", 1.5, "an integer >= 0 or None"),
        ("recompute_ratio", 1.5, "a number from 0 to 1"),
        ("recompute_ratio", None, "a number from 0 to 1"),
        ("overflow_tokens", -1, "an integer >= 0"),
        ("head_tokens", -1, "an integer >= 0"),
        ("pool_tokens", 0, "an integer >= 1"),
        ("min_segment_tokens", 15, "an integer >= 16"),
        ("only_if_faster", 1, "True or False"),
    ],
)
def test_a_wrong_option_names_field_and_limit(field, value, limit):
    with pytest.raises(InvalidRequestError, match=rf"^{field}={value!r} must be {limit}$"):
        ReuseConfig(**{field: value})


def test_a_method_of_ones_own_is_known_by_its_name():
    @dataclasses.dataclass(frozen=True)
    class FirstHalfOnly(Method, name="first_half_only"):
        part: Share = 0.5

        def schedule(self, prompt, num_layers):
            return [Phase(0, prompt.computed), Phase(round(self.part * num_layers), prompt.fresh)]

    try:
        assert ReuseConfig("first_half_only", part=0.25) == FirstHalfOnly(part=0.25)
        with pytest.raises(InvalidRequestError, match="part=2 must be a number from 0 to 1"):
            FirstHalfOnly(part=2)
    finally:
        del METHODS["first_half_only"]


def test_options_are_given_by_name():
    with pytest.raises(TypeError, match=r"SparseX\(\) takes its options by name"):
        SparseX(5)


def test_the_schema_of_requests_lists_all_options():
    properties = ReuseOptions.model_json_schema()["properties"]
    assert properties.keys() == {"method", *OF_ALL}.union(*OPTIONS.values())
    assert properties["head_tokens"]["type"] == "integer"
    assert properties["head_tokens"]["description"] == "Of epic, sparsex, random, prophetkv, qcfuse, focus."


def test_methods_are_known_without_jax():
    code = "import sys, sparsex_jax; print(sparsex_jax.ReuseConfig('focus').method, 'jax' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "focus False\n"
