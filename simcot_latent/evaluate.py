"""The one runner behind every eval: answers a data source's problems and writes a report.

`python -m evals.<name> ckpt=DIR` prints a table and writes a report and, beside it, one line per problem, into the
folder `evals` of the run (or of a checkpoint that is in none), or into `out`. See `reports` for their names.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.table import Table

from simcot_latent.checkpoint import Checkpoint, load_checkpoint
from simcot_latent.checkpoint_config import setting
from simcot_latent.config import require_choices, require_tolerance, typed
from simcot_latent.data.batch import by_length
from simcot_latent.data.format import encode_problem, newline
from simcot_latent.data.problem import Problem, last_number, parse_steps, same_number
from simcot_latent.distributed import autocast, pick_device, pick_dtype
from simcot_latent.errors import UserError, require
from simcot_latent.generate import Generation, Sampling, encode_prompts, generate
from simcot_latent.logs import make_console, track
from simcot_latent.loops.base import with_settings
from simcot_latent.metrics import score_steps, wilson_interval
from simcot_latent.model.cache import StaticCaches
from simcot_latent.model.linear import keep_weights_in
from simcot_latent.paths import check_writable, write_lines, write_text
from simcot_latent.probing.thoughts import decode_taught, gold_groups, states_of
from simcot_latent.reports import (
    ReportFiles,
    commit,
    hash_of_configuration,
    hash_of_problems,
    hash_of_weights,
    installed_version,
    report_files,
    results_folder,
)
from simcot_latent.terms.steps import holds_step
from simcot_latent.terms.text import written_solution

if TYPE_CHECKING:
    from omegaconf import DictConfig


@dataclass
class EvalConfig:
    """Keys of `configs/eval.yaml`.

    Attributes:
        data: another source of problems than the one that the eval is named after.
        ckpt: a checkpoint folder, or a run's `out_dir` (its `latest` is taken then); required.
        verify: compare the checkpoint's files with its manifest first.
        split: `train`, `validation` or `test`.
        limit: answer the first so many problems only; None: all.
        batch_size: questions per batch.
        max_new_tokens: most tokens of an answer, thoughts not counted; None: as in training.
        temperature: of sampling; 0: greedy.
        top_k: draw among the k most likely tokens; None: among all.
        seed: of sampling.
        loop_settings: settings of the thought loop that are to be others than in training, such as `{compression: 5}`,
            of those that a loop leaves free; None: none.
        tolerance: how far an answer may be from gold and still count as right, as a share of gold: `1e-6` for golds
            such as 0.6666666667; None: as the data state it (`data.tolerance`).
        device: as in training.
        cuda_graphs: on a GPU, replay a thought, and a written token, as one CUDA graph.
        dtype: `auto`, `float32` or `bfloat16`. With float32, answers are the same at any batch size.
        out: a folder for the results; None: `evals/` of the run, or of a checkpoint that is in none.
    """

    data: dict[str, Any] = field(default_factory=dict)
    ckpt: str | None = None
    verify: bool = True
    split: str = "test"
    limit: int | None = None
    batch_size: int = 32
    max_new_tokens: int | None = None
    temperature: float = 0.0
    top_k: int | None = None
    seed: int = 0
    loop_settings: dict[str, Any] | None = None
    tolerance: float | None = None
    device: str = "auto"
    cuda_graphs: bool = False
    dtype: str = "float32"
    out: str | None = None

    def __post_init__(self) -> None:
        if self.ckpt is None:
            raise UserError("ckpt is missing; give ckpt=DIR, a folder that training wrote, such as runs/latent/latest")
        require_choices(self, "eval")
        require(self.limit is None or self.limit >= 1, "limit", self.limit, "at least 1, or null for all")
        require(self.batch_size >= 1, "batch_size", self.batch_size, "at least 1")
        require(
            self.max_new_tokens is None or self.max_new_tokens >= 1, "max_new_tokens", self.max_new_tokens, "at least 1"
        )
        require_tolerance("tolerance", self.tolerance)


@dataclass(frozen=True)
class Prediction:
    """What became of one problem.

    Attributes:
        decoded: what each thought group decodes to ("" where nothing is to be decoded), or each written step.
        gold: what each is to be; None where there is nothing.
        tolerance: see `same_number`.
    """

    problem: Problem
    generation: Generation
    decoded: list[str]
    gold: list[str | None]
    tolerance: float = 0.0

    @property
    def correct(self) -> bool:
        """Strict: the number after `####`."""
        return same_number(self.generation.answer, self.problem.answer, self.tolerance)

    @property
    def correct_last_number(self) -> bool:
        """Lenient: the last number in the output."""
        return same_number(last_number(self.generation.text), self.problem.answer, self.tolerance)

    @property
    def steps(self) -> list[tuple[str, str]]:
        """For each group with gold steps, or each gold step of a written answer: what was decoded, and the gold."""
        return [(said, gold) for said, gold, is_step in self._groups if is_step]

    @property
    def answer_groups(self) -> list[tuple[str, str]]:
        """The same for each group that is taught the answer, for want of a step (`latent.missing=answer`)."""
        return [(said, gold) for said, gold, is_step in self._groups if not is_step]

    @property
    def _groups(self) -> list[tuple[str, str, bool]]:
        groups = zip(self.decoded, self.gold, strict=True)
        return [(s, g, holds_step(self.problem, i)) for i, (s, g) in enumerate(groups) if g is not None]


def run(name: str) -> None:
    """Command-line entry of the eval `name`, on the data source of the same name unless `data=` says otherwise."""
    if not any(argument.startswith("data=") for argument in sys.argv[1:]):
        sys.argv.insert(1, f"data={name}")
    from simcot_latent import cli  # hydra, which evaluating from Python does without

    cli.run(lambda raw: evaluate(name, raw), "eval")


def evaluate(name: str, raw: DictConfig) -> None:
    """Answers a split, prints the table, writes the report."""
    from simcot_latent import cli

    config = typed(EvalConfig, raw)
    console = make_console()
    device = pick_device(config.device)
    folder = Path(config.out) if config.out else results_folder(config.ckpt or "")
    hint = "give out=DIR, a folder for the results"
    check_writable(
        [folder / f"{name}.{config.split}.json"], hint
    )  # names are longer, but nothing is loaded for them yet
    checkpoint = load_checkpoint(config.ckpt or "", device, verify=config.verify)
    dtype = pick_dtype(config.dtype, device, checkpoint.model.config.n_embd)
    checkpoint.loop = with_settings(checkpoint.loop, config.loop_settings or {})
    problems, source, data = cli.trained_problems(raw, checkpoint, config.split, config.limit, console)  # type: ignore[arg-type]
    tolerance = cli.choose_tolerance(config.tolerance, source)

    torch.manual_seed(config.seed)
    sampling = Sampling(config.temperature, config.top_k)
    limit = config.max_new_tokens or setting(checkpoint, "max_new_tokens")
    decoding = {
        "max_new_tokens": limit,
        "temperature": config.temperature,
        "top_k": config.top_k,
        "seed": config.seed if config.temperature > 0 else None,
        "loop_settings": config.loop_settings,
        "tolerance": tolerance,
        "dtype": str(dtype).removeprefix("torch."),
    }
    hashes = {
        "weights_hash": hash_of_weights(checkpoint.path or Path()),
        "data_hash": hash_of_problems(problems),
    }
    files = report_files(folder, name, config.split, checkpoint.step, decoding, hashes.values())
    check_writable(files, hint)
    lengths = [len(ids) for ids in encode_prompts(checkpoint, [p.question for p in problems])]
    plan = by_length(lengths, config.batch_size)
    caches = StaticCaches(checkpoint.model.config.context_length) if config.cuda_graphs else None
    if config.cuda_graphs:
        keep_weights_in(checkpoint.model, dtype)
    predictions: dict[int, Prediction] = {}
    seconds = 0.0
    for batch in track(plan, f"{name} {config.split}", console, [len(batch) for batch in plan]):
        chosen = [problems[i] for i in batch]
        questions = [problem.question for problem in chosen]
        with torch.no_grad(), autocast(device, dtype):
            began = time.perf_counter()
            generations = generate(checkpoint, questions, limit, sampling, caches)
            seconds += time.perf_counter() - began
            decoded: list[list[str]] = [[] for _ in chosen]
            gold: list[list[str | None]] = [[] for _ in chosen]
            if checkpoint.reads_steps:
                gold = [gold_groups(checkpoint, problem) for problem in chosen]
                decoded = decode_taught(checkpoint, states_of(checkpoint, generations), gold)
            elif not checkpoint.stage.thoughts and setting(checkpoint, "rationale") != "none":
                left = [with_steps_left(checkpoint, problem) for problem in chosen]
                pairs = [written_steps(g.text, p) for g, p in zip(generations, left, strict=True)]
                decoded, gold = [said for said, _ in pairs], [wanted for _, wanted in pairs]
        for i, problem, generation, said, wanted in zip(batch, chosen, generations, decoded, gold, strict=True):
            predictions[i] = Prediction(problem, generation, said, wanted, tolerance)

    ordered = [predictions[i] for i in range(len(problems))]
    report = {
        **summarise(ordered),
        "seconds": seconds,
        "questions_per_s": len(ordered) / seconds,
        "eval": name,
        "split": config.split,
        "limit": config.limit,
        "data": data,
        "ckpt": str(checkpoint.path),
        "step": checkpoint.step,
        "train_seed": checkpoint.config.get("seed"),
        "config_hash": hash_of_configuration(checkpoint.config),
        **hashes,
        **decoding,
        "batch_size": config.batch_size,
        "device": str(device),
        "cuda_graphs": config.cuda_graphs,
        "version": installed_version(),
        "commit": commit(),
        "threads": torch.get_num_threads(),
        "torch": str(torch.__version__),
        "thoughts": checkpoint.stage.thoughts,
    }
    console.print(report_table(report))
    write_report(files, report, ordered)
    console.print(f"written to {files.report}")


def with_steps_left(checkpoint: Checkpoint, problem: Problem) -> Problem:
    """A problem with what is left of its solution where the model's stage removes tokens: the steps without a gap."""
    tokenizer, stage = checkpoint.tokenizer, checkpoint.stage
    if stage.removed == 0:
        return problem
    example = encode_problem(tokenizer, problem, checkpoint.answers, setting(checkpoint, "rationale"))
    left = tokenizer.decode(written_solution(example, stage, newline(tokenizer)).ids)
    return replace(problem, rationale=left, steps=parse_steps(left)[0])


def written_steps(text: str, problem: Problem) -> tuple[list[str], list[str | None]]:
    """The well-formed steps of a written answer beside the gold steps, in order: "" where one lacks, None beyond."""
    said, gold = [step.text for step in parse_steps(text)[0]], [step.text for step in problem.steps]
    n = max(len(said), len(gold))
    return said + [""] * (n - len(said)), [*gold, *[None] * (n - len(gold))]


def summarise(predictions: Sequence[Prediction]) -> dict[str, Any]:
    """Accuracies with 95% Wilson intervals, tokens an answer, step exact match where steps were decoded or written."""
    n = len(predictions)
    correct = sum(p.correct for p in predictions)
    correct_last = sum(p.correct_last_number for p in predictions)
    summary: dict[str, Any] = {
        "accuracy": correct / n,
        "ci95": list(wilson_interval(correct, n)),
        "n": n,
        "correct": correct,
        "accuracy_last_number": correct_last / n,
        "ci95_last_number": list(wilson_interval(correct_last, n)),
        "tokens_per_answer": sum(p.generation.n_tokens for p in predictions) / n,
        "thoughts_per_answer": sum(p.generation.n_thoughts for p in predictions) / n,
        "passes_per_answer": sum(p.generation.n_passes for p in predictions) / n,
        "unfinished": sum(not p.generation.finished for p in predictions),
    }
    steps = [step for p in predictions for step in p.steps]
    if steps:
        summary |= {
            **exact_match("step_exact_match", steps),
            "steps": len(steps),
            # A decoder that knows what is likely, but not what a thought says, says the same of every problem.
            "different_steps": len({said for said, _ in steps}),
            "different_gold_steps": len({gold for _, gold in steps}),
        }
    answers = [group for p in predictions for group in p.answer_groups]
    if answers:
        summary |= {**exact_match("answer_group_exact_match", answers), "answer_groups": len(answers)}
    return summary


def exact_match(key: str, groups: Sequence[tuple[str, str]]) -> dict[str, Any]:
    """The share of groups (at least one) that are decoded exactly, and its interval."""
    matches = sum(score_steps(said, gold).exact for said, gold in groups)
    return {key: matches / len(groups), f"{key}_ci95": list(wilson_interval(matches, len(groups)))}


def report_table(report: dict[str, Any]) -> Table:
    """The report for people."""

    def with_interval(key: str, interval: str) -> str:
        low, high = report[interval]
        return f"{report[key]:.1%} (95% interval {low:.1%} to {high:.1%})"

    table = Table(f"{report['eval']} {report['split']}, n={report['n']}", "value")
    table.add_row("accuracy, strict (after ####)", with_interval("accuracy", "ci95"))
    table.add_row("accuracy, last number", with_interval("accuracy_last_number", "ci95_last_number"))
    if "step_exact_match" in report:
        text = with_interval("step_exact_match", "step_exact_match_ci95")
        table.add_row("step exact match, free-running", f"{text} of {report['steps']} steps")
        table.add_row("different steps", f"{report['different_steps']}, gold {report['different_gold_steps']}")
    if "answer_groups" in report:
        text = with_interval("answer_group_exact_match", "answer_group_exact_match_ci95")
        table.add_row("groups taught the answer, exact match", f"{text} of {report['answer_groups']} groups")
    if report["tolerance"]:
        table.add_row("tolerance", f"{report['tolerance']:g} of the gold answer")
    thoughts = f"{report['thoughts_per_answer']:.1f}".removesuffix(".0")
    table.add_row("tokens an answer", f"{report['tokens_per_answer']:.1f}, of them {thoughts} thoughts")
    table.add_row("passes an answer", f"{report['passes_per_answer']:.1f}, one after the other")
    table.add_row("without an end token", str(report["unfinished"]))
    table.add_row("questions/s", f"{report['questions_per_s']:.1f} (batch {report['batch_size']}, {report['dtype']})")
    return table


def write_report(files: ReportFiles, report: dict[str, Any], predictions: Sequence[Prediction]) -> None:
    """Writes the report, and one line per problem, into `report_files`."""
    lines = [
        {
            "index": i,
            "question": p.problem.question,
            "gold": p.problem.answer,
            "output": p.generation.text,
            "answer": p.generation.answer,
            "correct": p.correct,
            "last_number": last_number(p.generation.text),
            "correct_last_number": p.correct_last_number,
            "n_tokens": p.generation.n_tokens,
            "n_thoughts": p.generation.n_thoughts,
            "n_passes": p.generation.n_passes,
            "finished": p.generation.finished,
            "decoded_steps": [s if holds_step(p.problem, k) else "" for k, s in enumerate(p.decoded)],
            "gold_steps": [g if holds_step(p.problem, k) else None for k, g in enumerate(p.gold)],
            "decoded_answers": [said for said, _ in p.answer_groups],
        }
        for i, p in enumerate(predictions)
    ]
    write_lines(files.predictions, lines)
    write_text(files.report, json.dumps(report, indent=2, allow_nan=False) + "\n")
