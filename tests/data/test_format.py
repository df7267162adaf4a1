"""How a problem becomes token ids: what is written, what counts as part of a step, which thoughts say which step."""

from __future__ import annotations

import re
from collections.abc import Callable
from copy import copy
from itertools import accumulate, pairwise

import pytest

from simcot_latent.data.format import (
    Rationale,
    TaggedIds,
    align_steps,
    concatenate,
    encode_problem,
    encode_question,
    encode_step,
    join,
    lines,
    untagged,
)
from simcot_latent.data.problem import Problem
from simcot_latent.data.sources.arithmetic import Arithmetic
from simcot_latent.data.tokenizer import Tokenizer

MakeProblem = Callable[[str, str, str], Problem]

# Around and inside the steps: fused tokens, a bracket after `$`, after a blank, after a digit, steps side by side,
# characters of several bytes, text that spells a special token, annotations that are no steps.
AWKWARD = (
    "He has 2+3=<<2+3=5>>5 pens, i.e. $<<5*2=10>>10 (<<10/(4-2)=5>>5)\n"
    "½ of 7<<7/2=3.5>><<.5+3.5=4>> naïve ≈ <<-4+8=4>>4 😀<<4*1=4>>😀 <|eot|> <<X/2=0.5X>> a<<b, <<12 and >>"
)
STEPS_OF_AWKWARD = ["2+3=5", "5*2=10", "10/(4-2)=5", "7/2=3.5", ".5+3.5=4", "-4+8=4", "4*1=4"]


@pytest.fixture(scope="module")
def awkward(make_problem: MakeProblem) -> Problem:
    problem = make_problem("How many <|end|> pens?", AWKWARD, "4")
    assert [step.text for step in problem.steps] == [f"<<{text}>>" for text in STEPS_OF_AWKWARD]
    return problem


def overlapping(tokenizer: Tokenizer, ids: list[int], text: str, pieces: list[str]) -> list[bool]:
    """Which tokens share a byte with one of the pieces (each there once): decoded one by one, laid beside the text."""
    data = text.encode()
    token_bytes = tokenizer.encoding.decode_tokens_bytes(ids)
    assert b"".join(token_bytes) == data
    inside = [False] * len(data)
    for piece in pieces:
        assert data.count(piece.encode()) == 1
        start = data.index(piece.encode())
        inside[start : start + len(piece.encode())] = [True] * len(piece.encode())
    return [any(inside[a:b]) for a, b in pairwise(accumulate(map(len, token_bytes), initial=0))]


# What is written


@pytest.mark.parametrize("thinks", [False, True])
def test_the_question(either_tokenizer: Tokenizer, thinks: bool) -> None:
    ids = encode_question(either_tokenizer, "  How many?\n", thinks=thinks)
    assert either_tokenizer.decode(ids) == ("How many?" if thinks else "How many?\n")
    assert (ids[-1] == either_tokenizer.bot_id) == thinks


@pytest.mark.parametrize(
    ("rationale", "written"),
    [
        ("natural", "She has 3*4=<<3*4=12>>12. Then 12-2=<<12-2=10>>10.\n"),
        ("equations", "<<3*4=12>>\n<<12-2=10>>\n"),
        ("none", ""),
    ],
)
def test_the_solution(either_tokenizer: Tokenizer, problems: list[Problem], rationale: Rationale, written: str) -> None:
    """Question, solution and answer, put together, read as the format says; the end token closes the answer."""
    tokenizer = either_tokenizer
    example = encode_problem(tokenizer, problems[0], thinks=False, rationale=rationale)
    assert tokenizer.decode(example.question) == problems[0].question + "\n"
    assert tokenizer.decode(example.rationale.ids) == written
    assert tokenizer.decode(example.answer.ids) == "#### 10"
    assert example.answer.ids[-1] == tokenizer.end_id
    assert [tokenizer.decode(step.ids) for step in example.steps] == ["<<3*4=12>>", "<<12-2=10>>"]
    assert example.length == len(example.question + example.rationale.ids + example.answer.ids)


@pytest.mark.parametrize("thinks", [True, False])
def test_a_token_to_begin_with_comes_first(tokenizer: Tokenizer, thinks: bool) -> None:
    """Where a tokenizer has one, and only there."""
    plain = encode_question(tokenizer, "How many?", thinks=thinks)
    begins = copy(tokenizer)
    begins.roles = tokenizer.roles | {"bos": tokenizer.roles["pad"]}
    assert encode_question(begins, "How many?", thinks=thinks) == [tokenizer.pad_id, *plain]


@pytest.mark.parametrize("thinks", [True, False])
def test_another_wording(tokenizer: Tokenizer, problems: list[Problem], thinks: bool) -> None:
    """Text after the question and another mark of the answer, as published checkpoints have them."""
    problem = problems[0]
    example = encode_problem(
        tokenizer, problem, thinks=thinks, rationale="none", question_end=" Think:", answer_mark="The answer is:"
    )
    end = [tokenizer.bot_id] if thinks else tokenizer.encode("\n")
    assert example.question == [*tokenizer.encode(f"{problem.question} Think:"), *end]
    assert example.answer.ids == [*tokenizer.encode(f"The answer is: {problem.answer}"), tokenizer.end_id]


def test_a_problem_without_steps(tokenizer: Tokenizer, problems: list[Problem]) -> None:
    example = encode_problem(tokenizer, problems[1], thinks=False, rationale="natural")
    assert example.steps == []
    assert not any(example.rationale.in_step)
    assert encode_problem(tokenizer, problems[1], thinks=False, rationale="equations").rationale == untagged([])


def test_text_that_spells_a_special_token_stays_text(either_tokenizer: Tokenizer, awkward: Problem) -> None:
    """In the question, in the solution: special ids stand only where the format puts them."""
    tokenizer = either_tokenizer
    special = {tokenizer.bot_id, tokenizer.eot_id, tokenizer.end_id, tokenizer.pad_id}
    example = encode_problem(tokenizer, awkward, thinks=True, rationale="natural")
    ids = example.question + example.rationale.ids + example.answer.ids
    assert [i for i in ids if i in special] == [tokenizer.bot_id, tokenizer.end_id]
    assert "<|end|>" in tokenizer.decode(ids)
    assert "<|eot|>" in tokenizer.decode(ids)


def test_a_group_of_steps_reads_as_its_text_would(either_tokenizer: Tokenizer, awkward: Problem) -> None:
    """Merged steps are joined as ids, the probe encodes the joined text: both must be the same tokens."""
    newline = untagged(either_tokenizer.encode("\n"))
    joined = join([encode_step(either_tokenizer, step.text) for step in awkward.steps], newline)
    assert joined.ids == either_tokenizer.encode("\n".join(step.text for step in awkward.steps))


# What counts as part of a step


def test_exactly_the_tokens_of_steps_are_marked_in_natural_text(either_tokenizer: Tokenizer, awkward: Problem) -> None:
    """A token counts if any of its bytes lies in a well-formed `<<..>>`; malformed annotations are plain text."""
    tokenizer = either_tokenizer
    rationale = encode_problem(tokenizer, awkward, thinks=False, rationale="natural").rationale
    steps = [f"<<{text}>>" for text in STEPS_OF_AWKWARD]
    assert rationale.in_step == overlapping(tokenizer, rationale.ids, AWKWARD + "\n", steps)
    marked = tokenizer.decode(i for i, inside in zip(rationale.ids, rationale.in_step, strict=True) if inside)
    assert [text for text in STEPS_OF_AWKWARD if text not in marked] == []
    assert "X/2" not in marked


def test_marks_on_generated_problems(tokenizer: Tokenizer) -> None:
    """What is marked, read on its own, is the steps and nothing else: the default tokenizer never crosses a bracket."""
    for problem in Arithmetic(test_size=40).load("test").problems:
        rationale = encode_problem(tokenizer, problem, thinks=False, rationale="natural").rationale
        marked = tokenizer.decode(i for i, inside in zip(rationale.ids, rationale.in_step, strict=True) if inside)
        assert marked == "".join(re.findall(r"<<[^<>]*>>", problem.rationale))
        assert marked == "".join(step.text for step in problem.steps)


def test_marks_in_equations(either_tokenizer: Tokenizer, problems: list[Problem]) -> None:
    """The steps, but not the line ends between them."""
    tokenizer = either_tokenizer
    example = encode_problem(tokenizer, problems[3], thinks=False, rationale="equations")
    tagged = list(zip(example.rationale.ids, example.rationale.in_step, strict=True))
    assert tokenizer.decode(i for i, inside in tagged if not inside) == "\n" * 4
    assert all(all(step.in_step) for step in example.steps)
    assert not any(example.answer.in_step)


# Putting parts together


def test_parts() -> None:
    a, b, newline = TaggedIds([1, 2], [True, False]), TaggedIds([3], [True]), untagged([9])
    assert concatenate([a, b]) == TaggedIds([1, 2, 3], [True, False, True])
    assert join([a, b], newline) == TaggedIds([1, 2, 9, 3], [True, False, False, True])
    assert join([a], newline) == a
    assert lines([a, b], newline) == TaggedIds([1, 2, 9, 3, 9], [True, False, False, True, False])
    assert concatenate([]) == join([], newline) == lines([], newline) == untagged([])
    assert len(a) == 2


# Which group of thoughts says which step


@pytest.mark.parametrize(
    ("steps", "surplus", "missing", "groups"),
    [
        # As many steps as groups: the other two choices make no difference.
        ("abc", "merge", "mask", ["a", "b", "c"]),
        ("abc", "merge", "answer", ["a", "b", "c"]),
        ("abc", "drop", "mask", ["a", "b", "c"]),
        ("abc", "drop", "answer", ["a", "b", "c"]),
        # More.
        ("abcde", "merge", "mask", ["a", "b", "cde"]),
        ("abcde", "merge", "answer", ["a", "b", "cde"]),
        ("abcde", "drop", "mask", ["a", "b", "c"]),
        ("abcde", "drop", "answer", ["a", "b", "c"]),
        # Fewer.
        ("a", "merge", "mask", ["a", None, None]),
        ("a", "merge", "answer", ["a", "!", "!"]),
        ("a", "drop", "mask", ["a", None, None]),
        ("a", "drop", "answer", ["a", "!", "!"]),
        # None.
        ("", "merge", "mask", [None, None, None]),
        ("", "merge", "answer", ["!", "!", "!"]),
        ("", "drop", "mask", [None, None, None]),
        ("", "drop", "answer", ["!", "!", "!"]),
        # A single group.
        ("abc", "merge", "mask", ["abc"]),
        ("abc", "drop", "answer", ["a"]),
        ("", "merge", "answer", ["!"]),
    ],
)
def test_alignment(steps: str, surplus: str, missing: str, groups: list[str | None]) -> None:
    """Both flavours of SIM-CoT and the two between them; `!` is the answer."""
    aligned = align_steps(list(steps), "!", len(groups), surplus=surplus, missing=missing)
    assert aligned == [None if group is None else list(group) for group in groups]
