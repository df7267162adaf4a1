"""Every option of evals and probe does what its description tells, seen from outside: by what the model is given
to read, and by what comes out. An option that nobody reads fails here.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import PROBE, Trained, predictions_of, read_lines, report_in, run, strict_json
from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook

from simcot_latent.model.gpt import Transformer

GSM8K = "evals.gsm8k"


@dataclass
class Watched:
    """What the model was given: the rows of every batch of questions, and the number formats."""

    batches: list[int] = field(default_factory=list)
    dtypes: set[torch.dtype] = field(default_factory=set)


@contextmanager
def watching() -> Iterator[Watched]:
    """While this lasts, a hook of PyTorch's tells of every pass through a transformer."""
    seen = Watched()

    def before_pass(module: nn.Module, args: tuple[Any, ...]) -> None:
        if isinstance(module, Transformer):
            seen.dtypes.add(torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else torch.float32)
            if len(args) > 2 and args[2] is not None and args[2].is_empty:  # packing and cache: a batch's first pass
                seen.batches.append(args[1].rows)

    handle = register_module_forward_pre_hook(before_pass)
    try:
        yield seen
    finally:
        handle.remove()


@pytest.fixture
def checkpoint(latent_run: Trained, tmp_path: Path) -> Path:
    """A copy, since an eval writes beside it."""
    return latent_run.copy_to(tmp_path / "checkpoint")


def evaluate(checkpoint: Path, sums: Path, *arguments: str) -> tuple[dict[str, Any], list[dict[str, Any]], Watched]:
    """The report, the predictions, and what was read for them."""
    with watching() as seen:
        run(GSM8K, f"ckpt={checkpoint}", f"data.path={sums}", "device=cpu", *arguments, folder=checkpoint.parent).ok()
    report = report_in(checkpoint / "evals", "gsm8k")
    return strict_json(report.read_text()), read_lines(predictions_of(report)), seen


def probe(checkpoint: Path, *arguments: str) -> tuple[list[dict[str, Any]], Watched]:
    """What is found of each question, and what was read for it."""
    with watching() as seen:
        out = (
            run(PROBE, f"ckpt={checkpoint}", "device=cpu", "format=json", *arguments, folder=checkpoint.parent).ok().out
        )
    return strict_json(out)["probes"], seen


# --- evals -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("options", "batches"), [((), [21]), (("batch_size=8",), [8, 8, 5]), (("limit=3",), [3])])
def test_evals_answer_so_many_at_once(
    options: tuple[str, ...], batches: list[int], checkpoint: Path, sums: Path
) -> None:
    assert evaluate(checkpoint, sums, *options)[2].batches == batches


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_evals_compute_in_the_format(dtype: str, checkpoint: Path, sums: Path) -> None:
    report, _, seen = evaluate(checkpoint, sums, f"dtype={dtype}", "limit=2")
    assert seen.dtypes == {getattr(torch, dtype)}
    assert report["dtype"] == dtype


def test_evals_compute_in_float32_unless_told_otherwise(checkpoint: Path, sums: Path) -> None:
    assert evaluate(checkpoint, sums, "limit=2")[2].dtypes == {torch.float32}


@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_evals_answer_the_split(split: str, checkpoint: Path, sums: Path) -> None:
    """A tenth of the 40 training problems is held out; together they are the file's."""
    report, lines, _ = evaluate(checkpoint, sums, f"split={split}")
    rows = read_lines(sums / f"{'test' if split == 'test' else 'train'}.jsonl")
    asked = [line["question"] for line in lines]
    assert (report["split"], report["n"]) == (split, {"train": 36, "validation": 4, "test": 21}[split])
    assert set(asked) <= {row["question"] for row in rows}
    if split == "test":
        assert asked == [row["question"] for row in rows]


def test_evals_report_how_they_measured(checkpoint: Path, sums: Path) -> None:
    """Every setting under its name, each other than its default."""
    options = {"split": "train", "limit": 5, "batch_size": 2, "max_new_tokens": 3, "temperature": 0.5, "top_k": 7,
               "seed": 9, "dtype": "bfloat16"}  # fmt: skip
    report, lines, _ = evaluate(checkpoint, sums, *(f"{key}={value}" for key, value in options.items()))
    assert {key: report[key] for key in options} == options
    assert (report["eval"], report["device"], report["thoughts"], report["step"]) == ("gsm8k", "cpu", 3, 60)
    assert report["n"] == len(lines) == 5
    assert report["threads"] == torch.get_num_threads()
    assert report["torch"] == torch.__version__


def test_top_k_and_temperature_and_seed_reach_the_draw(checkpoint: Path, sums: Path) -> None:
    """Hot draws differ by seed; among one token, however hot, there is nothing to draw; cold ones are greedy."""

    def outputs(*options: str) -> list[str]:
        return [line["output"] for line in evaluate(checkpoint, sums, "limit=6", "max_new_tokens=8", *options)[1]]

    greedy = outputs()
    hot = ("temperature=3",)
    assert outputs(*hot, "seed=1") == outputs(*hot, "seed=1") != outputs(*hot, "seed=2")
    assert outputs(*hot, "seed=1") != greedy
    assert outputs(*hot, "top_k=1") == greedy
    assert outputs("temperature=1e-4") == greedy


# --- probe -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "batches"),
    [((), [20]), (("limit=9",), [9]), (("limit=9", "batch_size=4"), [4, 4, 1]), (("limit=100",), [21])],
)
def test_probe_thinks_about_so_many_at_once(
    options: tuple[str, ...], batches: list[int], latent_run: Trained, sums: Path
) -> None:
    probes, seen = probe(latent_run.latest, "data=gsm8k", f"data.path={sums}", *options)
    assert seen.batches == batches
    rows = read_lines(sums / "test.jsonl")[: sum(batches)]
    assert [each["question"] for each in probes] == [row["question"] for row in rows]
    assert [each["gold_answer"] for each in probes] == [row["answer"].rpartition("#### ")[2] for row in rows]


@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_probe_takes_the_split(split: str, latent_run: Trained, sums: Path) -> None:
    probes, _ = probe(latent_run.latest, "data=gsm8k", f"data.path={sums}", f"split={split}", "limit=100")
    assert len(probes) == {"train": 36, "validation": 4, "test": 21}[split]
    golds = {each["gold_answer"] for each in probes}
    assert (golds == {"14"}) == (split != "test"), "all training problems have one answer"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_probe_computes_in_the_format(dtype: str, latent_run: Trained) -> None:
    _, seen = probe(latent_run.latest, "question=How many?", f"dtype={dtype}")
    assert seen.dtypes == {getattr(torch, dtype)}


def test_probe_prints_a_table_unless_told_otherwise(latent_run: Trained, sums: Path) -> None:
    data = (f"ckpt={latent_run.latest}", "device=cpu", "data=gsm8k", f"data.path={sums}", "limit=2")
    table = run(PROBE, *data, folder=latent_run.out_dir).ok().out
    assert "decoded step" in table
    assert not table.lstrip().startswith("{")
    assert strict_json(run(PROBE, *data, "format=json", folder=latent_run.out_dir).ok().out)["summary"]["n"] == 2
