"""The tasks on documents: each answer is where the task says, and nowhere else."""

import ast
import re

import numpy as np
import pytest

from sparsex_jax.eval import documents, lexicon
from sparsex_jax.eval.documents import emails, logbooks, modules, parts, portraits, prose
from sparsex_jax.eval.tasks import make_sample, word_count

TASKS = tuple(documents.TASKS)
# How a document of each task begins; the text goes on in one paragraph. Modules are Python.
TITLES = {
    "report": r"Report on the [^\n]+\n",
    "log": r"Logbook of the ship [^\n]+\n",
    "portrait": r"Portrait of [^\n]+\n",
    "email": r"From: [^\n]+\nTo: [^\n]+\nSubject: [^\n]+\n\nDear [^\n]+,\n",
}
ON_MODULES = ("module_constants", "module_returns")
REPEATED = ("vt_keys", "cwe_goods")  # tasks with answers that several documents have


def sample_of(task, seed=0, tokens=300, segments=4, questions=1):
    return make_sample(task, np.random.default_rng(seed), tokens, segments, questions)


def telling(sample, answer):
    """Where an answer is: among the instruction and the documents."""
    return [text for text in (sample.instruction, *sample.segments) if re.search(rf"\b{answer}\b", text)]


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize(("tokens", "segments"), [(60, 1), (1500, 3), (5000, 20)])
def test_documents_have_the_length_asked_for(task, tokens, segments):
    for seed in range(3):
        sample = sample_of(task, seed, tokens, segments, questions=3)
        assert len(set(sample.segments)) == segments
        assert 1 <= len(sample.questions) <= 3
        for segment in sample.segments:
            assert not segment[0].isspace()
            assert segment.endswith("\n")
            assert abs(word_count(segment) - tokens / segments) < 90 or tokens == 60
            if task in ON_MODULES:
                ast.parse(segment)
            else:
                assert re.fullmatch(rf"({'|'.join(TITLES.values())})[A-Z][^\n{{}}]+\.\n", segment)


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("segments", [2, 8, 20])
def test_each_answer_is_in_one_place(task, segments):
    for seed in range(5):
        sample = sample_of(task, seed, 200 * segments, segments, questions=3)
        for question in sample.questions:
            assert re.fullmatch(r"[A-Z][^{}]+[.?]", question.text)
            assert question.reference.endswith(".")
            for answer in question.answers:
                assert answer in question.reference
                assert answer not in question.text
                places = len(telling(sample, answer))
                assert places > 1 if task == "cwe_goods" else 1 <= places <= 1 + (task in REPEATED)


@pytest.mark.parametrize("task", TASKS)
def test_answers_differ_between_questions(task):
    sample = sample_of(task, 0, 4000, 20, questions=10)
    assert len({question.answers for question in sample.questions}) >= (1 if task == "cwe_goods" else 4)


def test_prose_has_nothing_that_is_asked_for():
    said = " ".join([*sum(prose.SENTENCES.values(), ()), *sum(prose.WORDS.values(), ())])
    names = {*lexicon.FIRST_NAMES, *lexicon.LAST_NAMES, *lexicon.TOWNS}
    names |= {*logbooks.GOODS, *logbooks.WARES, *emails.SUBJECTS}
    names |= {value for _, _, values in portraits.FACTS for value in values}
    assert not [name for name in names if re.search(rf"\b{name}\b", said)]
    assert not re.search(r"\d", said)
    assert not re.search(r"\d{3}", "".join(modules.FUNCTIONS))


# Tasks with answers in several places -----------------------------------------------------------------------


def test_two_hops_are_in_two_documents():
    sample = sample_of("two_hop", 3, 4000, 20, questions=20)
    for question in sample.questions:
        owner = re.search(r"will of (\w+ \w+)", question.text)[1]
        (first,) = (text for text in sample.segments if f"will of {owner} " in text)
        (second,) = (text for text in sample.segments if question.answers[0] in text)
        box = re.search(rf"will of {owner} lies in the (\w+ \w+)", first)[1]
        assert f"The {box}, number {question.answers[0]}," in second
        assert first != second


@pytest.mark.parametrize(("task", "number"), [("mv_niah", 4), ("mv_ports", 3)])
def test_several_values_of_a_key_are_in_several_documents(task, number):
    sample = sample_of(task, 0, 4000, 20)
    (question,) = sample.questions
    found = [sum(answer in text for answer in question.answers) for text in sample.segments]
    assert found.count(1) == len(question.answers) == number


def test_several_keys_are_in_several_documents():
    sample = sample_of("mq_codes", 0, 4000, 20, questions=5)
    for question in sample.questions:
        assert len({telling(sample, code)[0] for code in question.answers}) == len(set(question.answers)) == 3
        for code in question.answers:
            (text,) = telling(sample, code)
            place = re.match("Report on the (.*)", text)[1]
            locked = re.search(f"code of the (.*?) is {code}", text)[1]
            assert f"the {locked} in the {place}" in question.text


def test_keys_are_handed_on_in_two_documents():
    sample = sample_of("vt_keys", 0, 4000, 20, questions=10)
    handed = [re.findall(r"key of the (\w+ \w+) went from (\w+ \w+) to (\w+ \w+)", text) for text in sample.segments]
    assert all(len(facts) == 1 for facts in handed)
    for question in sample.questions:
        first, second, third = question.answers
        box = re.search(r"[Tt]he key of the (\w+ \w+)", question.text)[1]
        assert [(box, first, second)] in handed
        assert [(box, second, third)] in handed


def test_common_goods_are_sold_more_often_than_all_others():
    for segments in (1, 3, 20):
        sample = sample_of("cwe_goods", segments, 200 * segments, segments)
        sold = re.findall(r"bought [\w ]+ of (\w+) from us", "".join(sample.segments))
        times = sorted((sold.count(goods), goods) for goods in set(sold))
        assert times[-1][1] == sample.questions[0].answers[0]
        assert times[-1][0] > 2 * times[-2][0]


def test_what_changed_is_in_the_instruction_alone():
    for seed in range(5):
        sample = sample_of("changed", seed, 4000, 20, questions=3)
        before, today = (
            dict(re.findall(r"[Tt]he (\w+) is (\w+ \w+)", text)) for text in (sample.earlier, sample.instruction)
        )
        assert not {*before.values()} & {*today.values()}
        for question in sample.questions:
            place = re.search(r"stone of the new (.+?), and", question.text)[1]
            (text,) = (text for text in sample.segments if text.startswith(f"Report on the {place}\n"))
            assert (today[re.search(r"was laid by the (\w+)", text)[1]],) == question.answers
            assert not [text for text in sample.segments if question.answers[0] in text]


def test_no_two_boxes_or_names_have_a_word_in_common():
    for some in (parts.unlike_boxes, parts.unlike_people):
        words = " ".join(some(np.random.default_rng(0), 11)).split()
        assert len(set(words)) == len(words)
        assert len(set(some(np.random.default_rng(0), 100))) == 100
