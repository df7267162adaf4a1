"""The one runner behind every eval: answers a data source's problems and writes a report.

`python -m evals.<name> ckpt=DIR` prints a table and writes `DIR/evals/<name>.json` (the report) and
`DIR/evals/<name>.predictions.jsonl` (a line a problem).
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from rich.table import Table

from simcot_latent import cli
from simcot_latent.checkpoint import load_checkpoint, setting, write_json
from simcot_latent.config import typed
from simcot_latent.data.batch import by_length
from simcot_latent.data.problem import Problem, last_number, parse_steps, same_number
from simcot_latent.data.sources import SPLITS
from simcot_latent.distributed import autocast, pick_device, pick_dtype
from simcot_latent.errors import UserError, require, require_choice
from simcot_latent.generate import Generation, Sampling, encode_prompts, generate
from simcot_latent.logs import make_console, track
from simcot_latent.metrics import score_steps, wilson_interval
from simcot_latent.probe import decode_taught, gold_groups, latents_of


@dataclass
class EvalConfig:
    """Keys of `configs/eval.yaml`."""

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
    device: str = "auto"
    dtype: str = "float32"

    def __post_init__(self) -> None:
        if self.ckpt is None:
            raise UserError("ckpt is missing; give ckpt=DIR, a folder that training wrote, such as runs/latent/latest")
        require_choice("split", self.split, SPLITS)
        require(self.limit is None or self.limit >= 1, "limit", self.limit, "at least 1, or null for all")
        require(self.batch_size >= 1, "batch_size", self.batch_size, "at least 1")
        require(
            self.max_new_tokens is None or self.max_new_tokens >= 1, "max_new_tokens", self.max_new_tokens, "at least 1"
        )
        require_choice("dtype", self.dtype, ("auto", "float32", "bfloat16"))


@dataclass(frozen=True)
class Prediction:
    """What became of one problem."""

    problem: Problem
    generation: Generation
    decoded: list[str]
    gold: list[str | None]

    @property
    def correct(self) -> bool:
        """Strict: the number after `####`."""
        return same_number(self.generation.answer, self.problem.answer)

    @property
    def correct_last_number(self) -> bool:
        """Lenient: the last number in the output."""
        return same_number(last_number(self.generation.text), self.problem.answer)

    @property
    def steps(self) -> list[tuple[str, str]]:
        """For each group with gold steps, or each gold step of a written answer: what was said, and the gold."""
        return [(said, gold) for said, gold in zip(self.decoded, self.gold, strict=True) if gold is not None]


def run(name: str) -> None:
    """Command-line entry of the eval `name`, on the data source of the same name unless `data=` says otherwise."""
    if not any(argument.startswith("data=") for argument in sys.argv[1:]):
        sys.argv.insert(1, f"data={name}")
    cli.run(lambda raw: evaluate(name, raw), "eval")


def evaluate(name: str, raw: DictConfig) -> None:
    """Answers a split, prints the table, writes the report."""
    config = typed(EvalConfig, raw)
    console = make_console()
    device = pick_device(config.device)
    dtype = pick_dtype(config.dtype, device)
    checkpoint = load_checkpoint(config.ckpt or "", device, verify=config.verify)
    source, data = cli.trained_source(raw, checkpoint)
    if data.get("path") != raw.data.get("path"):
        console.print(f"data.path={data['path']}, as in training")
    loaded = source.load(config.split)  # type: ignore[arg-type]
    problems = loaded.problems[: config.limit]
    for note, count in sorted(loaded.notes.items()):
        console.print(f"{config.split}: {count} x {note}")

    torch.manual_seed(config.seed)
    sampling = Sampling(config.temperature, config.top_k)
    limit = config.max_new_tokens or setting(checkpoint, "max_new_tokens")
    lengths = [
        len(ids)
        for ids in encode_prompts(
            checkpoint.model, checkpoint.tokenizer, checkpoint.thoughts, [p.question for p in problems]
        )
    ]
    plan = by_length(lengths, config.batch_size)
    predictions: dict[int, Prediction] = {}
    seconds = 0.0
    for batch in track(plan, f"{name} {config.split}", console, [len(batch) for batch in plan]):
        chosen = [problems[i] for i in batch]
        questions = [problem.question for problem in chosen]
        with torch.no_grad(), autocast(device, dtype):
            began = time.perf_counter()
            generations = generate(
                checkpoint.model, checkpoint.tokenizer, checkpoint.thoughts, questions, limit, sampling
            )
            seconds += time.perf_counter() - began
            decoded: list[list[str]] = [[] for _ in chosen]
            gold: list[list[str | None]] = [[] for _ in chosen]
            if checkpoint.step_decoder is not None and checkpoint.thoughts.n_latents:
                gold = [gold_groups(checkpoint, problem) for problem in chosen]
                decoded = decode_taught(checkpoint, latents_of(generations), gold)
            elif not checkpoint.thoughts.n_latents and setting(checkpoint, "rationale") != "none":
                pairs = [written_steps(g.text, p) for g, p in zip(generations, chosen, strict=True)]
                decoded, gold = [said for said, _ in pairs], [wanted for _, wanted in pairs]
        for i, problem, generation, said, wanted in zip(batch, chosen, generations, decoded, gold, strict=True):
            predictions[i] = Prediction(problem, generation, said, wanted)

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
        "batch_size": config.batch_size,
        "max_new_tokens": limit,
        "temperature": config.temperature,
        "top_k": config.top_k,
        "seed": config.seed,
        "device": str(device),
        "dtype": str(dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "torch": str(torch.__version__),
        "thoughts": checkpoint.thoughts.n_latents,
    }
    console.print(report_table(report))
    console.print(f"written to {write_report(Path(config.ckpt or ''), name, config.split, report, ordered)}")


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
        "unfinished": sum(not p.generation.finished for p in predictions),
    }
    steps = [step for p in predictions for step in p.steps]
    if steps:
        matches = sum(score_steps(said, gold).exact for said, gold in steps)
        summary |= {
            "step_exact_match": matches / len(steps),
            "step_exact_match_ci95": list(wilson_interval(matches, len(steps))),
            "steps": len(steps),
            # A decoder that knows what is likely, but not what a thought says, says the same of every problem.
            "different_steps": len({said for said, _ in steps}),
            "different_gold_steps": len({gold for _, gold in steps}),
        }
    return summary


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
    table.add_row("tokens an answer", f"{report['tokens_per_answer']:.1f}, of them {report['thoughts']} thoughts")
    table.add_row("without an end token", str(report["unfinished"]))
    table.add_row("questions/s", f"{report['questions_per_s']:.1f} (batch {report['batch_size']}, {report['dtype']})")
    return table


def write_report(ckpt: Path, name: str, split: str, report: dict[str, Any], predictions: Sequence[Prediction]) -> Path:
    """Writes the report and a line a problem; files of another split than test carry its name."""
    folder = ckpt / "evals"
    folder.mkdir(exist_ok=True)
    stem = name if split == "test" else f"{name}.{split}"
    with (folder / f"{stem}.predictions.jsonl").open("w", encoding="utf-8") as file:
        for i, p in enumerate(predictions):
            line = {
                "index": i,
                "question": p.problem.question,
                "gold": p.problem.answer,
                "output": p.generation.text,
                "answer": p.generation.answer,
                "correct": p.correct,
                "last_number": last_number(p.generation.text),
                "correct_last_number": p.correct_last_number,
                "n_tokens": p.generation.n_tokens,
                "finished": p.generation.finished,
                "decoded_steps": p.decoded,
                "gold_steps": p.gold,
            }
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
    write_json(folder / f"{stem}.json", report)
    return folder / f"{stem}.json"
