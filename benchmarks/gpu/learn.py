"""python -m benchmarks.gpu.learn: what is learnt in minutes.

First the embedded quick start, as the command trains it. Then, where `--weights` (SmolLM2-135M) and `--gsm8k` are
given: written steps for a share of the time; from that checkpoint thoughts with step loss (SIM-CoT, the whole base as
decoder) and thoughts without (Coconut); each is scored on all test problems. A run's number of steps is what its share
of the time is worth, as a few steps beforehand tell, so that its learning rate comes to its end.

The arithmetic: a problem costs SmolLM2-135M with a full-copy decoder about 90 GFLOP to train on. Two CPU cores do 3
problems per second, an H100 at a quarter of its bfloat16 rate 2,700.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import synchronise
from benchmarks.gpu.common import Report, device_of, parse_part, score, train_run
from benchmarks.train_step import median_batch
from simcot_latent.config import DecoderConfig, LatentConfig, LossConfig, MethodConfig, RunConfig
from simcot_latent.data.batch import to_device
from simcot_latent.data.sources import Source
from simcot_latent.data.sources.arithmetic import Arithmetic
from simcot_latent.data.sources.gsm8k import GSM8K
from simcot_latent.data.tokenizer import default_tokenizer
from simcot_latent.distributed import autocast, pick_dtype
from simcot_latent.interop.pretrained import load_pretrained, with_latent_tokens
from simcot_latent.method import Method
from simcot_latent.model.gpt import GPT, GPTConfig
from simcot_latent.training.optimizer import make_optimizers, update
from simcot_latent.training.setup import Start

BATCH = 64
SETTINGS: dict[str, Any] = {
    "target_examples_per_step": BATCH,
    "device_batch_size": BATCH,
    "optimizer": "adamw",
    "learning_rate": 3e-4,
    "betas": [0.9, 0.95],
    "weight_decay": 0.01,
    "warmup_ratio": 0.05,
    "lr_schedule": "cosine",
    "final_lr_ratio": 0.1,
    "eval_every": -1,
    "checkpoint_every": -1,
    "eval_examples": 64,
    "max_new_tokens": 120,
    "log_every": 20,
}
"""Of every run from SmolLM2, as in experiment=smollm2_gsm8k_*, at twice the batch."""


@dataclass(frozen=True)
class Plan:
    """One run from SmolLM2: its share of the time, its mode and method."""

    share: float
    mode: str
    method: MethodConfig = field(default_factory=MethodConfig)


def plans() -> dict[str, Plan]:
    """The runs, in order; those after the first begin from it."""
    latent = LatentConfig(n_latents=6, latents_per_step=1, warmup=0.0, stages=0.5)
    whole = DecoderConfig(n_layer=None, init="base")
    return {
        "written": Plan(0.3, "weighted"),
        "simcot": Plan(0.3, "latent", MethodConfig.simcot(latent, whole, LossConfig(step_weight=1.0))),
        "coconut": Plan(0.25, "latent", MethodConfig.simcot(latent, steps="none")),
    }


def main() -> None:
    args = parse_part(__doc__)
    device = device_of(args)
    dtype = pick_dtype("auto", device, width=576)  # SmolLM2
    began = time.monotonic()
    report = Report("learn", args, dtype=str(dtype).removeprefix("torch."), settings=SETTINGS, weights=args.weights)
    with tempfile.TemporaryDirectory() as folder:
        quick_start(report, args, Path(folder), device)
        if args.weights is None or args.gsm8k is None:
            report.leave_out("SmolLM2-135M on GSM8K", "give --weights and --gsm8k")
            return
        source = GSM8K(path=args.gsm8k)
        test = source.load("test").problems[: 16 if args.tiny else None]
        seconds = args.seconds - (time.monotonic() - began)
        start: Path | str = args.weights
        for name, plan in plans().items():
            # What is left after these shares is for loading, saving and scoring.
            steps = None if args.tiny else plan.share * seconds
            row = from_smollm2(name, plan, source, start, Path(folder) / name, steps, device, dtype)
            # An answer in float32 is the same at any batch; bfloat16 is what these runs computed in.
            row |= score(Path(folder) / name, test, device, dtype, batch_size=256)
            report.add(run=name, **row)
            low, high = row["ci95"]
            accuracy = f"{row['accuracy']:.1%} ({low:.1%} to {high:.1%}, n={row['n']})"
            report.headline(f"{name}: {accuracy} after {row['problems']:,} problems in {row['seconds']:.0f} s")
            if name == "written":
                start = Path(folder) / name


def quick_start(report: Report, args: argparse.Namespace, folder: Path, device: torch.device) -> None:
    """`python -m simcot_latent.train mode=latent`, and its accuracy on the embedded test set."""
    source = Arithmetic(train_size=256, validation_size=16, test_size=16) if args.tiny else Arithmetic()
    options: dict[str, Any] = {"num_iterations": 4, "eval_examples": 16} if args.tiny else {}

    def make() -> Start:
        tokenizer = default_tokenizer()
        return Start(GPT(GPTConfig(tokenizer.n_vocab, n_layer=2, n_head=8, n_embd=128)), tokenizer)

    began = time.perf_counter()
    out = folder / "quick_start"
    lines = train_run("latent", source, make, out, device=str(device), max_new_tokens=64, **options)
    seconds = time.perf_counter() - began
    result = score(out, source.load("test").problems, device, torch.float32, batch_size=256)
    steps = max(line["step"] for line in lines)
    report.add(run="quick start", seconds=seconds, steps=steps, **result)
    low, high = result["ci95"]
    report.headline(
        f"quick start: {result['accuracy']:.1%} ({low:.1%} to {high:.1%}) in {seconds:.0f} s, {steps} steps"
    )


def from_smollm2(
    name: str,
    plan: Plan,
    source: Source,
    start: Path | str,
    out: Path,
    seconds: float | None,
    device: torch.device,
    dtype: torch.dtype,
) -> dict[str, Any]:
    """One run; `seconds`: about how long its steps may take, None: two steps."""

    def make() -> Start:
        checkpoint = with_latent_tokens(load_pretrained(start))
        return Start(checkpoint.model.train(), checkpoint.tokenizer)

    steps = 2 if seconds is None else max(2, int(seconds / seconds_per_step(plan, source, make, device, dtype)))
    began = time.perf_counter()
    options = SETTINGS | ({"target_examples_per_step": 4} if seconds is None else {})
    rationale = {"rationale": "equations"} if plan.mode == "weighted" else {}
    lines = train_run(
        plan.mode, source, make, out, plan.method, device=str(device), dtype=str(dtype).removeprefix("torch."),
        num_iterations=steps, **rationale, **options,
    )  # fmt: skip
    losses = [line["loss"] for line in lines if "loss" in line]
    return {
        "mode": plan.mode,
        "seconds": time.perf_counter() - began,
        "steps": steps,
        "problems": steps * options["target_examples_per_step"],
        "last_loss": losses[-1],
        "validation": {key: value for key, value in lines[-1].items() if key.startswith(("val_", "thought_"))},
    }


def seconds_per_step(
    plan: Plan, source: Source, make: Callable[[], Start], device: torch.device, dtype: torch.dtype
) -> float:
    """Median of five training steps in the last stage, after three that do not count."""
    start = make()
    run = RunConfig(mode=plan.mode, model={}, data={}, tokenizer={}, rationale="equations", **SETTINGS)
    method = Method(start.model, start.tokenizer, run, plan.method).to(device)
    optimizers = make_optimizers(method, run)
    cpu_batch, _ = median_batch(method, source.load("train").problems[:2048], BATCH, seed=0)
    batch, totals = to_device(cpu_batch, device), {key: x.to(device) for key, x in cpu_batch.totals.items()}
    seconds: list[float] = []
    for _ in range(8):
        synchronise(device)
        began = time.perf_counter()
        with autocast(device, dtype):
            loss = method(batch, totals)["loss"]
        loss.backward()
        update(method.parameters(), optimizers, max_norm=1.0)
        synchronise(device)
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds[3:])


if __name__ == "__main__":
    main()
