"""How a problem is written for the model: the one place where text becomes token ids.

written:  question "\\n" rationale "\\n#### " answer <|end|>
latent:   question <|bot|> z_1 .. z_K <|eot|> [steps that are still written] "#### " answer <|end|>

A tokenizer with a token to begin prompts with has it before the question.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Literal, TypeVar

from simcot_latent.data.problem import ANSWER_MARK, Problem
from simcot_latent.data.tokenizer import Tokenizer

Rationale = Literal["natural", "equations", "none"]

T = TypeVar("T")


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
    """

    question: list[int]
    rationale: TaggedIds
    steps: list[TaggedIds]
    answer: TaggedIds

    @property
    def length(self) -> int:
        """Tokens of the written form, which no other form of the same problem exceeds by more than its thoughts."""
        return len(self.question) + len(self.rationale) + len(self.answer)


def encode_question(tokenizer: Tokenizer, question: str, *, thinks: bool, end: str = "") -> list[int]:
    """The prompt: the question and `end`, then `<|bot|>` for a model that thinks, a newline for one that writes."""
    begin = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    ids = begin + tokenizer.encode(question.strip() + end)
    return ids + ([tokenizer.bot_id] if thinks else tokenizer.encode("\n"))


def encode_problem(
    tokenizer: Tokenizer,
    problem: Problem,
    *,
    thinks: bool,
    rationale: Rationale,
    question_end: str = "",
    answer_mark: str = ANSWER_MARK,
) -> Example:
    """A problem in token ids.

    Args:
        thinks: whether it is to be thought about, not written.
        rationale: what a written solution is: natural text, its steps only, or nothing but the answer.
        question_end: text between the question and what follows.
        answer_mark: text before the answer.
    """
    newline = untagged(tokenizer.encode("\n"))
    steps = [encode_step(tokenizer, step.text) for step in problem.steps]
    if rationale == "none":
        written = untagged([])
    elif rationale == "equations":
        written = lines(steps, newline)
    else:
        spans = [(step.start, step.end) for step in problem.steps]
        text = TaggedIds(*tokenizer.encode_with_spans(problem.rationale, spans))
        written = lines([text], newline)
    answer_ids = tokenizer.encode(f"{answer_mark} {problem.answer}")
    return Example(
        question=encode_question(tokenizer, problem.question, thinks=thinks, end=question_end),
        rationale=written,
        steps=steps,
        answer=untagged([*answer_ids, tokenizer.end_id]),
    )


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


def lines(parts: Iterable[TaggedIds], newline: TaggedIds) -> TaggedIds:
    """Parts on a line each."""
    return concatenate(chain.from_iterable((part, newline) for part in parts))


def align_steps(steps: Sequence[T], answer: T, groups: int, *, surplus: str, missing: str) -> list[list[T] | None]:
    """Which steps each of `groups` thought groups is to be decoded into; None: it is taught nothing.

    Args:
        steps: the problem's steps, in order.
        answer: what a group without a step is taught where `missing` is "answer" (Coconut flavour of SIM-CoT);
            with "mask" it is taught nothing (CODI flavour).
        surplus: "merge" adds the steps beyond the last group to it (both flavours), "drop" leaves them out.

    Source: https://arxiv.org/abs/2509.20317, section 4, and its published code.
    """
    targets: list[list[T] | None] = [[step] for step in steps[:groups]]
    if len(steps) > groups and surplus == "merge":
        targets[-1] = list(steps[groups - 1 :])
    return targets + [[answer] if missing == "answer" else None] * (groups - len(targets))
