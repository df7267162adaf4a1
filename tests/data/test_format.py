"""How a problem becomes token ids: what is written, what counts as part of a step, where the answer's number stands."""

from __future__ import annotations

import re
from collections.abc import Callable
from copy import copy
from itertools import accumulate, pairwise

import pytest

from simcot_latent.data.format import (
    AnswerFormat,
    Rationale,
    TaggedIds,
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

WRITES = AnswerFormat()

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
    ids = encode_question(either_tokenizer, "  How many?\n", AnswerFormat(thinks))
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
    example = encode_problem(tokenizer, problems[0], WRITES, rationale)
    assert tokenizer.decode(example.question) == problems[0].question + "\n"
    assert tokenizer.decode(example.rationale.ids) == written
    assert tokenizer.decode(example.answer.ids) == "#### 10"
    assert example.answer.ids[-1] == tokenizer.end_id
    assert [tokenizer.decode(step.ids) for step in example.steps] == ["<<3*4=12>>", "<<12-2=10>>"]
    assert example.length == len(example.question + example.rationale.ids + example.answer.ids)


@pytest.mark.parametrize("thinks", [True, False])
def test_a_token_to_begin_with_comes_first(tokenizer: Tokenizer, thinks: bool) -> None:
    """Where a tokenizer has one, and only there."""
    plain = encode_question(tokenizer, "How many?", AnswerFormat(thinks))
    begins = copy(tokenizer)
    begins.roles = tokenizer.roles | {"bos": tokenizer.roles["pad"]}
    assert encode_question(begins, "How many?", AnswerFormat(thinks)) == [tokenizer.pad_id, *plain]


@pytest.mark.parametrize("thinks", [True, False])
def test_another_wording(tokenizer: Tokenizer, problems: list[Problem], thinks: bool) -> None:
    """Text after the question and another mark of the answer, as published checkpoints have them."""
    problem = problems[0]
    answers = AnswerFormat(thinks, question_end=" Think:", answer_mark="The answer is:")
    example = encode_problem(tokenizer, problem, answers, "none")
    end = [tokenizer.bot_id] if thinks else tokenizer.encode("\n")
    assert example.question == [*tokenizer.encode(f"{problem.question} Think:"), *end]
    assert example.answer.ids == [*tokenizer.encode(f"The answer is: {problem.answer}"), tokenizer.end_id]


def test_a_problem_without_steps(tokenizer: Tokenizer, problems: list[Problem]) -> None:
    example = encode_problem(tokenizer, problems[1], WRITES, "natural")
    assert example.steps == []
    assert not any(example.rationale.in_step)
    assert encode_problem(tokenizer, problems[1], WRITES, "equations").rationale == untagged([])


def test_text_that_spells_a_special_token_stays_text(either_tokenizer: Tokenizer, awkward: Problem) -> None:
    """In the question, in the solution: special ids stand only where the format puts them."""
    tokenizer = either_tokenizer
    special = {tokenizer.bot_id, tokenizer.eot_id, tokenizer.end_id, tokenizer.pad_id}
    example = encode_problem(tokenizer, awkward, AnswerFormat(thinks=True), "natural")
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
    rationale = encode_problem(tokenizer, awkward, WRITES, "natural").rationale
    steps = [f"<<{text}>>" for text in STEPS_OF_AWKWARD]
    assert rationale.in_step == overlapping(tokenizer, rationale.ids, AWKWARD + "\n", steps)
    marked = tokenizer.decode(i for i, inside in zip(rationale.ids, rationale.in_step, strict=True) if inside)
    assert [text for text in STEPS_OF_AWKWARD if text not in marked] == []
    assert "X/2" not in marked


def test_marks_on_generated_problems(tokenizer: Tokenizer) -> None:
    """What is marked, read on its own, is the steps and nothing else: the default tokenizer never crosses a bracket."""
    for problem in Arithmetic(test_size=40).load("test").problems:
        rationale = encode_problem(tokenizer, problem, WRITES, "natural").rationale
        marked = tokenizer.decode(i for i, inside in zip(rationale.ids, rationale.in_step, strict=True) if inside)
        assert marked == "".join(re.findall(r"<<[^<>]*>>", problem.rationale))
        assert marked == "".join(step.text for step in problem.steps)


def test_marks_in_equations(either_tokenizer: Tokenizer, problems: list[Problem]) -> None:
    """The steps, but not the line ends between them."""
    tokenizer = either_tokenizer
    example = encode_problem(tokenizer, problems[3], WRITES, "equations")
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


# Where the number of an answer stands

ANSWERS = ["10", "4.5", "-3", "1000000", "0.05", "7/8", "12:30", "$5"]


@pytest.mark.parametrize("mark", ["####", "The answer is:", "#### $"])
@pytest.mark.parametrize("answer", ANSWERS)
def test_the_number_begins_where_it_is_said_to(
    either_tokenizer: Tokenizer, make_problem: MakeProblem, answer: str, mark: str
) -> None:
    """The tokens before hold none of it, byte for byte; the token there does, be it with a blank before."""
    tokenizer = either_tokenizer
    answers = AnswerFormat(thinks=True, answer_mark=mark)
    example = encode_problem(tokenizer, make_problem("How many?", "", answer), answers, "none")
    pieces = tokenizer.encoding.decode_tokens_bytes(example.answer.ids[:-1])
    assert b"".join(pieces) == f"{mark} {answer}".encode()
    before, first = b"".join(pieces[: example.number_at]).decode(), pieces[example.number_at].decode()
    assert before in (f"{mark} ", mark)
    assert first.lstrip(" ") != ""
    assert f"{mark} {answer}".startswith(before + first)
    assert answer.startswith(first.lstrip(" "))


def test_what_precedes_a_number_is_the_same_for_every_number(
    either_tokenizer: Tokenizer, make_problem: MakeProblem
) -> None:
    """So all answers to a question can be compared from there on."""
    examples = [encode_problem(either_tokenizer, make_problem("?", "", n), WRITES, "none") for n in ("10", "4.5", "7")]
    assert len({example.number_at for example in examples}) == 1
    assert len({tuple(example.answer.ids[: example.number_at]) for example in examples}) == 1
    numbers = [either_tokenizer.decode(example.answer.ids[example.number_at :]).strip() for example in examples]
    assert numbers == ["10", "4.5", "7"]


def test_an_answer_without_a_number(either_tokenizer: Tokenizer, make_problem: MakeProblem) -> None:
    """Nothing of it begins before the end token."""
    example = encode_problem(either_tokenizer, make_problem("?", "", ""), WRITES, "none")
    assert example.answer.ids[example.number_at :] == [either_tokenizer.end_id]
