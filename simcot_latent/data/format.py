"""How a problem is written for the model: the one place where text becomes token ids, the wire format.

written:  question "\\n" rationale "\\n#### " answer <|end|>
latent:   question <|bot|> z_1 .. z_K <|eot|> [steps that are still written] "#### " answer <|end|>

A tokenizer with a token to begin prompts with has it before the question.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Literal

from simcot_latent.data.problem import ANSWER_MARK, Problem
from simcot_latent.data.tokenizer import Tokenizer
from simcot_latent.errors import require

Rationale = Literal["natural", "equations", "none"]

MAX_MARK = 1000
"""The most characters of the texts that stand around every answer; those of published models have at most 14."""


@dataclass(frozen=True)
class AnswerFormat:
    """What stands around a model's answers.

    Attributes:
        thinks: whether prompts end in `<|bot|>` and what follows begins after `<|eot|>`.
        question_end: text between the question and what follows.
        answer_mark: text that the number of an answer stands behind.
    """

    thinks: bool = False
    question_end: str = ""
    answer_mark: str = ANSWER_MARK

    def __post_init__(self) -> None:
        for key in ("question_end", "answer_mark"):
            length = len(getattr(self, key))  # each is a part of every answer's prompt or of its text
            require(length <= MAX_MARK, f"answers.{key}", f"({length:,} characters)", f"at most {MAX_MARK:,} long")

    def opening(self, tokenizer: Tokenizer) -> list[int]:
        """What the model reads between its prompt, or its thoughts, and the first token that it writes."""
        return [tokenizer.eot_id] if self.thinks else []

    def answer_line(self, answer: str) -> str:
        """The last line of a solution."""
        return f"{self.answer_mark} {answer}"


@dataclass(frozen=True, slots=True)
class TaggedIds:
    """Token ids, and for each whether it belongs to a calculator step."""

    ids: list[int]
    in_step: list[bool]

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True, slots=True)
class Example:
    """A problem in token ids.

    Attributes:
        question: the prompt up to where thinking or writing starts (see `encode_question`).
        rationale: the whole written solution, without the answer line.
        steps: each step by itself.
        answer: "#### answer" and the end token.
        number_at: which token of `answer` the number begins in.
    """

    question: list[int]
    rationale: TaggedIds
    steps: list[TaggedIds]
    answer: TaggedIds
    number_at: int = 0

    @property
    def length(self) -> int:
        """Tokens of the written form, which no other form of the same problem exceeds by more than its thoughts."""
        return len(self.question) + len(self.rationale) + len(self.answer)


def encode_question(tokenizer: Tokenizer, question: str, answers: AnswerFormat) -> list[int]:
    """The prompt: the question, then `<|bot|>` for a model that thinks, a newline for one that writes.

    Its last token is what a thought, or the first written token, is predicted from.
    """
    begin = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    ids = begin + tokenizer.encode(question.strip() + answers.question_end)
    return ids + ([tokenizer.bot_id] if answers.thinks else tokenizer.encode("\n"))


def encode_problem(tokenizer: Tokenizer, problem: Problem, answers: AnswerFormat, rationale: Rationale) -> Example:
    """A problem in token ids.

    Args:
        answers: what stands around the answer.
        rationale: what a written solution is: natural text, its steps only, or nothing but the answer.
    """
    steps = [encode_step(tokenizer, step.text) for step in problem.steps]
    if rationale == "none":
        written = untagged([])
    elif rationale == "equations":
        written = lines(steps, newline(tokenizer))
    else:
        spans = [(step.start, step.end) for step in problem.steps]
        text = TaggedIds(*tokenizer.encode_with_spans(problem.rationale, spans))
        written = lines([text], newline(tokenizer))
    line = answers.answer_line(problem.answer)
    answer_ids, is_number = tokenizer.encode_with_spans(line, [(len(line) - len(problem.answer), len(line))])
    return Example(
        question=encode_question(tokenizer, problem.question, answers),
        rationale=written,
        steps=steps,
        answer=untagged([*answer_ids, tokenizer.end_id]),
        number_at=is_number.index(True) if True in is_number else len(answer_ids),
    )


def newline(tokenizer: Tokenizer) -> TaggedIds:
    """What stands between two lines."""
    return untagged(tokenizer.encode("\n"))


def encode_step(tokenizer: Tokenizer, text: str) -> TaggedIds:
    """One step by itself."""
    return TaggedIds(*tokenizer.encode_with_spans(text, [(0, len(text))]))


def untagged(ids: list[int]) -> TaggedIds:
    """Token ids outside any step."""
    return TaggedIds(ids, [False] * len(ids))


def concatenate(parts: Iterable[TaggedIds]) -> TaggedIds:
    """Parts written one after the other."""
    parts = list(parts)
    return TaggedIds(
        list(chain.from_iterable(part.ids for part in parts)), list(chain.from_iterable(part.in_step for part in parts))
    )


def join(parts: Sequence[TaggedIds], separator: TaggedIds) -> TaggedIds:
    """Parts with a separator between them."""
    return concatenate(item for i, part in enumerate(parts) for item in ((separator, part) if i else (part,)))


def lines(parts: Iterable[TaggedIds], end: TaggedIds) -> TaggedIds:
    """Parts on a line each, all with the same end of line."""
    return concatenate(chain.from_iterable((part, end) for part in parts))
