"""Thoughts into text: what each thought says, whether that is right, and how sure the decoder is.

Command: python -m simcot_latent.probe ckpt=DIR question="..."     (or data=... limit=N)
Python:  think, decode_steps, probe_problems

Shapes: B questions, K thoughts, G step groups, C thoughts a group, N = B * G, D width.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import chain, islice
from typing import Any, NamedTuple

import torch
from einops import rearrange
from omegaconf import DictConfig
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import Tensor

from simcot_latent import cli
from simcot_latent.checkpoint import Checkpoint, load_checkpoint, require_decoder, setting
from simcot_latent.config import typed
from simcot_latent.data.batch import to_device
from simcot_latent.data.format import align_steps
from simcot_latent.data.problem import Problem, same_number
from simcot_latent.data.sources import SPLITS
from simcot_latent.distributed import autocast, pick_device, pick_dtype
from simcot_latent.errors import UserError, require, require_choice
from simcot_latent.generate import Generation, encode_prompts, generate, think_about
from simcot_latent.logs import make_console, track
from simcot_latent.metrics import score_steps, steps_are_right, wilson_interval
from simcot_latent.model.cache import KVCache
from simcot_latent.model.step_decoder import PackedSteps
from simcot_latent.model.thoughts import Thoughts, others_thoughts


@dataclass
class ProbeConfig:
    """Keys of `configs/probe.yaml`."""

    data: dict[str, Any] | None = None
    ckpt: str | None = None
    verify: bool = True
    question: str | None = None
    split: str = "test"
    limit: int = 20
    batch_size: int = 32
    format: str = "table"
    device: str = "auto"
    dtype: str = "float32"

    def __post_init__(self) -> None:
        if self.ckpt is None:
            raise UserError("ckpt is missing; give ckpt=DIR, a folder that training wrote, such as runs/latent/latest")
        if (self.question is None) == (self.data is None):
            raise UserError('give either question="..." or data=NAME (with data.path=, limit=)')
        require_choice("split", self.split, SPLITS)
        require(self.limit >= 1, "limit", self.limit, "at least 1")
        require(self.batch_size >= 1, "batch_size", self.batch_size, "at least 1")
        require_choice("format", self.format, ("table", "json"))
        require_choice("dtype", self.dtype, ("auto", "float32", "bfloat16"))


MAX_STEP_TOKENS = 128
"""Where free-running decoding of a group gives up; merged steps of GSM8K stay under it."""


@dataclass(frozen=True)
class GroupProbe:
    """One step group of one question.

    Attributes:
        decoded: what its thoughts decode to, free-running.
        right: whether that is arithmetically right; None where it holds no step.
        probability: what the decoder gives to the whole of it.
        gold: what it was to say; None where nothing was taught or there is no gold solution.
        exact, operators, operands, result: `decoded` against `gold`, see `StepScore`.
        forced_token_accuracy: share of gold tokens that are most likely after the gold tokens before them.
        gold_probability: what the decoder gives to the whole of `gold`.
        bits: what the thoughts say about `gold`, log2 of that probability over the one with another problem's thoughts
            (see `others_thoughts`); None where no other problem has such a group.
    """

    decoded: str
    right: bool | None
    probability: float
    gold: str | None = None
    exact: bool | None = None
    operators: bool | None = None
    operands: bool | None = None
    result: bool | None = None
    forced_token_accuracy: float | None = None
    gold_probability: float | None = None
    bits: float | None = None


@dataclass(frozen=True)
class QuestionProbe:
    """A question, its groups, the model's answer and the gold one."""

    question: str
    groups: list[GroupProbe]
    answer: str
    gold_answer: str | None = None


@torch.no_grad()
def think(checkpoint: Checkpoint, questions: Sequence[str]) -> Thoughts:
    """The thoughts about some questions, as one batch: `.latents` is (B, K, D).

    Raises:
        UserError: the model does not think, or a question is empty or does not fit the context.
    """
    model, thoughts = checkpoint.model, checkpoint.thoughts
    _require_thoughts(checkpoint)
    prompts = encode_prompts(model, checkpoint.tokenizer, thoughts, questions)
    if not prompts:
        return Thoughts(torch.empty(0, thoughts.n_latents, model.config.n_embd, device=checkpoint.device), KVCache(0))
    return think_about(model, thoughts, prompts)


def _require_thoughts(checkpoint: Checkpoint) -> None:
    if checkpoint.thoughts.n_latents == 0:
        raise UserError(f"{checkpoint.path}: this model writes its steps and has no thoughts; use one of mode=latent")


def latents_of(generations: Sequence[Generation]) -> Tensor:
    """The thoughts (B, K, D) that answers (at least one) of a model that thinks came from."""
    return torch.stack([g.latents_KD for g in generations if g.latents_KD is not None])


def decode_steps(checkpoint: Checkpoint, thoughts: Thoughts | Tensor) -> list[list[str]]:
    """What thoughts say: for each question one string a step group, free-running.

    Args:
        thoughts: from `think`, or latents (B, K, D) of your own.

    Raises:
        UserError: the checkpoint has no decoder.
    """
    return [[text for text, _ in groups] for groups in decode_groups(checkpoint, thoughts)]


def decode_groups(checkpoint: Checkpoint, thoughts: Thoughts | Tensor) -> list[list[tuple[str, float]]]:
    """As `decode_steps`, each text with its probability."""
    latents_BKD = thoughts if isinstance(thoughts, Tensor) else thoughts.latents
    decoded = _decode(checkpoint, group_prefix(checkpoint, latents_BKD))
    G = checkpoint.thoughts.groups
    return [decoded[i : i + G] for i in range(0, len(decoded), G)]


def decode_taught(checkpoint: Checkpoint, latents_BKD: Tensor, gold: Sequence[Sequence[str | None]]) -> list[list[str]]:
    """As `decode_steps`, of the groups with gold alone; the others, which may ramble on, are left empty."""
    taught_N = torch.tensor([text is not None for groups in gold for text in groups], device=latents_BKD.device)
    decoded = iter(_decode(checkpoint, group_prefix(checkpoint, latents_BKD)[taught_N]))
    return [["" if text is None else next(decoded)[0] for text in groups] for groups in gold]


def _decode(checkpoint: Checkpoint, prefix_NCD: Tensor) -> list[tuple[str, float]]:
    """What each step group's thoughts say, free-running, and its probability."""
    decoder, tokenizer = require_decoder(checkpoint), checkpoint.tokenizer
    ids, probabilities = decoder.decode(prefix_NCD, tokenizer.end_id, MAX_STEP_TOKENS)
    return list(zip(map(tokenizer.decode, ids), probabilities, strict=True))


def group_prefix(checkpoint: Checkpoint, latents_BKD: Tensor) -> Tensor:
    """Thoughts cut into the step groups that the decoder reads, (N, C, D)."""
    return rearrange(latents_BKD, "b (g c) d -> (b g) c d", c=checkpoint.thoughts.latents_per_step)


def probe_questions(checkpoint: Checkpoint, questions: Sequence[str]) -> list[QuestionProbe]:
    """Questions without gold solutions: what their thoughts say, and the answers."""
    generations, latents_BKD = _answer(checkpoint, questions)
    return [
        QuestionProbe(question, [GroupProbe(text, steps_are_right(text), p) for text, p in groups], generation.answer)
        for question, groups, generation in zip(
            questions, decode_groups(checkpoint, latents_BKD), generations, strict=True
        )
    ]


def _answer(checkpoint: Checkpoint, questions: Sequence[str]) -> tuple[list[Generation], Tensor]:
    """Answers to questions as one batch, and the thoughts (B, K, D) that they came from."""
    require_decoder(checkpoint)
    _require_thoughts(checkpoint)
    model, limit = checkpoint.model, setting(checkpoint, "max_new_tokens")
    generations = generate(model, checkpoint.tokenizer, checkpoint.thoughts, questions, limit)
    return generations, latents_of(generations) if generations else think(checkpoint, []).latents


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
    latents_BKD = torch.cat([latents for _, latents in answered])
    gold = [gold_groups(checkpoint, problem) for problem in problems]
    others_BKD, exchanged_BG = others_thoughts(latents_BKD, taught_groups(gold).to(latents_BKD.device))
    probes = []
    for i in track(starts, "decoding", console, sizes):
        rows = slice(i, i + batch_size)
        decoded = chain.from_iterable(decode_groups(checkpoint, latents_BKD[rows]))
        own = teacher_forced(checkpoint, latents_BKD[rows], gold[rows])
        others = teacher_forced(checkpoint, others_BKD[rows], gold[rows])
        bits = bits_said(own, others, exchanged_BG[rows])
        groups = map(score_group, decoded, chain.from_iterable(gold[rows]), own, bits)
        for problem, answer in zip(problems[rows], answers[rows], strict=True):
            its_groups = list(islice(groups, checkpoint.thoughts.groups))
            probes.append(QuestionProbe(problem.question, its_groups, answer, problem.answer))
    return probes


def score_group(decoded: tuple[str, float], gold: str | None, forced: Forced | None, bits: float | None) -> GroupProbe:
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
        bits=bits,
    )


def gold_groups(checkpoint: Checkpoint, problem: Problem) -> list[str | None]:
    """What each group of a problem was taught to say, as text."""
    latent, groups = setting(checkpoint, "latent"), checkpoint.thoughts.groups
    steps = [step.text for step in problem.steps]
    if checkpoint.thoughts.n_latents < latent["n_latents"]:
        steps = steps[:groups]  # in an early stage the later steps are still written
    aligned = align_steps(
        steps,
        f"{checkpoint.thoughts.answer_mark} {problem.answer}",
        groups,
        surplus=latent["surplus"],
        missing=latent["missing"],
    )
    return [None if group is None else "\n".join(group) for group in aligned]


class Forced(NamedTuple):
    """A gold text as the decoder sees it, token by token after the gold tokens before: share that is most likely, and
    minus the log of the probability of the whole. The end token is included.
    """

    token_accuracy: float
    nats: float


def teacher_forced(
    checkpoint: Checkpoint, latents_BKD: Tensor, gold: Sequence[Sequence[str | None]]
) -> list[Forced | None]:
    """Each group's gold text, group by group and row by row; None where there is none."""
    decoder, tokenizer = require_decoder(checkpoint), checkpoint.tokenizer
    texts = list(chain.from_iterable(gold))
    taught = [i for i, text in enumerate(texts) if text is not None]
    results: list[Forced | None] = [None] * len(texts)
    if not taught:
        return results
    ids = [tokenizer.encode(texts[i] or "") for i in taught]
    steps = PackedSteps.of(ids, tokenizer.end_id, checkpoint.thoughts.latents_per_step)
    steps = to_device(steps, latents_BKD.device)
    found = decoder.score(group_prefix(checkpoint, latents_BKD)[taught], steps)
    zero_N = torch.zeros(len(taught), device=latents_BKD.device)
    labels_N = zero_N.index_add(0, steps.group_M, torch.ones_like(found.nll_M))
    accuracy_N = zero_N.index_add(0, steps.group_M, found.correct_M.float()) / labels_N
    nats_N = zero_N.index_add(0, steps.group_M, found.nll_M)
    for i, accuracy, nats in zip(taught, accuracy_N.tolist(), nats_N.tolist(), strict=True):
        results[i] = Forced(accuracy, nats)
    return results


def taught_groups(gold: Sequence[Sequence[str | None]]) -> Tensor:
    """Which groups are taught something (B, G)."""
    return torch.tensor([[text is not None for text in groups] for groups in gold])


def bits_said(
    own: Sequence[Forced | None], others: Sequence[Forced | None], exchanged_BG: Tensor
) -> list[float | None]:
    """`GroupProbe.bits` of each group, from gold as read from its own and from another problem's thoughts.

    Args:
        exchanged_BG: of `others_thoughts`.
    """
    return [
        (b.nats - a.nats) / math.log(2) if exchanged and a is not None and b is not None else None
        for a, b, exchanged in zip(own, others, exchanged_BG.flatten().tolist(), strict=True)
    ]


def summarise(probes: Sequence[QuestionProbe]) -> dict[str, Any]:
    """Step scores over all taught groups, and by step index (the first step is 1); answers alongside."""
    scored = [(i, g) for probe in probes for i, g in enumerate(probe.groups, start=1) if g.gold is not None]
    indices = sorted({i for i, _ in scored})
    summary: dict[str, Any] = {"n": len(probes), "all": summarise_groups([g for _, g in scored])}
    summary["by_step"] = {str(i): summarise_groups([g for j, g in scored if i == j]) for i in indices}
    correct = sum(same_number(probe.answer, probe.gold_answer) for probe in probes)
    summary["accuracy"] = correct / len(probes)
    summary["ci95"] = list(wilson_interval(correct, len(probes)))
    return summary


def summarise_groups(groups: Sequence[GroupProbe]) -> dict[str, Any]:
    """Means over groups that have gold steps."""
    n = len(groups)
    if n == 0:
        return {"n": 0}
    exact = sum(bool(g.exact) for g in groups)
    bits = [g.bits for g in groups if g.bits is not None]
    return {
        "n": n,
        "exact": exact / n,
        "exact_ci95": list(wilson_interval(exact, n)),
        "operators": sum(bool(g.operators) for g in groups) / n,
        "operands": sum(bool(g.operands) for g in groups) / n,
        "result": sum(bool(g.result) for g in groups) / n,
        "right": sum(g.right is True for g in groups) / n,
        "probability": sum(g.probability for g in groups) / n,
        "forced_token_accuracy": sum(g.forced_token_accuracy or 0.0 for g in groups) / n,
        "gold_probability": sum(g.gold_probability or 0.0 for g in groups) / n,
        "bits": sum(bits) / len(bits) if bits else None,
    }


def show(text: str) -> str:
    """A group's text in a table cell: steps on one line, an endless one cut."""
    text = text.replace("\n", " ")
    return text if len(text) <= 60 else text[:57] + "..."


def probe_table(probes: Sequence[QuestionProbe]) -> Table:
    """A row a step group, a block a question."""
    with_gold = any(probe.gold_answer is not None for probe in probes)
    table = Table("question", "thought", "decoded step", "right", "probability", *(["gold"] if with_gold else []))
    table.columns[0].max_width = 60
    for probe in probes:
        for i, group in enumerate(probe.groups, start=1):
            right = {True: "yes", False: "no", None: "-"}[group.right]
            cells = [probe.question if i == 1 else "", str(i), show(group.decoded), right, f"{group.probability:.3f}"]
            table.add_row(*map(Text, cells + ([show(group.gold or "-")] if with_gold else [])))
        right = "yes" if same_number(probe.answer, probe.gold_answer) else "no"
        gold = [f"#### {probe.gold_answer}"] if with_gold else []
        cells = ["", "answer", probe.answer or "(none)", right if with_gold else "", "", *gold]
        table.add_row(*map(Text, cells), end_section=True)
    return table


def summary_table(summary: dict[str, Any]) -> Table:
    """Scores over all step groups with gold steps, and by step index."""
    keys = [
        ("exact", "exact match"),
        ("operators", "operators"),
        ("operands", "operands"),
        ("result", "result"),
        ("right", "arithmetically right"),
        ("probability", "probability"),
        ("forced_token_accuracy", "tokens, teacher-forced"),
        ("gold_probability", "probability of gold"),
        ("bits", "bits said"),
    ]
    table = Table("step", "n", *[title for _, title in keys])
    for name, scores in [*summary["by_step"].items(), ("all", summary["all"])]:
        found = [scores.get(key) for key, _ in keys]
        table.add_row(name, str(scores["n"]), *["-" if value is None else f"{value:.3f}" for value in found])
    return table


def main(raw: DictConfig) -> None:
    """Probes one question, or problems of a data source."""
    config = typed(ProbeConfig, raw)
    console = make_console()
    device = pick_device(config.device)
    checkpoint = load_checkpoint(config.ckpt or "", device, verify=config.verify)
    require_decoder(checkpoint)
    with torch.no_grad(), autocast(device, pick_dtype(config.dtype, device)):
        if config.question is not None:
            probes, summary = probe_questions(checkpoint, [config.question]), None
        else:
            source, data = cli.trained_source(raw, checkpoint)
            problems = source.load(config.split).problems[: config.limit]  # type: ignore[arg-type]
            quiet = make_console(is_main=config.format == "table")
            if data.get("path") != raw.data.get("path"):
                quiet.print(f"data.path={data['path']}, as in training")
            probes = probe_problems(checkpoint, problems, config.batch_size, quiet)
            summary = summarise(probes)
    if config.format == "json":
        print(json.dumps({"probes": [asdict(probe) for probe in probes], "summary": summary}, indent=2))
        return
    console.print(probe_table(probes))
    if summary is not None:
        console.print(summary_table(summary))
        low, high = summary["ci95"]
        console.print(f"answers: {summary['accuracy']:.1%} of {summary['n']} (95% interval {low:.1%} to {high:.1%})")


if __name__ == "__main__":
    cli.run(main, "probe")
