"""Random steps of an engine above small tiers: prompts, cancellations, forgetting, what fails, restarts.

After each step the books of all tiers agree; no prompt finds what its namespace never had; and what a tier holds is the
KV of the tokens that it says.
"""

from types import NoneType

import numpy as np
import pytest
from conftest import TINY, tiny_engine, tiny_params
from dense import Dense, stored_kv

from sparsex_jax import ContextLengthError, ReuseConfig, SamplingParams, StoreFullError
from sparsex_jax.device.link import Arriving, HostBlock, Link
from sparsex_jax.errors import FrozenLimitError, LinkError, NoRoomError
from sparsex_jax.scheduler.sequence import State, ignore

PAGE = 16
DENSE = Dense(TINY, tiny_params())
DOCUMENTS = [np.random.default_rng(seed).integers(1, 97, length) for seed, length in enumerate((40, 130, 270, 290))]
STEPS_OF_THE_LINK = [(Link, "spill"), (HostBlock, "ready"), (Arriving, "ready"), (Arriving, "wait")]
STEPS_OF_THE_LINK += [(Link, name) for name in ("fetch", "place", "fetch_together", "place_together")]
QUICK, METHODS = ["prefix", "naive"], ["prefix", "prefix", "naive", "sparsex", "full", "excerpt"]  # few programs


class Life:
    def __init__(self, seed, disk, methods):
        self.methods, self.rng, self.disk = methods, np.random.default_rng(seed), disk
        self.waiting, self.handles, self.known, self.counts = [], [], {"a": {}, "b": {}}, {}
        self.found = {}
        self.engine = self.make()

    def make(self):
        disk = {"disk_store": str(self.disk), "disk_store_bytes": 1_500_000}
        return tiny_engine(store_tokens=40 * PAGE, host_store_bytes=800_000, **disk)

    def step(self):
        names, weights = zip(*STEPS.items(), strict=True)
        name = self.rng.choice(names, p=np.array(weights) / sum(weights))
        self.counts[str(name)] = self.counts.get(str(name), 0) + 1
        getattr(self, name)()
        self.engine.admission.check_books()
        self.engine.admission.tiers.check()
        self.take_ended()

    # Steps

    def ask(self):
        namespace, method = self.rng.choice(["a", "b"]), self.rng.choice(self.methods)
        pieces = self.rng.choice(len(DOCUMENTS), self.rng.integers(1, 3))
        cut = self.rng.choice([0, 0, 0, 5])
        prompt = np.concatenate([*(DOCUMENTS[i][cut:] for i in pieces), self.rng.integers(1, 97, 3)]).astype(np.int32)
        options = {"only_if_faster": False} if method in ("naive", "sparsex", "excerpt") else {}
        reuse = ReuseConfig.fitting(str(method), boundary_layer=1, piece_tokens=32, coverage=0.5, **options)
        sampling = SamplingParams(max_new_tokens=int(self.rng.integers(1, 12)), ignore_eos=True)
        make = self.engine.loop.requests.generation
        about = {"namespace": str(namespace), "keep": bool(self.rng.random() < 0.9), "listener": ignore}
        self.submit(make(prompt, sampling, reuse=reuse, **about), prompt)

    def remember(self):
        text, namespace = DOCUMENTS[self.rng.integers(3)].astype(np.int32), str(self.rng.choice(["a", "b"]))
        about = {"namespace": namespace, "frozen": bool(self.rng.random() < 0.2), "preamble": None}
        self.submit(self.engine.loop.requests.remember(text, **about), text)

    def submit(self, sequence, prompt):
        try:
            self.engine.admission.check(sequence)
        except (ContextLengthError, StoreFullError):
            return
        self.engine.loop._put_in_line([sequence])
        self.waiting.append((sequence, prompt))

    def go_on(self):
        for _ in range(self.rng.integers(1, 4)):
            self.engine.loop.step()

    def cancel(self):
        if self.waiting:
            self.waiting[self.rng.integers(len(self.waiting))][0].cancelled = True

    def forget(self):
        if not self.handles:
            return
        handle = self.handles.pop(self.rng.integers(len(self.handles)))
        if self.engine.cache.knows(handle):
            text, namespace = self.engine.cache.text(handle), self.engine.cache.entry(handle).namespace
            self.engine.forget(handle)
            assert not self.engine.admission.tiers.index.copies(text, namespace)

    def fail_the_link(self):
        owner, name = STEPS_OF_THE_LINK[self.rng.integers(len(STEPS_OF_THE_LINK))]

        def fail(*arguments):
            raise LinkError("a test's")

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(owner, name, fail)
            self.go_on()

    def slow_down_the_link(self):
        """Nothing comes before somebody waits for it."""
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Arriving, "ready", lambda arriving: False)
            self.go_on()

    def fail_the_device(self):
        def fail(*arguments, **options):
            raise RuntimeError("a test's")

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(self.engine.runner, str(self.rng.choice(["begin", "advance", "start_decode"])), fail)
            self.go_on()

    def lose_the_store(self):
        self.engine.runner.store.delete()
        self.engine.loop.recover()

    def settle(self):
        self.engine.loop.settle()
        assert not self.engine.admission.tiers.busy

    def damage_a_file(self):
        files = sorted(self.disk.rglob("*.safetensors"))
        if files:
            file = files[self.rng.integers(len(files))]
            data = bytearray(file.read_bytes())
            data[self.rng.integers(len(data))] ^= 1
            file.write_bytes(data)

    def restart(self):
        self.finish()
        self.engine.close()
        self.handles = []
        self.engine = self.make()

    def look_at_the_kv(self):
        """Of layer 0, which depends on tokens and positions alone: what the device has, and a block of host memory."""
        coming = set(self.engine.admission.loading.pages)
        for node in self.engine.cache.tree.live_nodes():
            if node.pages[0] in coming:
                continue
            tokens = np.frombuffer(node.key, np.int32)
            slots = node.pages[0] * PAGE + np.arange(len(tokens))
            check_layer(tokens, node.start, *(kv[0] for kv in stored_kv(self.engine, slots)))
        tiers = self.engine.admission.tiers
        here = [block for key, block in tiers.index.blocks.items() if tiers.is_here(key)]
        if here:
            block = here[self.rng.integers(len(here))]
            kept = tiers._link.to_numpy(tiers._kept(block.key))[0][:, 0]  # [pages, 2, kv_heads, page, d]
            keys, values = (kept[:, i].swapaxes(1, 2).reshape(-1, *kept.shape[2:3], kept.shape[-1]) for i in (0, 1))
            tokens = np.frombuffer(block.tokens, np.int32)
            check_layer(tokens, block.start, keys[: len(tokens)], values[: len(tokens)])

    # Ends

    def finish(self):
        while self.engine.loop.step():
            pass
        self.take_ended()
        assert not self.waiting

    def take_ended(self):
        for sequence, prompt in self.waiting:  # what is being computed may be found already
            self.known[sequence.namespace][id(prompt)] = prompt, sequence.tokens.tobytes()
        ended = [each for each in self.waiting if each[0].state is State.FINISHED]
        self.waiting = [each for each in self.waiting if each[0].state is not State.FINISHED]
        for sequence, prompt in ended:
            error = sequence.error
            assert isinstance(error, (NoRoomError, FrozenLimitError, NoneType)) or "a test's" in str(error)
            if sequence.report is not None:
                self.check_found(sequence.report, prompt, sequence.namespace)
            if sequence.handle is not None:
                self.handles.append(sequence.handle)

    def check_found(self, report, prompt, namespace):
        """Prefix and segments are in something else that this namespace had."""
        self.found[report.prefix_tier] = self.found.get(report.prefix_tier, 0) + 1
        known = [tokens for other, tokens in self.known[namespace].values() if other is not prompt]
        runs = [(each.start, each.start + each.length) for each in report.segments]
        if not report.omitted_tokens:
            runs.append((0, report.prefix_tokens + report.approximate_prefix_tokens))
        for begin, end in runs:
            assert begin == end or any(prompt[begin:end].tobytes() in each for each in known)


def check_layer(tokens, start, keys, values):
    _, right_keys, right_values = DENSE.qkv(0, DENSE.embed[tokens], start + np.arange(len(tokens)))
    np.testing.assert_allclose(keys, right_keys, atol=1e-4)
    np.testing.assert_allclose(values, right_values, atol=1e-4)


STEPS = {
    "ask": 30,
    "go_on": 50,
    "remember": 5,
    "cancel": 6,
    "forget": 3,
    "fail_the_link": 5,
    "slow_down_the_link": 8,
    "fail_the_device": 2,
    "lose_the_store": 1,
    "settle": 3,
    "damage_a_file": 1,
    "look_at_the_kv": 2,
    "restart": 0.5,
}


def live(steps, seed, disk, methods):
    life = Life(seed, disk, methods)
    for _ in range(steps):
        life.step()
    life.finish()
    life.look_at_the_kv()
    life.engine.close()
    return life


def test_a_short_life(tmp_path):
    live(40, 0, tmp_path, QUICK)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(10))
def test_ten_thousand_steps(tmp_path, seed):
    life = live(1000, seed, tmp_path, METHODS)
    print(life.counts, life.found, life.engine.admission.tiers.counts)
