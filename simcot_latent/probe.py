"""Thoughts into text: what each thought says, whether that is right, and how sure the decoder is.

Command: python -m simcot_latent.probe ckpt=DIR question="..."     (or data=... limit=N)
Python:  think, decode_steps, probe_problems

Shapes: B questions, K thoughts, G step groups, C thoughts a group, N = B * G, D width.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from einops import rearrange
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import Tensor

from simcot_latent.checkpoint import Checkpoint, load_checkpoint, require_decoder, setting
from simcot_latent.config import require_choices, require_tolerance, typed
from simcot_latent.data.batch import to_device
from simcot_latent.data.format import align_steps
from simcot_latent.data.problem import Problem, same_number
from simcot_latent.data.tokenizer import LONE_SURROGATE
from simcot_latent.distributed import autocast, pick_device, pick_dtype
from simcot_latent.errors import UserError, require
from simcot_latent.generate import Generation, encode_prompts, generate, think_about
from simcot_latent.logs import make_console, track
from simcot_latent.metrics import score_steps, steps_are_right, wilson_interval
from simcot_latent.model.cache import KVCache
from simcot_latent.model.step_decoder import PackedSteps
from simcot_latent.model.thoughts import Thoughts
from simcot_latent.paths import check_writable, write_text

if TYPE_CHECKING:
    from omegaconf import DictConfig


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
    tolerance: float | None = None
    device: str = "auto"
    dtype: str = "float32"
    out: str | None = None

    def __post_init__(self) -> None:
        if self.ckpt is None:
            raise UserError("ckpt is missing; give ckpt=DIR, a folder that training wrote, such as runs/latent/latest")
        if (self.question is None) == (self.data is None):
            raise UserError('give either question="..." or data=NAME (with data.path=, limit=)')
        if self.question is not None and (half := LONE_SURROGATE.search(self.question)):
            raise UserError(f"question: its character {half.start() + 1} is U+{ord(half[0]):04X}, which is no text")
        require_choices(self, "probe")
        require_tolerance("tolerance", self.tolerance)
        require(self.limit >= 1, "limit", self.limit, "at least 1")
        require(self.batch_size >= 1, "batch_size", self.batch_size, "at least 1")


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
        return Thoughts(torch.empty(0, thoughts.n_states, model.config.n_embd, device=checkpoint.device), KVCache(0))
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
    found = v_information(checkpoint, latents_BKD, problems, batch_size=batch_size, console=console)
    probes = []
    for i in track(starts, "decoding", console, sizes):
        rows = slice(i, i + batch_size)
        decoded = chain.from_iterable(decode_groups(checkpoint, latents_BKD[rows]))
        forced = teacher_forced(checkpoint, latents_BKD[rows], gold[rows])
        groups = map(score_group, decoded, chain.from_iterable(gold[rows]), forced)
        for row, problem in enumerate(problems[rows], start=i):
            its_groups = [
                replace(
                    group,
                    taught_answer=group.gold is not None and not holds_step(problem, g),
                    **found[row, g]._asdict() if (row, g) in found else {},
                )
                for g, group in enumerate(islice(groups, checkpoint.thoughts.groups))
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


def holds_step(problem: Problem, group: int) -> bool:
    """Whether a group (0, 1, ...) that is taught something is taught a step, not the answer for want of one."""
    return group < len(problem.steps)


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


DONORS = 64
"""Problems whose thoughts a step is scored with for its V-information, its own among them: it is at most 6 bits."""


class VInformation(NamedTuple):
    """Pointwise V-information of a group's thoughts about its step, and the most it can be, both in bits."""

    v_information: float
    v_information_bound: float


@torch.no_grad()
def v_information(
    checkpoint: Checkpoint,
    latents_BKD: Tensor,
    problems: Sequence[Problem],
    rows: Sequence[int] | None = None,
    batch_size: int = 32,
    console: Console | None = None,
) -> dict[tuple[int, int], VInformation]:
    """How much the thoughts tell the decoder about each gold step, in bits:

        log2 p(y | z_own) - log2 mean_j p(y | z_j)

    Pointwise V-information (Ethayarajh et al. 2022, https://arxiv.org/abs/2110.08420, after Xu et al. 2020,
    https://arxiv.org/abs/2002.10689), where what a decoder knows without the thoughts is its mean over problems that
    hold a step in the same group: up to `DONORS` of them, the own one among them. So it is at most log2 of their
    number, and 0 for a decoder that does not read the thoughts. Which ones is settled by the questions' texts, whatever
    their order and the batches: all problems of a group stand in a circle by a digest, and each takes those that follow
    it.

    Args:
        latents_BKD: the thoughts about `problems`.
        rows: the problems to score; None: all. Donors are of all problems in any case.
        batch_size: problems at once.
        console: where to show progress; None: nowhere.

    Returns:
        By problem and group; without the groups that hold no step, or that hold one in a single problem.
    """
    decoder, tokenizer, c = require_decoder(checkpoint), checkpoint.tokenizer, checkpoint.thoughts.latents_per_step
    G = checkpoint.thoughts.groups
    gold = [gold_groups(checkpoint, problem) for problem in problems]
    wanted = set(range(len(problems)) if rows is None else rows)
    circle = sorted(range(len(problems)), key=lambda row: (_digest(problems[row].question), row))
    pairs: list[tuple[int, int, int]] = []  # row and group of a step, and the row whose thoughts it is scored with
    for group in range(G):
        members = [row for row in circle if gold[row][group] is not None and holds_step(problems[row], group)]
        n = min(DONORS, len(members))
        if n > 1:
            twice = [*members, *members]  # the own problem comes first
            pairs += [(row, group, j) for i, row in enumerate(members) if row in wanted for j in twice[i : i + n]]
    ids = {(row, group): tokenizer.encode(gold[row][group] or "") for row, group, _ in pairs}
    groups_NCD = group_prefix(checkpoint, latents_BKD)
    nats: dict[tuple[int, int], list[float]] = {}
    starts = range(0, len(pairs), batch_size * G)
    for start in track(starts, "V-information", console or make_console(is_main=False)):
        batch = pairs[start : start + batch_size * G]
        steps = PackedSteps.of([ids[row, group] for row, group, _ in batch], tokenizer.end_id, c)
        steps = to_device(steps, latents_BKD.device)
        prefix_NCD = groups_NCD[torch.tensor([j * G + group for _, group, j in batch], device=latents_BKD.device)]
        nll_M = decoder.score(prefix_NCD, steps).nll_M
        nats_N = torch.zeros(len(batch), device=latents_BKD.device).index_add(0, steps.group_M, nll_M)
        for (row, group, _), value in zip(batch, nats_N.tolist(), strict=True):
            nats.setdefault((row, group), []).append(value)
    return {key: _v_information(values) for key, values in nats.items()}


def _v_information(nats: Sequence[float]) -> VInformation:
    """From the code lengths of a step with the thoughts of each problem, the own one's first."""
    ratios = torch.tensor(nats, dtype=torch.float64).sub(nats[0]).neg()  # log p(y | z_j) - log p(y | z_own)
    bound = math.log2(len(nats))
    return VInformation(bound - torch.logsumexp(ratios, 0).item() / math.log(2), bound)


def _digest(text: str) -> bytes:
    return hashlib.blake2b(text.encode(errors="surrogatepass"), digest_size=16).digest()


def text_entropy(texts: Sequence[str]) -> float:
    """Entropy in bits of the texts as they are distributed here: what there is to know about one of them."""
    return sum(count / len(texts) * math.log2(len(texts) / count) for count in Counter(texts).values())


def summarise(probes: Sequence[QuestionProbe], tolerance: float = 0.0) -> dict[str, Any]:
    """Step scores over all groups with a step, and by step index (the first step is 1); groups that were taught the
    answer apart; answers alongside.

    Args:
        tolerance: of answers, see `same_number`. Steps are compared exactly.
    """
    taught = [(i, g) for probe in probes for i, g in enumerate(probe.groups, start=1) if g.gold is not None]
    scored = [(i, g) for i, g in taught if not g.taught_answer]
    indices = sorted({i for i, _ in scored})
    by_step = {str(i): summarise_groups([g for j, g in scored if i == j]) for i in indices}
    summary: dict[str, Any] = {"n": len(probes), "all": summarise_groups([g for _, g in scored]), "by_step": by_step}
    if scored:  # which step it is is known, so what there is to know is the mean of the steps' entropies
        summary["all"]["text_entropy"] = sum(s["n"] * s["text_entropy"] for s in by_step.values()) / len(scored)
    summary["answer_groups"] = summarise_groups([g for _, g in taught if g.taught_answer])
    for key in ("operators", "operands", "result", "right", *VInformation._fields, "text_entropy"):
        summary["answer_groups"].pop(key, None)  # of steps
    correct = sum(same_number(probe.answer, probe.gold_answer, tolerance) for probe in probes)
    summary["accuracy"] = correct / len(probes)
    summary["ci95"] = list(wilson_interval(correct, len(probes)))
    summary["tolerance"] = tolerance
    return summary


def summarise_groups(groups: Sequence[GroupProbe]) -> dict[str, Any]:
    """Means over groups that have gold."""
    n = len(groups)
    if n == 0:
        return {"n": 0}
    exact = sum(bool(g.exact) for g in groups)
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
        "v_information": _mean([g.v_information for g in groups]),
        "v_information_bound": _mean([g.v_information_bound for g in groups]),
        "text_entropy": text_entropy([g.gold or "" for g in groups]),
    }


def _mean(values: Sequence[float | None]) -> float | None:
    """Of those that are there; None where none is."""
    found = [value for value in values if value is not None]
    return sum(found) / len(found) if found else None


def show(text: str) -> str:
    """A group's text in a table cell: steps on one line, an endless one cut."""
    text = text.replace("\n", " ")
    return text if len(text) <= 60 else text[:57] + "..."


def probe_table(probes: Sequence[QuestionProbe], tolerance: float = 0.0) -> Table:
    """A row a step group, a block a question; `tolerance` as in `summarise`."""
    with_gold = any(probe.gold_answer is not None for probe in probes)
    table = Table("question", "thought", "decoded step", "right", "probability", *(["gold"] if with_gold else []))
    table.columns[0].max_width = 60
    for probe in probes:
        for i, group in enumerate(probe.groups, start=1):
            right = {True: "yes", False: "no", None: "-"}[group.right]
            cells = [probe.question if i == 1 else "", str(i), show(group.decoded), right, f"{group.probability:.3f}"]
            table.add_row(*map(Text, cells + ([show(group.gold or "-")] if with_gold else [])))
        right = "yes" if same_number(probe.answer, probe.gold_answer, tolerance) else "no"
        gold = [f"#### {probe.gold_answer}"] if with_gold else []
        cells = ["", "answer", probe.answer or "(none)", right if with_gold else "", "", *gold]
        table.add_row(*map(Text, cells), end_section=True)
    return table


def summary_table(summary: dict[str, Any]) -> Table:
    """Scores in rows; by step index, over all steps, and of groups that were taught the answer in columns."""
    rows = [
        ("exact", "exact match"),
        ("operators", "operators"),
        ("operands", "operands"),
        ("result", "result"),
        ("right", "arithmetically right"),
        ("probability", "probability"),
        ("forced_token_accuracy", "tokens, teacher-forced"),
        ("gold_probability", "probability of gold"),
        ("v_information", "V-information, bits"),
        ("v_information_bound", "... at most"),
        ("text_entropy", "entropy of gold, bits"),
    ]
    columns = {f"step {name}": scores for name, scores in summary["by_step"].items()} | {"all steps": summary["all"]}
    if summary["answer_groups"]["n"]:
        columns["answers"] = summary["answer_groups"]
    table = Table("thoughts decoded", *columns)
    table.add_row("n", *[str(scores["n"]) for scores in columns.values()])
    for key, title in rows:
        found = [scores.get(key) for scores in columns.values()]
        table.add_row(title, *["-" if value is None else f"{value:.3f}" for value in found])
    return table


def main(raw: DictConfig) -> None:
    """Probes one question, or problems of a data source."""
    from simcot_latent import cli  # hydra, which probing from Python does without

    config = typed(ProbeConfig, raw)
    tolerance = 0.0
    console = make_console()
    device = pick_device(config.device)
    file = None if config.out is None else Path(config.out) / "probe.json"
    if file is not None:
        check_writable([file], "give another out=DIR")
    checkpoint = load_checkpoint(config.ckpt or "", device, verify=config.verify)
    require_decoder(checkpoint)
    with torch.no_grad(), autocast(device, pick_dtype(config.dtype, device)):
        if config.question is not None:
            probes, summary = probe_questions(checkpoint, [config.question]), None
        else:
            quiet = make_console(is_main=config.format == "table")
            problems, source, _ = cli.trained_problems(raw, checkpoint, config.split, config.limit, quiet)  # type: ignore[arg-type]
            tolerance = cli.choose_tolerance(config.tolerance, source)
            probes = probe_problems(checkpoint, problems, config.batch_size, quiet)
            summary = summarise(probes, tolerance)
    text = json.dumps({"probes": [asdict(probe) for probe in probes], "summary": summary}, indent=2)
    if file is not None:
        write_text(file, text + "\n")
    if config.format == "json":
        print(text)
        return
    console.print(probe_table(probes, tolerance))
    if file is not None:
        console.print(f"written to {file}")
    if summary is not None:
        console.print(summary_table(summary))
        low, high = summary["ci95"]
        within = f", within {tolerance:g} of gold" if tolerance else ""
        text = f"{summary['accuracy']:.1%} of {summary['n']} (95% interval {low:.1%} to {high:.1%})"
        console.print(f"answers: {text}{within}")


if __name__ == "__main__":
    from simcot_latent import cli

    cli.run(main, "probe")
