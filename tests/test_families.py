"""Every family of models: transformers' logits, and the identities of reuse, on the random models of `tests/golden`."""

from pathlib import Path

import numpy as np
import pytest
from dense import Dense, engine_logits, frequencies_of, stored_kv

from sparsex_jax import Engine, InvalidRequestError, ReuseConfig
from sparsex_jax.checkpoints import open_checkpoint
from sparsex_jax.model.decoder import inv_freq
from sparsex_jax.model.sharding import make_mesh

GOLDEN = Path(__file__).parent / "golden"
FAMILIES = sorted(path.name for path in GOLDEN.iterdir() if (path / "expected.npz").is_file())
FULL = ReuseConfig(method="full")
EXACT = 2e-5
# transformers computes the frequencies of these two by a text's length; here that is the engine's context.
LONGER = {"qwen3_dynamic": 64}
SHORTER = {"phi3": 32, "qwen3_dynamic": None}
DOCUMENT = np.random.default_rng(1).integers(3, 128, 26).astype(np.int32)
HEADING, QUESTION = np.random.default_rng(2).integers(3, 128, (2, 9)).astype(np.int32)
PROMPT = np.concatenate([HEADING, DOCUMENT, QUESTION])


def make_engine(name, **options):
    options = {"max_context": LONGER.get(name), "store_tokens": 512, "page_size": 16, "chunk_rows": 128} | options
    return Engine.from_pretrained(GOLDEN / name, dtype="float32", **options)


# Those that are like another: Mistral without windows is Llama, OLMoE is Qwen3-MoE with wide norms, and two have
# frequencies of another kind here.
SLOW = {"mistral", "olmoe", "qwen2", "qwen3"}


@pytest.fixture(scope="module", params=[pytest.param(n, marks=pytest.mark.slow) if n in SLOW else n for n in FAMILIES])
def family(request):
    """A name, and an engine that all tests of the family share, and so one compiled prefill."""
    engine = make_engine(request.param)
    engine.remember(DOCUMENT)
    return request.param, engine


# transformers ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAMILIES)
def test_the_dense_reference_has_the_logits_of_transformers(name):
    """With the frequencies that the decoder computes."""
    expected, checkpoint = np.load(GOLDEN / name / "expected.npz"), open_checkpoint(GOLDEN / name)
    params = checkpoint.load_params("float32", make_mesh())
    for field, contexts in (("logits", LONGER | {"qwen3_dynamic": 48}), ("short_logits", SHORTER)):
        if field in expected:
            config, logits = checkpoint.config.for_context(contexts.get(name)), expected[field]
            dense = Dense(config, params)
            np.testing.assert_allclose(dense.full(expected["tokens"][: len(logits)])[0], logits, atol=1e-4)
            for layer, frequencies in enumerate(
                np.broadcast_to(inv_freq(config), (config.num_layers, config.head_dim // 2))
            ):
                np.testing.assert_allclose(frequencies, frequencies_of(config, layer), rtol=1e-5)


def test_logits_are_those_of_transformers(family):
    name, engine = family
    expected = np.load(GOLDEN / name / "expected.npz")
    logits = expected["logits"]
    if name in LONGER:
        logits = Dense(engine.model, engine.runner.params).full(expected["tokens"])[0]
    for length in (1, 17, 33, 48):
        found = engine_logits(engine, expected["tokens"][:length], reuse=FULL, keep=False)
        np.testing.assert_allclose(found, logits[length - 1], atol=1e-4)


# Reuse -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{"recompute_ratio": 1.0, "boundary_layer": 1}, {"boundary_layer": None}])
def test_recomputing_everything_equals_full(family, options):
    engine = family[1]
    if options["boundary_layer"] is None:  # behind the last layer
        options = {"boundary_layer": engine.model.num_layers}
    found = engine_logits(engine, PROMPT, reuse=ReuseConfig(**options), keep=False)
    np.testing.assert_allclose(found, engine_logits(engine, PROMPT, reuse=FULL, keep=False), atol=EXACT)


def test_aligned_keys_are_those_of_the_segment_alone_at_its_new_position(family):
    engine = family[1]
    with engine.prefilled(PROMPT, reuse=ReuseConfig(method="naive")) as sequence:
        (segment,) = sequence.plan.prompt.segments
        places, pages = np.arange(segment.start, segment.end), np.asarray(sequence.pages)
        keys, values = stored_kv(engine, pages[places // 16] * 16 + places % 16)
    assert (segment.start, segment.length, segment.donor_start) == (len(HEADING), len(DOCUMENT), 0)
    alone = Dense(engine.model, engine.runner.params).full(DOCUMENT, first_position=segment.start)[1]
    np.testing.assert_allclose(keys, np.array([k for k, _ in alone]), atol=1e-4)
    np.testing.assert_allclose(values, np.array([v for _, v in alone]), atol=1e-4)


def test_sparse_prefills_are_those_of_the_dense_reference(family):
    """The boundary stands where it does by default in a larger model, in a layer that sees all where there is one."""
    engine, options = family[1], {"recompute_ratio": 0.25, "overflow_tokens": 2, "tail_tokens": 0}
    out = engine.prefill(PROMPT, reuse=ReuseConfig(boundary_layer=1, **options), keep=False)
    prompt = [(HEADING, None), (DOCUMENT, (DOCUMENT, 0)), (QUESTION, None)]
    logits, active = Dense(engine.model, engine.runner.params).sparsex(prompt, 1, 0.25, 2, 0)
    np.testing.assert_array_equal(out.report.active, active)
    np.testing.assert_allclose(out.logits, logits, atol=1e-4)


# Other devices -----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_two_devices_give_the_logits_of_one(family):
    name, engine = family
    if engine.model.num_kv_heads % 2:
        pytest.skip("one KV head does not divide")
    sharded = make_engine(name, mesh=make_mesh(2))
    sharded.remember(DOCUMENT)
    for reuse in (FULL, ReuseConfig(boundary_layer=1, recompute_ratio=0.25)):
        one, two = (engine_logits(each, PROMPT, reuse=reuse, keep=False) for each in (engine, sharded))
        np.testing.assert_allclose(two, one, atol=EXACT)


# Contexts ----------------------------------------------------------------------------------------------------


def test_a_context_fixes_what_depends_on_a_length():
    phi, dynamic = (open_checkpoint(GOLDEN / name).config for name in ("phi3", "qwen3_dynamic"))
    assert phi.for_context(32).rope_factors == phi.rope_factors
    assert phi.for_context(33).rope_factors == phi.for_context().rope_factors == phi.rope_long_factors
    assert dynamic.for_context().rope_theta == dynamic.for_context(16).rope_theta == 10000
    assert dynamic.for_context(64).rope_theta == pytest.approx(10000 * 3 ** (16 / 14))
    for config in (phi.for_context(32), dynamic.for_context(64)):
        assert config.for_context() == config
    for config, most in ((phi, 128), (dynamic, 64)):
        with pytest.raises(InvalidRequestError, match=f"max_context={most + 1} must be from 1 to {most}"):
            config.for_context(most + 1)


def test_where_no_field_says_otherwise_a_method_scores_in_a_layer_that_sees_all():
    windows = [512] * 5 + [None] + [512] * 5 + [None] + [512] * 6
    for method, field, layer in (("sparsex", "boundary_layer", 5), ("qcfuse", "probe_layer", 11)):
        assert getattr(ReuseConfig(method).fitted(windows), field) == layer
        assert getattr(ReuseConfig(method, **{field: 2}).fitted(windows), field) == 2
        for alike in ([None] * 18, [512] * 18):
            assert ReuseConfig(method).fitted(alike) == ReuseConfig(method)
    assert ReuseConfig("excerpt").fitted(windows).without_excerpts.boundary_layer == 5
