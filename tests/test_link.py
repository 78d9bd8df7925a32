"""The link moves pages between the store and host memory, every byte as it was."""

import dataclasses
import math
import time
import types

import jax
import ml_dtypes
import numpy as np
import pytest
from conftest import TINY
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsex_jax import EngineConfig
from sparsex_jax.device import link as link_module
from sparsex_jax.device import pieces
from sparsex_jax.device.link import TOGETHER, Link
from sparsex_jax.errors import LinkError
from sparsex_jax.model.sharding import make_mesh
from sparsex_jax.model.store import abstract_store

MODEL = dataclasses.replace(TINY, num_layers=5, num_kv_heads=4)  # groups of 2 and 1 layers
ENGINE = EngineConfig(store_tokens=24 * 8, page_size=8, dtype="bfloat16")
GROUPS = range(4)


def random_array(shape, dtype, seed=0):
    """All bit patterns, so also infinities, denormals and NaNs of any payload, quiet or signalling."""
    dtype = np.dtype(dtype)
    return np.frombuffer(np.random.default_rng(seed).bytes(math.prod(shape) * dtype.itemsize), dtype).reshape(shape)


def poisoned_pages(shape, dtype, pages, seed=0):
    """Random bits in these pages, NaN in all others."""
    content = np.full(shape, np.nan, dtype)
    content[:, pages] = random_array(content[:, pages].shape, dtype, seed)
    return content


def made(engine=ENGINE, devices=1, model=MODEL, **options):
    mesh = make_mesh(devices)
    return Link(model, engine, mesh, **options), abstract_store(model, engine, mesh)


def on_devices(content, like):
    return jax.device_put(content, like.sharding)


def bits(array):
    return np.ascontiguousarray(np.asarray(array)).view(np.uint8)


def same(one, other):
    return one.dtype == other.dtype and np.array_equal(bits(one), bits(other))


@pytest.mark.parametrize("devices", [1, 2, 4])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_pages_come_back_bit_by_bit_into_other_pages_and_nothing_else_changes(dtype, devices):
    link, like = made(dataclasses.replace(ENGINE, dtype=dtype), devices)
    pages, targets = [7, 2, 11, 0, 19], [3, 23, 1, 12, 5]
    old, new = poisoned_pages(like.shape, like.dtype, pages), random_array(like.shape, like.dtype, 1)
    block = link.spill(on_devices(old, like), pages)
    store = link.place(on_devices(new, like), link.fetch(block, GROUPS), range(5), targets)
    wanted = new.copy()
    wanted[:, targets] = old[:, pages]
    assert same(store, wanted)
    assert store.sharding == like.sharding


@pytest.mark.parametrize("number", range(1, 17))
def test_blocks_of_any_length(number):
    link, like = made()
    old, new = (random_array(like.shape, like.dtype, seed) for seed in (0, 1))
    pages, targets = np.random.default_rng(number).permuted([range(24), range(24)], axis=1)[:, :number]
    block = link.spill(on_devices(old, like), pages.tolist())
    assert block.pages == number
    assert block.nbytes == link.block_bytes(number) == sum(piece.nbytes for piece in block.pieces)
    assert all(
        same(a, old[np.ix_(b, pages)].swapaxes(0, 1)) for a, b in zip(link.to_numpy(block), link.layers, strict=True)
    )
    store = link.place(on_devices(new, like), link.fetch(block, GROUPS), range(number), targets.tolist())
    wanted = new.copy()
    wanted[:, targets] = old[:, pages]
    assert same(store, wanted)


def test_some_groups_and_rows_of_a_block():
    link, like = made()
    old, new = (random_array(like.shape, like.dtype, seed) for seed in (0, 1))
    block = link.spill(on_devices(old, like), range(8, 15))
    store = link.place(on_devices(new, like), link.fetch(block, [3, 1]), [6, 2], [0, 9])
    wanted = new.copy()
    layers = [*link.layers[1], *link.layers[3]]
    wanted[np.ix_(layers, [0, 9])] = old[np.ix_(layers, [14, 10])]
    assert same(store, wanted)


def test_a_block_holds_what_the_pages_held_when_it_was_spilled():
    link, like = made()
    old, new = (random_array(like.shape, like.dtype, seed) for seed in (0, 1))
    store, others = on_devices(old, like), link.from_numpy(link.to_numpy(link.spill(on_devices(new, like), [1, 2])))
    block = link.spill(store, [5, 6])
    link.place(store, link.fetch(others, GROUPS), [0, 1], [5, 6])  # donates the store
    assert all(same(a, old[b, 5:7].swapaxes(0, 1)) for a, b in zip(link.to_numpy(block), link.layers, strict=True))


@pytest.mark.parametrize("devices", [(1, 4), (4, 1), (2, 4)])
@pytest.mark.parametrize("heads", [4, 2])
def test_numpy_and_back_also_onto_another_mesh(devices, heads):
    """Also where there are more devices than heads: their copies are not in what NumPy gets."""
    model = dataclasses.replace(MODEL, num_kv_heads=heads)
    (one, like), (other, there) = (made(devices=number, model=model) for number in devices)
    once = random_array((*like.shape[:3], heads, *like.shape[4:]), like.dtype)
    content, back = (once.repeat(each.shape[3] // heads, axis=3) for each in (like, there))
    pieces = [piece.copy() for piece in one.to_numpy(one.spill(on_devices(content, like), [4, 8, 15]))]
    block = other.from_numpy(pieces)
    for piece in pieces:
        piece[:] = 0  # the block has a copy
    store = other.place(
        on_devices(np.zeros(there.shape, there.dtype), there), other.fetch(block, GROUPS), [0, 1, 2], [1, 2, 3]
    )
    assert same(np.asarray(store)[:, 1:4], back[:, [4, 8, 15]])
    assert block.pages == 3
    assert {piece.shape[3] for piece in pieces} == {heads}


@settings(max_examples=15)
@given(st.data())
def test_any_order_of_spills_and_loads_moves_pages_as_numpy_would(data):
    link, like = made(devices=2)
    model = random_array(like.shape, like.dtype).copy()
    store, blocks, some = (
        on_devices(model, like),
        [],
        st.lists(st.integers(0, 23), min_size=1, max_size=16, unique=True),
    )
    for _ in range(data.draw(st.integers(1, 6))):
        pages = data.draw(some)
        blocks.append((link.spill(store, pages), model[:, pages]))
        block, content = data.draw(st.sampled_from(blocks))
        groups = data.draw(st.lists(st.sampled_from(GROUPS), unique=True))
        rows = data.draw(st.permutations(range(content.shape[1])))[: len(pages)]
        targets = pages[: len(rows)]
        store = link.place(store, link.fetch(block, groups), rows, targets)
        layers = [layer for group in groups for layer in link.layers[group]]
        model[np.ix_(layers, targets)] = content[np.ix_(layers, rows)]
    assert same(store, model)


def test_a_file_is_mapped_into_memory_and_read(tmp_path):
    link, like = made()
    content = random_array((16, 2, *like.shape[2:]), like.dtype)
    content.tofile(tmp_path / "piece")
    mapped = np.memmap(tmp_path / "piece", like.dtype, "r", shape=content.shape)
    block = link.from_numpy([mapped, *(mapped[:, :1] for _ in range(3))])
    (tmp_path / "piece").write_bytes(b"")  # reading the mapped memory would end the process
    del mapped
    assert all(map(same, link.to_numpy(block), [content, *[content[:, :1]] * 3]))


@pytest.mark.parametrize("devices", [1, 2])
def test_a_block_keeps_no_second_copy_of_what_was_read(devices):
    link, like = made(devices=devices)
    block = link.spill(on_devices(random_array(like.shape, like.dtype), like), [1, 2])
    link.to_numpy(block)
    arrays = [shard.data for piece in block.pieces for shard in piece.addressable_shards]
    assert all(array._npy_value is None for array in (*block.pieces, *arrays))


def test_a_block_of_whole_length_is_copied_from_numpy():
    link, like = made()
    pieces = [random_array((16, len(layers), *like.shape[2:]), like.dtype).copy() for layers in link.layers]
    block, kept = link.from_numpy(pieces), [piece.copy() for piece in pieces]
    for piece in pieces:
        piece[:] = 0
    assert all(map(same, link.to_numpy(block), kept))


def test_heads_are_split_as_the_stores_are_and_kept_in_host_memory():
    link, like = made(devices=4)
    block = link.spill(on_devices(np.zeros(like.shape, like.dtype), like), [0, 1])
    for piece, layers in zip(block.pieces, link.layers, strict=True):
        assert piece.sharding.memory_kind == link.memory_kind == "pinned_host"
        assert {shard.data.shape for shard in piece.addressable_shards} == {(2, len(layers), 2, 1, 8, 8)}
    assert {piece.sharding.memory_kind for piece in link.fetch(block, GROUPS).pieces} == {"device"}


@pytest.mark.parametrize("devices", [1, 2])
def test_a_platform_whose_devices_have_one_memory(monkeypatch, devices):
    monkeypatch.setattr(link_module, "host_memory_kind", lambda mesh: mesh.devices.flat[0].default_memory().kind)
    link, like = made(devices=devices)
    content = random_array(like.shape, like.dtype)
    block = link.spill(on_devices(content, like), [3, 4, 5])
    block = link.from_numpy(link.to_numpy(block))
    for _ in range(2):  # the block is still there after the first
        store = link.place(
            on_devices(np.zeros(like.shape, like.dtype), like), link.fetch(block, GROUPS), range(3), [0, 1, 2]
        )
        assert same(np.asarray(store)[:, :3], content[:, 3:6])


@pytest.mark.parametrize(("layers", "groups", "sizes"), [(5, 4, [2, 1, 1, 1]), (3, 4, [1, 1, 1]), (8, 3, [3, 3, 2])])
def test_groups_of_layers(layers, groups, sizes):
    link, _ = made(model=dataclasses.replace(MODEL, num_layers=layers), num_groups=groups)
    assert [*map(len, link.layers)] == sizes
    assert [layer for group in link.layers for layer in group] == [*range(layers)]


def test_nothing_is_compiled_after_the_warm_up():
    link, like = made(dataclasses.replace(ENGINE, store_tokens=28 * 8))
    content = random_array(like.shape, like.dtype)
    store = link.warm_up(on_devices(content, like))
    assert same(store, content)
    programs = [each._cache_size() for each in (pieces.gather, pieces.scatter, pieces.scatter_all)]
    for number in range(1, 17):
        store = link.place(store, link.fetch(link.spill(store, range(number)), [number % 4]), [0], [20])
    for number, pages in ((TOGETHER, 16), (2, 16), (TOGETHER, 5)):
        blocks = [link.spill(store, range(pages)) for _ in range(number)]
        targets = link.targets(blocks, [([0], [at]) for at in range(number)])
        store = link.place_together(store, link.fetch_together(blocks, number % 4), targets)
    assert [each._cache_size() for each in (pieces.gather, pieces.scatter, pieces.scatter_all)] == programs


def test_the_store_is_written_in_place():
    """A program that copied the store would need it twice."""
    _, like = made(dataclasses.replace(ENGINE, store_tokens=4096 * 8), devices=2)
    shape = 16, 2, *like.shape[2:]
    piece = jax.ShapeDtypeStruct(shape, like.dtype, sharding=pieces.piece_sharding(make_mesh(2), shape, "device"))
    pages, layer = jax.ShapeDtypeStruct((16,), np.int32), jax.ShapeDtypeStruct((), np.int32)
    memory = pieces.scatter.lower(like, piece, pages, layer, mesh=make_mesh(2)).compile().memory_analysis()
    own = np.prod(like.shape) * like.dtype.itemsize // 2
    assert memory.alias_size_in_bytes == own
    assert memory.temp_size_in_bytes < own / 8


def test_a_throttle_carries_one_transfer_after_the_other_each_way(monkeypatch):
    now = [100.0]
    monkeypatch.setattr("sparsex_jax.device.link.time", types.SimpleNamespace(monotonic=lambda: now[0]))
    link, like = made(bytes_per_s=1000.0)
    size = link.block_bytes(1) / 1000
    store = on_devices(np.zeros(like.shape, like.dtype), like)
    first, second = link.spill(store, [0]), link.spill(store, [1])
    half = link.fetch(first, [0, 1])  # of 3 of the 5 layers; it goes up when it is down
    dues = [transfer.due - 100 for transfer in (first, second, half)]
    assert dues == pytest.approx([size, 2 * size, size + 0.6 * size])
    jax.block_until_ready((first.pieces, second.pieces))
    assert not first.ready()
    now[0] = 100 + 1.01 * size
    assert first.ready()
    assert not second.ready()


def test_a_throttled_piece_is_not_placed_before_it_has_arrived():
    link, like = made(bytes_per_s=link_bytes(1) / 0.05)
    store = on_devices(np.zeros(like.shape, like.dtype), like)
    began = time.monotonic()
    arriving = link.fetch(link.spill(store, [0]), GROUPS)
    assert not arriving.ready()
    jax.block_until_ready(link.place(store, arriving, [0], [1]))
    assert time.monotonic() - began >= 0.1  # down and up
    assert arriving.ready()


def link_bytes(pages):
    return made()[0].block_bytes(pages)


class Failed:
    """Stands for a piece whose copy fails on the way."""

    nbytes = 8

    def is_ready(self):
        return True

    def block_until_ready(self):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of host memory")


def test_a_copy_that_fails_on_the_way_leaves_the_store_alone():
    link, like = made()
    store = on_devices(random_array(like.shape, like.dtype), like)
    arriving = link.fetch(link.spill(store, [0]), GROUPS)
    arriving.pieces = (*jax.block_until_ready(arriving.pieces[1:]), Failed())
    with pytest.raises(LinkError, match="XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB"):
        arriving.ready()
    with pytest.raises(LinkError, match="out of host memory"):
        link.place(store, arriving, [0], [1])
    assert not store.is_deleted()


def test_no_memory_is_a_link_error(monkeypatch):
    link, like = made()
    store = on_devices(np.zeros(like.shape, like.dtype), like)
    block = link.spill(store, [0])

    def full(*_, **__):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED")

    pieces = link.to_numpy(block)
    monkeypatch.setattr(jax, "device_put", full)
    for call in (lambda: link.spill(store, [0]), lambda: link.fetch(block, [0]), lambda: link.from_numpy(pieces)):
        with pytest.raises(LinkError, match=r"\d+ bytes of KV"):
            call()


@pytest.mark.parametrize("pages", [[], [0] * 17, [-1], [24], [3, 24]])
def test_pages_outside_the_store_are_refused(pages):
    link, like = made()
    store = on_devices(np.zeros(like.shape, like.dtype), like)
    with pytest.raises(ValueError, match="pages"):
        link.spill(store, pages)
    with pytest.raises(ValueError, match="pages"):
        link.place(store, link.fetch(link.spill(store, [0, 1]), GROUPS), [*range(len(pages))], pages)


@pytest.mark.parametrize(
    ("rows", "pages"), [([0], [1, 2]), ([2], [1]), ([-1], [1]), ([0, 0], [1, 2]), ([0, 1], [3, 3])]
)
def test_rows_that_the_block_does_not_have_and_pages_that_are_written_twice_are_refused(rows, pages):
    link, like = made()
    store = on_devices(np.zeros(like.shape, like.dtype), like)
    arriving = link.fetch(link.spill(store, [4, 5]), GROUPS)
    with pytest.raises(ValueError, match=r"rows|pages"):
        link.place(store, arriving, rows, pages)


@pytest.mark.parametrize(
    "change",
    [
        lambda pieces: [],
        lambda pieces: pieces[1:],
        lambda pieces: pieces[::-1],
        lambda pieces: [piece.astype(np.float16) for piece in pieces],
        lambda pieces: [piece[:0] for piece in pieces],
        lambda pieces: [pieces[0][:1], *pieces[1:]],
        lambda pieces: [piece[..., :4] for piece in pieces],
        lambda pieces: [np.repeat(piece, 9, axis=0) for piece in pieces],
        lambda pieces: [np.zeros((), ml_dtypes.bfloat16)] * 4,
    ],
)
def test_pieces_of_another_shape_are_refused(change):
    link, like = made()
    pieces = link.to_numpy(link.spill(on_devices(np.zeros(like.shape, like.dtype), like), [0, 1]))
    with pytest.raises(ValueError, match="pieces"):
        link.from_numpy(change(pieces))


@pytest.mark.parametrize("options", [{"num_groups": 0}, {"bytes_per_s": 0.0}, {"bytes_per_s": -1.0}])
def test_options_are_checked(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        made(**options)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_on_a_gpu_every_byte_comes_back_from_pinned_memory(dtype):
    devices = max(number for number in (1, 2, 4) if number <= len(jax.devices()))
    model = dataclasses.replace(MODEL, num_layers=6, head_dim=64)
    link, like = made(EngineConfig(store_tokens=64 * 64, page_size=64, dtype=dtype), devices, model)
    assert link.memory_kind == "pinned_host"
    pages, targets = np.random.default_rng(0).permuted([range(64), range(64)], axis=1)[:, :13].tolist()
    old, new = poisoned_pages(like.shape, like.dtype, pages), random_array(like.shape, like.dtype, 1)
    block = link.from_numpy(link.to_numpy(link.spill(on_devices(old, like), pages)))
    store = on_devices(new, like)
    place = [shard.data.unsafe_buffer_pointer() for shard in store.addressable_shards]
    store = link.place(store, link.fetch(block, GROUPS), range(13), targets)
    wanted = new.copy()
    wanted[:, targets] = old[:, pages]
    assert same(store, wanted)
    assert [shard.data.unsafe_buffer_pointer() for shard in store.addressable_shards] == place
    assert {piece.sharding.memory_kind for piece in block.pieces} == {"pinned_host"}


@pytest.mark.gpu
def test_on_a_gpu_nothing_waits_for_the_device():
    """A spill and a load are dispatched at once, although the device is busy with something else for longer."""
    link, like = made(EngineConfig(store_tokens=64 * 64, page_size=64, dtype="bfloat16"))
    store = link.warm_up(on_devices(np.zeros(like.shape, like.dtype), like))
    host = link.spill(store, range(16))
    host.wait()
    busy = jax.jit(lambda a: jax.lax.fori_loop(0, 200, lambda _, c: (a @ c) * 1e-4, a))
    matrix = jax.block_until_ready(busy(jax.device_put(np.ones((8192, 8192), ml_dtypes.bfloat16))))
    began = time.perf_counter()
    result = busy(matrix)
    block, arriving = link.spill(store, range(16)), link.fetch(host, GROUPS)
    dispatched = time.perf_counter() - began
    jax.block_until_ready((result, block.pieces, arriving.pieces))
    assert dispatched < 0.3 * (time.perf_counter() - began)
