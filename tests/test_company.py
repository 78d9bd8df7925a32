"""Donors in company: what texts are prefilled behind, what is kept of it, and how they are made again."""

import numpy as np
import pytest
from conftest import losing_the_store, tiny_engine
from dense import Dense, stored_kv

from sparsex_jax import EngineConfig, InvalidRequestError, ReuseConfig, SamplingParams, UnknownHandleError
from sparsex_jax.cache import Origin, PageCache
from sparsex_jax.cache.company import Company, company_namespace, having_seen, share_run
from sparsex_jax.scheduler.company import Neighbours, last_run, usual_opening

RNG = np.random.default_rng(18)
TEXTS = RNG.integers(1, 97, (6, 50)).astype(np.int32)
OPENING = RNG.integers(1, 97, 21).astype(np.int32)
NAIVE = ReuseConfig("naive", only_if_faster=False)


@pytest.fixture
def engine():
    return tiny_engine(company_tokens=200)


def ask(engine, namespace="default", number=3):
    """Prompts that begin alike."""
    for _ in range(number):
        engine.prefill(np.concatenate([OPENING, RNG.integers(1, 97, 30)]), namespace=namespace)


def entry_of(engine, handle):
    [entry] = [entry for entry in engine.entries() if entry.handle == handle]
    return entry


def company_of(engine, handle):
    return entry_of(engine, handle).origin.company.tokens


def require_kv_of(engine, handle):
    """What an entry has is the text's KV behind its company, in all layers."""
    entry = entry_of(engine, handle)
    before, text = entry.origin.company.tokens, engine.cache.text(handle)
    slots = np.concatenate(
        [page * engine.config.page_size + np.arange(engine.config.page_size) for page in entry.pages]
    )
    stored = stored_kv(engine, slots[: len(text)])
    expected = Dense(engine.model, engine.runner.params).full(np.concatenate([before, text]))[1]
    for ours, right in zip(stored, zip(*expected, strict=True), strict=True):
        np.testing.assert_allclose(ours, np.array(right)[:, len(before) :], atol=1e-4)


def require_books(engine):
    engine.admission.check_books()
    assert engine.stats()["active"] == 0


# The choice -------------------------------------------------------------------------------------------------


def test_the_opening_is_what_more_than_half_begin_with():
    def opening(*prompts):
        return usual_opening(np.int32(prompt).tobytes() for prompt in prompts).tolist()

    assert opening() == opening([1, 2, 3]) == []  # of one prompt nobody knows what is usual
    assert opening([1, 2, 3], [1, 2, 4]) == [1, 2]
    assert opening([1, 2, 3], [1, 2, 4], [5]) == [1, 2]
    assert opening([1, 2, 3], [1, 2, 4], [5], [6]) == []
    assert opening([1, 2], [1, 2], [1, 300], [7]) == [1]


def test_runs_fill_the_budget_and_the_last_full_one_is_taken():
    cache = PageCache(16, 8)
    pages = cache.allocate(6)
    for page in pages:
        cache.commit([page], np.arange(8, dtype=np.int32) + 10 * page, "n", exact_tokens=8)
        cache.register([page], 8, "n", frozen=False)
    entries = cache.entries()

    def run(number, room, most=8):
        return [entry.handle for entry in last_run(entries[:number], room, most)]

    assert [run(number, 24) for number in range(7)] == [[], [1], [1, 2], [1, 2, 3], [1, 2, 3], [1, 2, 3], [1, 2, 3]]
    assert run(6, 16) == [3, 4]  # until 7 comes
    assert run(6, 16, most=4) == [1, 2, 3, 4]  # texts are cut


def test_a_share_of_the_budget_is_for_the_opening_and_long_texts_are_cut(engine):
    ask(engine)
    engine.remember(TEXTS[:2].ravel())
    neighbours = Neighbours.of(engine.cache, "default", 48)
    assert neighbours.opening.tolist() == OPENING[:12].tolist()
    assert neighbours.company_of(TEXTS[3], 1000).tokens.tolist() == [*OPENING[:12], *TEXTS[0][:18]]
    assert neighbours.company_of(TEXTS[3], 20).tokens.tolist() == OPENING[:12].tolist()  # there is no room for more
    assert neighbours.company_of(TEXTS[3], 7).tokens.tolist() == OPENING[:7].tolist()
    assert len(neighbours.company_of(OPENING[3:12], 1000).tokens) == 0  # it is a part of the opening
    for budget in range(6):
        assert Neighbours.of(engine.cache, "default", budget).num_tokens <= budget


def test_shared_runs():
    a = np.arange(40, dtype=np.int32)
    assert share_run(a, a[10:26])
    assert not share_run(a, a[10:25])
    assert not share_run(a, np.concatenate([a[:15], a[20:35]]))
    assert not share_run(a[:3], a)
    assert not having_seen(a)(Company.nobody())


# Remembering ------------------------------------------------------------------------------------------------


def test_a_text_is_prefilled_behind_the_opening_and_other_texts_and_kept_alone(engine):
    ask(engine)
    first, second, third = (engine.remember(text, frozen=True) for text in TEXTS[:3])
    assert company_of(engine, first).tolist() == OPENING.tolist()
    assert company_of(engine, third).tolist() == [*OPENING, *TEXTS[0], *TEXTS[1]]
    for handle in (first, second, third):
        require_kv_of(engine, handle)
    origins = [entry.origin for entry in engine.entries()]
    assert [origin.company_tokens for origin in origins] == [21, 71, 121]
    assert [origin.prefilled_tokens for origin in origins] == [71, 100, 100]  # what stood before it last time is stored
    for handle, text in zip((first, third), (TEXTS[0], TEXTS[2]), strict=True):
        report = engine.prefill(text, reuse=NAIVE, keep=False).report
        assert (report.prefix_tokens, report.approximate_prefix_tokens, report.reused_tokens) == (0, 0, 49)
        assert engine.prefill(text, reuse=ReuseConfig("prefix"), keep=False).report.prefix_tokens == 0
        assert not any(engine.cache.tree[page].in_place for page in entry_of(engine, handle).pages)
    prompt = np.concatenate([OPENING, TEXTS[0], TEXTS[1][:20]])  # the company is no donor, and no prefix
    assert engine.prefill(prompt, reuse=ReuseConfig("prefix"), keep=False).report.prefix_tokens == len(OPENING)
    require_books(engine)


def test_no_company_crosses_namespaces(engine):
    ask(engine, "a")
    engine.remember(TEXTS[0], namespace="a")
    other = engine.remember(TEXTS[1], namespace="b")
    assert len(company_of(engine, other)) == 0
    mine = engine.remember(TEXTS[2], namespace="a")
    assert len(company_of(engine, mine)) == 71
    for name in ("b", "c"):
        assert engine.prefill(np.concatenate([OPENING, TEXTS[0]]), namespace=name).report.fresh_tokens == 71
    engine.heal()
    assert len(company_of(engine, other)) == 0
    with pytest.raises(InvalidRequestError, match="without NUL characters"):
        engine.prefill(OPENING, namespace=company_namespace("a"))


def test_a_text_is_one_entry_whatever_its_company_and_alone_is_another_wish(engine):
    first = engine.remember(TEXTS[0])
    second = engine.remember(TEXTS[1])
    assert engine.remember(TEXTS[0]) == first
    assert (engine.remember(TEXTS[1]), engine.remember(TEXTS[1], company=True)) == (second, second)
    alone = engine.remember(TEXTS[1], company=False)
    assert alone != second
    assert engine.prefill(TEXTS[1], reuse=ReuseConfig("prefix"), keep=False).report.prefix_tokens == 49
    behind = engine.remember(TEXTS[1], preamble=OPENING)
    assert behind not in (first, second, alone)
    assert engine.remember(TEXTS[1], preamble=OPENING, company=False) == behind
    assert entry_of(engine, behind).origin == Origin(21, 71, None)
    assert entry_of(engine, alone).origin.company_tokens == 0
    engine.heal()
    assert entry_of(engine, alone).origin.company_tokens == 0  # it stays what was asked for
    assert engine.remember(TEXTS[0]) == first
    require_books(engine)


def test_without_company_tokens_texts_are_alone_and_company_is_refused():
    engine = tiny_engine()
    assert engine.config.company_tokens == EngineConfig().company_tokens == 0
    ask(engine)
    handle = engine.remember(TEXTS[0])
    assert engine.remember(TEXTS[0], company=False) == handle
    assert entry_of(engine, handle).origin == Origin(0, 50, None)
    with pytest.raises(InvalidRequestError, match="company=True needs an engine with company_tokens above 0"):
        engine.remember(TEXTS[1], company=True)
    assert engine.heal() == 0


@pytest.mark.parametrize("tokens", [-1, 1.5, True, None])
def test_company_tokens_are_checked(tokens):
    with pytest.raises(InvalidRequestError, match="company_tokens="):
        EngineConfig(company_tokens=tokens)


def test_arguments_are_checked(engine):
    with pytest.raises(InvalidRequestError, match="exclude each other"):
        engine.remember(TEXTS[0], company=True, preamble=OPENING)
    with pytest.raises(InvalidRequestError, match="company="):
        engine.remember(TEXTS[0], company=3)


def test_where_there_is_little_room_the_company_is_smaller():
    engine = tiny_engine(store_tokens=16 * 16, company_tokens=200)  # 16 pages, of which a text takes 4, and twice
    engine.remember(TEXTS[0])
    engine.remember(TEXTS[1])
    handle = engine.remember(TEXTS[2][:40], frozen=True)  # 3 pages, so that 13 are left: 208 tokens less 40
    assert len(company_of(engine, handle)) == 100
    engine.remember(TEXTS[3], frozen=True)
    last = engine.remember(np.concatenate(TEXTS[4:])[:64])  # 9 - 4 pages are left: 80 tokens less 64
    assert len(company_of(engine, last)) < 17
    require_books(engine)


def test_a_text_does_without_company_where_others_hold_the_store():
    engine = tiny_engine(store_tokens=16 * 16, company_tokens=100)
    engine.remember(TEXTS[0])
    engine.remember(TEXTS[1])
    with engine.prefilled(np.concatenate(TEXTS[2:5])[:140], reuse=ReuseConfig("full")):  # 9 pages; 7 are left
        handle = engine.remember(TEXTS[5])
        assert len(company_of(engine, handle)) == 0
    require_books(engine)


def test_a_text_that_prompts_begin_with_stays_alone(engine):
    ask(engine)
    assert len(company_of(engine, engine.remember(OPENING))) == 0
    first = engine.remember(TEXTS[0], namespace="n")
    for question in RNG.integers(1, 97, (2, 9)):  # these share its pages
        engine.prefill(np.concatenate([TEXTS[0], question]), namespace="n")
    engine.remember(TEXTS[1], namespace="n")
    engine.heal()
    assert len(company_of(engine, first)) == 0


# Making again -----------------------------------------------------------------------------------------------


def test_texts_that_were_alone_are_made_again_and_keep_their_handles(engine):
    handles = [engine.remember(text, frozen=True) for text in TEXTS[:4]]
    ask(engine)
    before = engine.stats()["frozen"]
    assert engine.heal() > 0
    stats = engine.loop.stats
    assert (stats.remade_texts >= 2, stats.healed_tokens) == (True, 0)
    assert stats.finished == 4 + 3  # making again is no request
    for handle in handles:
        require_kv_of(engine, handle)
        assert len(company_of(engine, handle)) >= 100
    assert [entry.handle for entry in engine.entries()] == handles
    assert engine.stats()["frozen"] == before
    assert entry_of(engine, handles[0]).origin.prefilled_tokens == 50  # when it was remembered
    assert engine.heal() == 0
    report = engine.prefill(np.concatenate([OPENING, TEXTS[0]]), reuse=NAIVE, keep=False).report
    assert report.reused_tokens == 49
    require_books(engine)


def test_a_chunk_is_small_and_a_request_between_two_is_served(engine):
    for text in TEXTS[:4]:
        engine.remember(text)
    most, prefilled = engine.runner.shapes.buckets[0][0], 0
    while engine.loop.heal() is not None:
        now = engine.loop.stats.remade_tokens
        assert 0 < now - prefilled <= most + engine.config.page_size
        prefilled = now
        assert len(engine.generate(RNG.integers(1, 97, 40), SamplingParams(max_new_tokens=3)).token_ids) == 3
        require_books(engine)
    assert min(entry.origin.company_tokens for entry in engine.entries()) > 0
    for entry in engine.entries():
        require_kv_of(engine, entry.handle)


def test_requests_that_come_while_a_text_is_made_again():
    """More than there are pages for: whoever is preempted, the books are right, and all get their answers."""
    engine = tiny_engine(store_tokens=24 * 16, company_tokens=150, decode_steps=4)
    for text in TEXTS[:3]:
        engine.remember(text, frozen=True)
    ends, heal = [], engine.loop._healing.next

    def next_and_more(**options):
        found = heal(**options)
        if found is not None and len(ends) < 12:
            for prompt in RNG.integers(1, 97, (3, 60)):
                engine.loop.submit(
                    prompt, SamplingParams(max_new_tokens=20), listener=lambda e: ends.append(e.finish_reason)
                )
        return found

    engine.loop._healing.next = next_and_more
    while engine.loop.step() or engine.loop.heal() is not None:
        engine.admission.check_books()
    assert {end for end in ends if end} == {"length"}
    require_books(engine)
    for entry in engine.entries():
        require_kv_of(engine, entry.handle)
    assert entry_of(engine, 1).origin.company_tokens > 0


def test_nothing_is_made_again_without_room():
    engine = tiny_engine(store_tokens=20 * 16, company_tokens=200)
    engine.remember(TEXTS[0], frozen=True)
    engine.remember(TEXTS[1], frozen=True)
    with engine.prefilled(np.concatenate(TEXTS[2:4])[:80], reuse=ReuseConfig("full")):  # 5 pages; 7 are not enough
        assert engine.loop.heal() is None
    assert engine.heal() > 0
    require_books(engine)


def test_making_again_is_off_where_healing_is_and_pauses_after_a_failure(monkeypatch):
    engine = tiny_engine(healing=0.0, company_tokens=200)
    engine.remember(TEXTS[0])
    engine.remember(TEXTS[1])
    assert engine.loop.heal() is None
    with monkeypatch.context() as patch:
        patch.setattr(engine.runner, "begin", lambda *args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            engine.heal()
    require_books(engine)
    assert engine.heal() > 0  # asked for, and what failed is tried again
    assert entry_of(engine, 1).origin.company_tokens == 50


def test_the_store_is_lost_while_a_text_is_made_again(engine):
    for text in TEXTS[:2]:
        engine.remember(text)

    with losing_the_store(engine):
        engine.heal()
    assert engine.entries() == []
    assert engine.heal() == 0
    handle = engine.remember(TEXTS[0])
    assert (handle, len(company_of(engine, handle))) == (3, 0)
    require_books(engine)


def test_a_text_that_is_cancelled_leaves_nothing_but_company(engine):
    engine.remember(TEXTS[0])
    events = []
    ticket = engine.loop.remember(TEXTS[1:5].ravel(), listener=events.append)
    engine.loop.step()
    ticket.cancel()
    while engine.loop.step():
        pass
    assert events[-1].finish_reason == "cancelled"
    assert len(engine.entries()) == 1
    require_books(engine)


# Forgetting -------------------------------------------------------------------------------------------------


def stored(engine, text):
    """How many tokens of a text can be found, in its namespace and in what is kept beside it."""
    match = [
        engine.cache.lookup(np.append(text, np.int32(1)), name) for name in ("default", company_namespace("default"))
    ]
    for each in match:
        engine.cache.let_go(each)
    return sum(sum(each.hits) for each in match)


def test_texts_that_have_seen_what_is_forgotten_are_made_again_without_it(engine):
    handles = [engine.remember(text, frozen=True) for text in TEXTS[:3]]
    assert stored(engine, TEXTS[0]) > 50
    forgotten = engine.forget(handles[0])
    assert (forgotten.num_tokens, forgotten.num_remaining, forgotten.num_stale) == (50, 0, 2)
    assert stored(engine, TEXTS[0]) == 0
    assert [entry.stale for entry in engine.entries()] == [True, True]
    assert stored(engine, TEXTS[1]) >= 50  # they are served
    engine.heal()
    for handle in handles[1:]:
        assert not entry_of(engine, handle).stale
        assert TEXTS[0].tobytes() not in company_of(engine, handle).tobytes()
        require_kv_of(engine, handle)
    engine.forget(handles[1])
    engine.heal()
    assert (len(company_of(engine, handles[2])), entry_of(engine, handles[2]).stale) == (0, False)  # nobody is left
    require_kv_of(engine, handles[2])
    engine.forget(handles[2])
    assert [stored(engine, text) for text in TEXTS[:3]] == [0, 0, 0]
    require_books(engine)


def test_a_forgotten_text_that_prompts_began_with_is_noticed(engine):
    begin = np.concatenate([OPENING, TEXTS[0]])
    for question in RNG.integers(1, 97, (3, 9)):
        engine.prefill(np.append(begin, question))
    engine.remember(TEXTS[1])  # its opening has a part of what is remembered only now
    alone = engine.remember(TEXTS[0], company=False)
    assert engine.forget(alone).num_stale == 1
    engine.heal()
    assert not share_run(company_of(engine, engine.entries()[0].handle), TEXTS[0])


@pytest.mark.parametrize("again", [False, True])
def test_a_text_is_forgotten_while_another_is_prefilled_behind_it(engine, again):
    first = engine.remember(TEXTS[0])
    if again:  # the second one was alone, and is made again
        second = engine.remember(TEXTS[1])
        engine.forget(first)
        first = engine.remember(TEXTS[0])
    advance, left = engine.runner.advance, [first]

    def forget_meanwhile(*args):
        advance(*args)
        if left:
            engine.forget(left.pop())

    engine.runner.advance = forget_meanwhile
    if again:
        engine.heal()
    else:
        second = engine.remember(TEXTS[1])
    assert not left
    assert not share_run(company_of(engine, second), TEXTS[0])
    assert (stored(engine, TEXTS[0]), entry_of(engine, second).stale) == (0, False)
    require_kv_of(engine, second)
    require_books(engine)


def test_a_text_is_forgotten_while_it_is_made_again(engine):
    first = engine.remember(TEXTS[:2].ravel())
    engine.remember(TEXTS[2])
    advance, left = engine.runner.advance, [first]

    def forget_meanwhile(*args):
        advance(*args)
        if left and engine.loop.policy.running:
            engine.forget(left.pop())

    engine.runner.advance = forget_meanwhile
    engine.heal()
    assert not left
    assert stored(engine, TEXTS[0]) == stored(engine, TEXTS[1]) == 0
    with pytest.raises(UnknownHandleError):
        engine.forget(first)
    assert not any(entry.stale for entry in engine.entries())
    require_books(engine)
