"""The disk tier: what is found is what was stored, whatever happens to the process, the disk or the files."""

import contextlib
import dataclasses
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
from disk_blocks import OTHER, TINY, approximate, chain, is_whole, pieces_of, same
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from sparsex_jax.errors import DiskStoreError
from sparsex_jax.tiers import archive, block_file, disk
from sparsex_jax.tiers.disk import DiskStore

LARGE = 10**9
TESTS = Path(__file__).parent


def file_size(block, model="0" * 32) -> int:
    return len(block_file.encode(block, pieces_of(block), model))


def files_in(path: Path) -> list[Path]:
    return sorted(path.rglob("*.safetensors"))


def fill(store: DiskStore, blocks) -> None:
    for block in blocks:
        store.put(block, pieces_of(block))


@pytest.fixture
def store(tmp_path):
    with DiskStore(tmp_path / "kv", LARGE, TINY) as store:
        yield store


def test_returns_every_byte(store):
    blocks = [*chain(3), approximate(chain(3)[1])]
    fill(store, blocks)
    assert all(is_whole(block, store.get(block.key)) for block in blocks)
    assert store.get(chain(1, "b")[0].key) is None
    assert all(piece.flags.writeable for piece in store.get(blocks[0].key)[1])


@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "float16", "float8_e4m3fn", "float8_e5m2", "int8", "uint8"])
def test_returns_every_dtype(store, dtype):
    block = chain(1)[0]
    pieces = [np.frombuffer(bytes(range(240)), np.dtype(dtype)).reshape(2, 3, -1)[:, ::2] for _ in range(11)]
    pieces.append(np.zeros((0, 4), dtype))
    store.put(block, pieces)
    assert same(store.get(block.key)[1], pieces)


def test_files_are_those_that_safetensors_writes(store):
    """Byte for byte where all pieces have one dtype, as a model's have; files of before are read as ever."""
    block, pieces = chain(1)[0], [piece[:, ::2] for piece in pieces_of(chain(1)[0])[:2] * 6]
    said = {"version": 1, "model": "m", "block": block.to_json(), "sha256": block_file.sums_of(pieces)}
    tensors = {str(i): np.ascontiguousarray(piece) for i, piece in enumerate(pieces)}
    before = safetensors.numpy.save(tensors, {"sparsex": json.dumps(said)})
    assert block_file.encode(block, pieces, "m") == before
    mixed = [np.arange(3, dtype=np.int8), np.arange(4, dtype=np.float32), np.arange(5, dtype=np.float16)]
    loaded = safetensors.numpy.load(block_file.encode(block, mixed, "m"))
    assert same([loaded[str(i)] for i in range(3)], mixed)


def test_a_file_is_given_as_it_is(store):
    block = chain(1)[0]
    fill(store, [block])
    assert b"".join(store.file(block.key).parts) == files_in(store._root)[0].read_bytes()
    assert store.file(chain(1, "b")[0].key) is None
    file = files_in(store._root)[0]
    file.write_bytes(file.read_bytes()[:-1] + b"\0")
    assert (store.file(block.key), store.counts.corrupt, block.key in store) == (None, 1, False)


def received(data: bytes, key: bytes, size: int | None = None):
    """What `receive` makes of bytes, of which `size` are promised."""
    at, seen = 0, []

    def read_into(into: memoryview) -> None:
        nonlocal at
        if at + len(into) > len(data):
            raise EOFError
        into[:], at = data[at : at + len(into)], at + len(into)

    about = {"most_header": 2000, "check": seen.append}
    pieces = block_file.receive(read_into, len(data) if size is None else size, key, "m", **about)
    assert seen == [block_file.in_parts(np.frombuffer(data, np.uint8)).header]
    return pieces


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_what_is_received_is_whole_or_refused(data):
    """Whichever byte is another, and wherever it ends. A header that says the same with other bytes is taken here, and
    has no seal."""
    block, pieces = chain(1)[0], pieces_of(chain(1)[0])
    whole = block_file.encode(block, pieces, "m")
    got = received(whole, block.key)
    assert same(got, pieces)
    assert got[0].ctypes.data % 64 == 0
    at = data.draw(st.integers(0, len(whole) - 1))
    flipped = bytearray(whole)
    flipped[at] ^= data.draw(st.integers(1, 255))
    with contextlib.suppress(block_file.NotWholeError, EOFError):
        assert same(received(bytes(flipped), block.key), pieces)
        assert at < len(block_file.in_parts(np.frombuffer(whole, np.uint8)).header)
    for wrong in (
        lambda: received(whole[:at], block.key),
        lambda: received(whole, bytes(16)),
        lambda: received(whole, block.key, len(whole) + 1),
    ):
        with pytest.raises((block_file.NotWholeError, EOFError)):
            wrong()


def test_a_received_header_may_be_so_long_and_pieces_may_not_overlap():
    block = dataclasses.replace(chain(1)[0], namespace="x" * 2000)
    with pytest.raises(block_file.NotWholeError, match="header"):
        received(block_file.encode(block, [], "m"), block.key)
    block, piece = chain(1)[0], np.arange(5, dtype=np.uint8)
    whole = block_file.encode(block, [piece, piece], "m")
    with pytest.raises(block_file.NotWholeError, match="one behind the other"):
        received(whole.replace(b'"data_offsets":[0,5]', b'"data_offsets":[4,9]'), block.key)


def test_a_namespace_may_be_any_text(store):
    blocks = [dataclasses.replace(chain(1)[0], namespace=name) for name in ("", "é\0\n", "../../x", "\ud800", '"{')]
    fill(store, blocks)
    assert all(is_whole(block, store.get(block.key)) for block in blocks)


def test_counts_and_stores_once(store):
    block = chain(1)[0]
    fill(store, [block, block])
    size = files_in(store._root)[0].stat().st_size
    store.get(block.key)
    assert store.counts == disk.DiskCounts(written=1, written_bytes=size, read=1, read_bytes=size)
    assert (store.nbytes, len(store), block.key in store) == (size, 1, True)


def test_another_fingerprint_finds_nothing_and_overwrites_nothing(tmp_path):
    block = chain(1)[0]
    with DiskStore(tmp_path, LARGE, TINY) as store:
        fill(store, [block])
    with DiskStore(tmp_path, LARGE, OTHER) as store:
        assert (list(store.blocks()), store.get(block.key)) == ([], None)
        store.put(block, pieces_of(block)[:1])
        assert store.nbytes > file_size(block)
    with DiskStore(tmp_path, LARGE, dict(reversed(TINY.items()))) as store:
        assert is_whole(block, store.get(block.key))
    assert disk.fingerprints(tmp_path) in ([TINY, OTHER], [OTHER, TINY])


def test_a_file_moved_to_another_model_is_dropped(tmp_path):
    with DiskStore(tmp_path, LARGE, TINY) as store:
        fill(store, chain(1))
    with DiskStore(tmp_path, LARGE, OTHER) as store:
        home = store._home
    (file,) = files_in(tmp_path)
    (home / file.parent.name).mkdir()
    file.rename(home / file.parent.name / file.name)
    with DiskStore(tmp_path, LARGE, OTHER) as store:
        assert (list(store.blocks()), store.counts.corrupt, files_in(tmp_path)) == ([], 1, [])


def test_a_second_process_is_refused(store):
    with pytest.raises(DiskStoreError, match="is open in another process"):
        DiskStore(store._root, LARGE, OTHER)
    fill(store, chain(1))
    store.close()
    with DiskStore(store._root, LARGE, TINY) as again:
        assert list(again.blocks()) == chain(1)


def test_any_thread_may_close(store):
    thread = threading.Thread(target=store.close)
    thread.start()
    thread.join()
    DiskStore(store._root, LARGE, TINY).close()


# The limit


def test_the_end_of_the_least_recently_used_sequence_goes_first(tmp_path):
    a, b = chain(3, "a"), chain(3, "b")
    with DiskStore(tmp_path, 6 * file_size(a[1]) + 100, TINY) as store:
        fill(store, [*a, *b])
        store.touch([a[1].key])
        fill(store, chain(4, "c"))
        assert {block.key for block in store.blocks()} == {block.key for block in [*a[:2], *chain(4, "c")]}
        assert store.counts.evicted == 4


def test_the_limit_holds_for_what_was_there_and_for_other_models(tmp_path):
    size = file_size(chain(2)[1])
    with DiskStore(tmp_path, LARGE, TINY) as store:
        fill(store, chain(6))
    with DiskStore(tmp_path, 4 * size + 40, OTHER) as store:
        assert store.nbytes <= 4 * size + 40
        assert len(files_in(tmp_path)) == 4
        fill(store, chain(3))
        assert len(store) == 3
        assert len(files_in(tmp_path)) == 4


def test_a_block_over_the_limit_is_refused(tmp_path):
    with DiskStore(tmp_path, 1000, TINY) as store:
        with pytest.raises(DiskStoreError, match="larger than the disk store's limit of 1000"):
            fill(store, chain(1))
        assert (store.nbytes, files_in(tmp_path)) == (0, [])


# Broken files and disks


def test_a_flipped_byte_is_found_wherever_it_is():
    block, model = chain(1)[0], "0" * 32
    whole = block_file.encode(block, pieces_of(block, 1), model)
    found = np.zeros(len(whole), bool)
    for at in range(len(whole)):
        for flip in (1, 128, 255):
            data = np.frombuffer(whole, np.uint8).copy()
            data[at] ^= flip
            try:
                assert is_whole(block, block_file.decode(data, block.key, model), 1)  # the case of a digit, say
            except block_file.NotWholeError:
                found[at] = True
    assert np.mean(found) > 0.9
    assert found[-sum(piece.nbytes for piece in pieces_of(block, 1)) :].all()
    for length in range(len(whole)):
        with pytest.raises(block_file.NotWholeError):
            block_file.decode(np.frombuffer(whole[:length], np.uint8), block.key, model)


@pytest.mark.parametrize("at", [0, 7, 8, 100, 600, -300, -1])
def test_a_flipped_byte_on_disk_is_deleted_and_counted(store, at):
    block = chain(1)[0]
    fill(store, [block])
    (file,) = files_in(store._root)
    data = bytearray(file.read_bytes())
    data[at] ^= 1
    file.write_bytes(data)
    assert store.get(block.key) is None
    assert (store.counts.corrupt, store.nbytes, files_in(store._root), list(store.blocks())) == (1, 0, [], [])
    fill(store, [block])
    assert is_whole(block, store.get(block.key))


@pytest.mark.parametrize("damage", ["cut", "longer", "empty", "header", "renamed"])
def test_a_restart_drops_what_is_not_whole(tmp_path, damage):
    with DiskStore(tmp_path, LARGE, TINY) as store:
        fill(store, chain(2))
        bad = store._path(chain(2)[1].key)
    data = bad.read_bytes()
    changed = {"cut": data[:-1], "longer": data + b"\0", "empty": b"", "header": data[:50] + b"\xff" + data[51:]}
    bad.write_bytes(changed.get(damage, data))
    if damage == "renamed":
        bad.rename(bad.with_stem(bad.stem[:-1] + ("0" if bad.stem[-1] != "0" else "1")))
    with DiskStore(tmp_path, LARGE, TINY) as store:
        assert list(store.blocks()) == chain(1)
        assert store.counts.corrupt == 1
        assert len(files_in(tmp_path)) == 1


def test_files_of_others_are_left_alone(tmp_path):
    theirs = tmp_path / "models" / "llama" / "model.safetensors"
    theirs.parent.mkdir(parents=True)
    theirs.write_bytes(b"x" * 5000)
    with DiskStore(tmp_path, 4000, TINY) as store:
        assert store.nbytes == 0
        fill(store, chain(3))
    assert theirs.read_bytes() == b"x" * 5000


def test_a_vanished_file_or_directory_is_a_miss(store):
    block = chain(1)[0]
    fill(store, [block])
    shutil.rmtree(store._home)
    assert store.get(block.key) is None
    fill(store, [block])
    assert is_whole(block, store.get(block.key))


def test_a_path_that_is_a_file(tmp_path):
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(DiskStoreError, match=r"cannot open .*file.*: (File exists|Not a directory)"):
            DiskStore(path, LARGE, TINY)


def test_a_directory_that_cannot_be_written(tmp_path, monkeypatch):
    if os.geteuid() == 0:  # who may write everywhere

        def refused(*args, **kwargs):
            raise PermissionError(13, "Permission denied")

        monkeypatch.setattr(disk, "_write_synced", refused)
    else:
        tmp_path.chmod(0o500)
    with pytest.raises(DiskStoreError, match=r"cannot open .*: Permission denied"):
        DiskStore(tmp_path, LARGE, TINY)
    monkeypatch.undo()
    tmp_path.chmod(0o700)
    DiskStore(tmp_path, LARGE, TINY).close()


def test_a_disk_that_takes_no_more(store):
    """A limit of file sizes stands for a full disk: the write fails half-way."""
    blocks = chain(2)
    fill(store, blocks[:1])
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (500, before[1]))
    try:
        with pytest.raises(DiskStoreError, match=r"cannot write .*File too large"):
            fill(store, blocks[1:])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert list(store.blocks()) == blocks[:1]
    assert not any((store._home / "writing").iterdir())
    assert store.nbytes == sum(file.stat().st_size for file in files_in(store._root))
    fill(store, blocks)
    assert is_whole(blocks[1], store.get(blocks[1].key))


@pytest.mark.parametrize("rounds", [5, pytest.param(50, marks=pytest.mark.slow)])
def test_a_killed_process_leaves_only_whole_blocks(tmp_path, rounds):
    command = [sys.executable, str(TESTS / "disk_crashes.py"), str(tmp_path), str(rounds), "0"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


# Threads


def test_deleting_reaches_a_block_that_is_being_written(store, monkeypatch):
    block = chain(1)[0]
    monkeypatch.setattr(os, "fsync", lambda handle: store.delete([block.key]))
    fill(store, [block])
    monkeypatch.undo()
    assert (store.get(block.key), store.nbytes, files_in(store._root)) == (None, 0, [])
    assert not any((store._home / "writing").iterdir())


def test_a_block_that_is_stored_again_while_it_is_read_is_not_lost(tmp_path, monkeypatch):
    """Between the look into the books and the file, another thread deletes the block and stores it again."""
    (block,) = chain(1)
    fromfile = np.fromfile

    def read(path, dtype):
        monkeypatch.setattr(np, "fromfile", fromfile)
        store.delete([block.key])
        fill(store, [block])
        raise FileNotFoundError(path)

    with DiskStore(tmp_path, 1 << 20, TINY) as store:
        fill(store, [block])
        monkeypatch.setattr(np, "fromfile", read)
        assert is_whole(block, store.get(block.key))
        assert (block.key in store, store.counts.corrupt) == (True, 0)


def test_many_threads(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda handle: None)
    blocks = [*chain(6, "a"), *chain(6, "b")]
    failures = []

    def work(seed):
        rng = np.random.default_rng(seed)
        for _ in range(60):
            block = blocks[rng.integers(len(blocks))]
            fill(store, [block])
            found = store.get(block.key)
            failures.extend([block] if found is not None and not is_whole(block, found) else [])
            store.delete([blocks[rng.integers(len(blocks))].key] if rng.random() < 0.3 else [])

    with DiskStore(tmp_path, 8 * file_size(blocks[0]), TINY) as store:
        threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert (failures, store.counts.corrupt) == ([], 0)
        assert store.nbytes == sum(file.stat().st_size for file in files_in(tmp_path))


# Archives


def test_an_archive_moves_blocks(tmp_path, store):
    blocks = [*chain(3), approximate(chain(1)[0])]
    fill(store, blocks)
    count = archive.export(tmp_path / "a.tar", TINY, (store.get(block.key) for block in blocks))
    assert count == 4
    with DiskStore(tmp_path / "there", LARGE, TINY) as there:
        for block, pieces in archive.import_(tmp_path / "a.tar", TINY):
            there.put(block, pieces)
        assert all(is_whole(block, there.get(block.key)) for block in blocks)


def test_an_archive_of_another_model_is_refused(tmp_path):
    block = chain(1)[0]
    archive.export(tmp_path / "a.tar", TINY, [(block, pieces_of(block))])
    with pytest.raises(DiskStoreError, match="is of another model: dtype is 'bfloat16' there and 'float32' here"):
        list(archive.import_(tmp_path / "a.tar", OTHER))


def test_a_broken_archive_is_refused(tmp_path):
    block = chain(1)[0]
    archive.export(tmp_path / "a.tar", TINY, [(block, pieces_of(block))])
    data = (tmp_path / "a.tar").read_bytes()
    at = data.index(pieces_of(block)[0].tobytes())
    flipped = data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]
    for broken in (flipped, data[:at], b"", b"x" * 2000):
        (tmp_path / "b.tar").write_bytes(broken)
        with pytest.raises(DiskStoreError, match=r"b\.tar"):
            list(archive.import_(tmp_path / "b.tar", TINY))


def test_an_archive_appears_only_when_it_is_whole(tmp_path):
    def blocks():
        yield chain(1)[0], pieces_of(chain(1)[0])
        raise RuntimeError("stopped")

    with pytest.raises(RuntimeError):
        archive.export(tmp_path / "a.tar", TINY, blocks())
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(DiskStoreError, match="cannot write"):
        archive.export(tmp_path / "missing" / "a.tar", TINY, [])
    with pytest.raises(DiskStoreError, match="cannot read"):
        list(archive.import_(tmp_path / "a.tar", TINY))


# Any order of calls

POOL = [*chain(4, "a"), *chain(3, "b"), chain(3, "a", tokens=4)[2]]  # the last one's predecessor is never there
MODELS = (TINY, OTHER)
ROOM = 5 * file_size(POOL[0]) + 100


class Calls(RuleBasedStateMachine):
    """The store against lists: what is there, in which order it was used, and when each was used itself."""

    blocks_of_pool = st.sampled_from(POOL)

    def __init__(self):
        super().__init__()
        self.directory = tempfile.TemporaryDirectory()
        self.model, self.order, self.used, self.time = 0, [], {}, 0
        self.store = DiskStore(self.directory.name, ROOM, TINY)

    def teardown(self):
        self.store.close()
        self.directory.cleanup()

    def reorder(self, model, block):
        while block is not None and (model, block) in self.order:
            self.order.remove((model, block))
            self.order.append((model, block))
            block = next((b for b in POOL if b.key == block.before), None)

    def use(self, block):
        self.time += 1
        self.used[self.model, block] = self.time
        self.reorder(self.model, block)

    def there(self, block):
        return (self.model, block) in self.order

    @rule(block=blocks_of_pool)
    def put(self, block):
        self.store.put(block, pieces_of(block))
        if not self.there(block):
            while sum(map(self.size, self.order)) + self.size((0, block)) > ROOM:
                self.order.pop(0)
            self.order.append((self.model, block))
        self.use(block)

    @staticmethod
    def size(item):
        return file_size(item[1])

    @rule(block=blocks_of_pool)
    def get(self, block):
        found = self.store.get(block.key)
        assert is_whole(block, found) if self.there(block) else found is None
        self.use(block)

    @rule(block=blocks_of_pool)
    def touch(self, block):
        self.store.touch([block.key])
        self.use(block)

    @rule(block=blocks_of_pool)
    def delete(self, block):
        self.store.delete([block.key])
        self.order = [item for item in self.order if item != (self.model, block)]

    @rule(block=blocks_of_pool, at=st.integers(0, 10**6))
    def damage(self, block, at):
        path = self.store._path(block.key)
        if self.there(block):
            data = bytearray(path.read_bytes())
            data[at % len(data)] ^= 1
            path.write_bytes(data)
            assert self.store.get(block.key) is None
        self.order = [item for item in self.order if item != (self.model, block)]

    @rule(model=st.sampled_from([0, 0, 1]))
    def restart(self, model):
        self.store.close()
        self.store, self.model = DiskStore(self.directory.name, ROOM, MODELS[model]), model
        there, self.order = sorted(self.order, key=self.used.__getitem__), []
        for item in there:
            self.order.append(item)
            if item[0] == model:
                self.reorder(*item)

    @invariant()
    def agrees(self):
        assert list(self.store.blocks()) == [block for model, block in self.order if model == self.model]
        assert self.store.nbytes == sum(map(self.size, self.order)) <= ROOM
        assert len(files_in(Path(self.directory.name))) == len(self.order)


class TestCalls(Calls.TestCase):
    settings = settings(max_examples=40, stateful_step_count=30, deadline=None, suppress_health_check=list(HealthCheck))

    @pytest.fixture(autouse=True)
    def _without_waiting_for_the_disk(self, monkeypatch):
        monkeypatch.setattr(os, "fsync", lambda handle: None)
