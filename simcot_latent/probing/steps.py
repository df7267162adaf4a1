"""What thoughts decode to against the gold steps: right or wrong, and how sure the decoder is.

Shapes: B questions, K thoughts, D width; N groups that are scored, M labels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from itertools import chain, islice
from typing import NamedTuple

import torch
from rich.console import Console
from torch import Tensor

from simcot_latent.checkpoint import Checkpoint
from simcot_latent.checkpoint_config import setting
from simcot_latent.data.problem import Problem
from simcot_latent.generate import Generation, generate
from simcot_latent.logs import make_console, track
from simcot_latent.metrics import score_steps, steps_are_right
from simcot_latent.probing.information import v_information
from simcot_latent.probing.readers import step_reader
from simcot_latent.probing.thoughts import (
    decode_states,
    gold_groups,
    require_thoughts,
    states_of,
    think,
)
from simcot_latent.terms.steps import holds_step


@dataclass(frozen=True)
class GroupProbe:
    """One step group of one question.

    Attributes:
        decoded: what its thoughts decode to, free-running.
        right: whether that is arithmetically right; None where it holds no step.
        probability: what the decoder gives to the whole of it.
        gold: what it was to say; None where nothing was taught or there is no gold solution.
        taught_answer: whether that is the answer, since the problem has no step for this group.
        exact, operators, operands, result: `decoded` against `gold`, see `StepScore`.
        forced_token_accuracy: share of gold tokens that are most likely after the gold tokens before them.
        gold_probability: what the decoder gives to the whole of `gold`.
        v_information: how many bits the thoughts tell the decoder about `gold`, at most `v_information_bound`; see
            `v_information`. None where `gold` is no step, or no other problem has a step in this group.
    """

    decoded: str
    right: bool | None
    probability: float
    gold: str | None = None
    taught_answer: bool = False
    exact: bool | None = None
    operators: bool | None = None
    operands: bool | None = None
    result: bool | None = None
    forced_token_accuracy: float | None = None
    gold_probability: float | None = None
    v_information: float | None = None
    v_information_bound: float | None = None


@dataclass(frozen=True)
class QuestionProbe:
    """A question, its groups, the model's answer and the gold one."""

    question: str
    groups: list[GroupProbe]
    answer: str
    gold_answer: str | None = None


def probe_questions(checkpoint: Checkpoint, questions: Sequence[str]) -> list[QuestionProbe]:
    """Questions without gold solutions: what their thoughts say, and the answers."""
    generations, states_BKD = _answer(checkpoint, questions)
    return [
        QuestionProbe(question, [GroupProbe(text, steps_are_right(text), p) for text, p in groups], generation.answer)
        for question, groups, generation in zip(
            questions, decode_states(checkpoint, states_BKD), generations, strict=True
        )
    ]


def _answer(checkpoint: Checkpoint, questions: Sequence[str]) -> tuple[list[Generation], Tensor]:
    """Answers to questions as one batch, and what the steps of their thoughts are read of (B, K, D)."""
    reader = step_reader(checkpoint)
    require_thoughts(checkpoint)
    generations = generate(checkpoint, questions, setting(checkpoint, "max_new_tokens"))
    if not generations:
        nothing_BKD = think(checkpoint, []).latents
        return generations, reader.states(nothing_BKD, nothing_BKD)
    return generations, states_of(checkpoint, generations)


def probe_problems(
    checkpoint: Checkpoint, problems: Sequence[Problem], batch_size: int = 32, console: Console | None = None
) -> list[QuestionProbe]:
    """Problems with gold solutions: as `probe_questions`, and each group against its gold steps.

    Args:
        batch_size: problems at once.
        console: where to show progress; None: nowhere.
    """
    if not problems:
        return []
    starts = range(0, len(problems), batch_size)
    sizes = [len(problems[i : i + batch_size]) for i in starts]
    console = console or make_console(is_main=False)
    answered = [
        _answer(checkpoint, [problem.question for problem in problems[i : i + batch_size]])
        for i in track(starts, "thinking", console, sizes)
    ]
    answers = [generation.answer for generations, _ in answered for generation in generations]
    states_BKD = torch.cat([latents for _, latents in answered])
    gold = [gold_groups(checkpoint, problem) for problem in problems]
    found = v_information(checkpoint, states_BKD, problems, batch_size=batch_size, console=console)
    probes = []
    for i in track(starts, "decoding", console, sizes):
        rows = slice(i, i + batch_size)
        decoded = chain.from_iterable(decode_states(checkpoint, states_BKD[rows]))
        forced = teacher_forced(checkpoint, states_BKD[rows], gold[rows])
        groups = map(score_group, decoded, chain.from_iterable(gold[rows]), forced)
        for row, problem in enumerate(problems[rows], start=i):
            its_groups = [
                replace(
                    group,
                    taught_answer=group.gold is not None and not holds_step(problem, g),
                    **found[row, g]._asdict() if (row, g) in found else {},
                )
                for g, group in enumerate(islice(groups, checkpoint.n_groups))
            ]
            probes.append(QuestionProbe(problem.question, its_groups, answers[row], problem.answer))
    return probes


def score_group(decoded: tuple[str, float], gold: str | None, forced: Forced | None) -> GroupProbe:
    """A group's decoded text and its probability against gold."""
    text, probability = decoded
    if gold is None or forced is None:
        return GroupProbe(text, steps_are_right(text), probability)
    return GroupProbe(
        text,
        steps_are_right(text),
        probability,
        gold,
        **asdict(score_steps(text, gold)),
        forced_token_accuracy=forced.token_accuracy,
        gold_probability=math.exp(-forced.nats),
    )


class Forced(NamedTuple):
    """A gold text as the decoder sees it, token by token after the gold tokens before: share that is most likely, and
    minus the log of the probability of the whole. The end token is included.
    """

    token_accuracy: float
    nats: float


def teacher_forced(
    checkpoint: Checkpoint, states_BKD: Tensor, gold: Sequence[Sequence[str | None]]
) -> list[Forced | None]:
    """Each group's gold text, group by group and row by row; None where there is none."""
    reader, tokenizer = step_reader(checkpoint), checkpoint.tokenizer
    texts = list(chain.from_iterable(gold))
    taught = [i for i, text in enumerate(texts) if text is not None]
    results: list[Forced | None] = [None] * len(texts)
    if not taught:
        return results
    ids = [tokenizer.encode(texts[i] or "") for i in taught]
    found = reader.score(reader.groups(states_BKD)[taught], ids)
    for i, accuracy, nats in zip(taught, found.token_accuracy_N.tolist(), found.nats_N.tolist(), strict=True):
        results[i] = Forced(accuracy, nats)
    return results
