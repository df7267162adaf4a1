"""python -m benchmarks.gpu.train: a training step on the card against its bound, and what the card does meanwhile.

For each size, mode and batch: our step's time beside that of `benchmarks.train_step`'s bound, measured in turns; MFU;
tokens per second; peak memory; and the share of the time in which the card computes, from PyTorch's profiler (the time
in which a kernel runs over the time on the wall: for the rest the card waits for the CPU).

MFU (model FLOPs utilisation, https://arxiv.org/abs/2204.02311, appendix B) is F / (seconds * rate), where

    F = sum over base and decoder of 6 * N * P + 12 * layers * heads * head width * S  +  6 * V * D * M

N: weights of the blocks' linear layers; P: tokens read; S: sum over rows of T (T + 1) / 2, the pairs of tokens that see
each other; V * D: the output head; M: labels, base's and decoder's. A multiplication and an addition count as two, the
backward pass as two forward passes; what activation checkpointing computes again does not count. The rate is the card's
nominal one for dense bfloat16, and beside it what a large product of matrices reaches here.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.common import compare, load_problems, synchronise, take_turns
from benchmarks.gpu.common import NOMINAL_TFLOPS, Report, card_name, device_of, is_out_of_memory, parse_part
from benchmarks.gpu.profile import busy_seconds, device_events
from benchmarks.train_step import Bench
from simcot_latent.batches import ThoughtBatch
from simcot_latent.data.problem import Problem
from simcot_latent.model import losses
from simcot_latent.model.gpt import Transformer, set_block_options
from simcot_latent.model.linear import Linear
from simcot_latent.terms.step_decoder import StepBatch


@dataclass(frozen=True)
class Case:
    """What is measured, and with which option (see `OPTIONS`)."""

    size: str
    mode: str
    batch_size: int
    dtype: str = "bfloat16"
    option: str = ""

    def __str__(self) -> str:
        return f"{self.size} {self.mode} batch {self.batch_size} {self.dtype} {self.option}".strip()


OPTIONS: dict[str, dict[str, Any]] = {
    "": {},
    "compile": {"compile": True},
    "compile_thoughts": {"compile_thoughts": True},
    "later_attention=sdpa": {"later_attention": "sdpa"},
    "checkpointing": {"checkpointing": True},
    "loss chunks of 256 MB": {},
    "loss chunks of 1 GB": {},
}
CHUNKS = {"loss chunks of 256 MB": 2**28, "loss chunks of 1 GB": 2**30}


def main() -> None:
    args = parse_part(__doc__)
    device = device_of(args)
    measured, nominal = matmul_tflops(device, 512 if args.tiny else 8192), nominal_tflops(card_name(args.device))
    report = Report(
        "train",
        args,
        matmul_tflops=measured,
        nominal_tflops=nominal,
        data=args.gsm8k or "embedded problems",
        mfu=__doc__,
    )
    report.headline(f"bfloat16 products: {measured:.3g} TFLOP/s here, {nominal or 'unknown'} nominal")
    problems = load_problems(args.gsm8k, "train", 256 if args.tiny else 2048)
    found: dict[str, dict[str, Any]] = {}
    for case in cases(args.tiny, device):
        if report.seconds_left < (5 if args.tiny else 15):
            report.leave_out(str(case), "no time left")
            continue
        try:
            row = measure(case, problems, args, device, measured, nominal)
        except Exception as error:  # an option that a compiler refuses, a card too small: the other cases go on
            why = "out of memory" if is_out_of_memory(error) else f"{type(error).__name__}: {str(error)[:300]}"
            report.leave_out(str(case), why)
        else:
            report.add(**row)
            found[str(case)] = row
        if device.type == "cuda":
            torch.cuda.empty_cache()
    for name, row in found.items():
        if row["batch_size"] == max(r["batch_size"] for r in found.values()) and not row["option"]:
            mfu = row["mfu_nominal" if nominal else "mfu_measured"]
            report.headline(f"{name}: {row['ratio']:.2f} of the bound, MFU {mfu:.0%}, busy {row['busy']:.0%}")


def cases(tiny: bool, device: torch.device) -> list[Case]:
    """The most telling first: what is not reached in time is left out."""
    if tiny:
        return [
            Case("S", "latent", 8, "float32"),
            Case("S", "weighted", 8),
            Case("S", "latent", 8, option="checkpointing"),
        ]
    large = [Case(size, mode, 128) for size in "GM" for mode in ("latent", "weighted")]
    options = [Case("G", "latent", batch, option=option) for batch in (32, 128) for option in OPTIONS if option]
    small = [Case(size, mode, batch) for batch in (32, 8) for size in "GM" for mode in ("latent", "weighted")]
    exact = [Case(size, mode, 32, "float32") for size in "GM" for mode in ("latent", "weighted")]
    billion = [Case("L", mode, batch) for batch in (32, 128, 8) for mode in ("latent", "weighted")]
    return list(itertools.chain(large, small[:4], options[:3], billion[:2], exact, small[4:], options[3:], billion[2:]))


def measure(
    case: Case,
    problems: Sequence[Problem],
    args: argparse.Namespace,
    device: torch.device,
    measured_tflops: float,
    nominal: float | None,
) -> dict[str, Any]:
    """One case; see the module."""
    settings = argparse.Namespace(
        seed=args.seed, device=args.device, dtype=case.dtype, mode=case.mode, thoughts=10, latents_per_step=2,
        decoder_layers=1, optimizer="adamw", compile=False, activation_checkpointing=False,
    )  # fmt: skip
    chunk_bytes = losses.CHUNK_BYTES
    losses.CHUNK_BYTES = CHUNKS.get(case.option, chunk_bytes)
    try:
        bench = Bench.make(case.size, case.batch_size, problems, settings)
        set_block_options(bench.method, **OPTIONS[case.option])

        def ours() -> None:
            torch.compiler.cudagraph_mark_step_begin()
            bench.ours()

        repeats, warmup = (1, 1) if args.tiny else (10, 3)
        seconds = take_turns({"ours": ours, "bound": bench.bound}, repeats, warmup, device)
        memory = peak_memory_mb(ours, device)
        busy = busy_share(ours, device)
    finally:
        losses.CHUNK_BYTES = chunk_bytes
    step_s = statistics.median(seconds["ours"])
    flops = step_flops(bench)
    return {
        "size": case.size,
        "mode": case.mode,
        "batch_size": case.batch_size,
        "dtype": case.dtype,
        "option": case.option,
        "ours_s": step_s,
        "bound_s": statistics.median(seconds["bound"]),
        **compare(seconds, "ours", "bound"),
        "positions": bench.batch.totals["positions"].item(),
        "tokens_per_s": bench.batch.totals["positions"].item() / step_s,
        "examples_per_s": case.batch_size / step_s,
        "tflop_per_step": flops / 1e12,
        "mfu_measured": flops / 1e12 / step_s / measured_tflops,
        "mfu_nominal": None if nominal is None else flops / 1e12 / step_s / nominal,
        "peak_memory_mb": memory,
        "busy": busy,
    }


def step_flops(bench: Bench) -> float:
    """F of the module's formula, for our step."""
    batch, method = bench.batch, bench.method
    model = method.model
    V, D = model.output_table.shape
    if not isinstance(batch, ThoughtBatch):
        lengths_B = batch.packing.length_B
        return transformer_flops(model.transformer, lengths_B) + 6.0 * V * D * len(batch.targets)
    # The first thought is what the question's last token became; the last one is read with what follows.
    lengths_B = batch.questions.length_B + max(batch.counts) - 1 + batch.texts.length_B
    taught = batch.terms["step"]
    assert isinstance(taught, StepBatch)
    assert method.step_decoder is not None
    labels = len(batch.targets) + len(taught.steps.label_M)
    base, decoder = (
        transformer_flops(transformer, length)
        for transformer, length in (
            (model.transformer, lengths_B),
            (method.step_decoder.transformer, taught.steps.packing.length_B),
        )
    )
    return base + decoder + 6.0 * V * D * labels


def transformer_flops(transformer: Transformer, lengths_B: torch.Tensor) -> float:
    """Of a forward and backward pass over rows of these lengths."""
    config = transformer.config
    weights = sum(part.weight.numel() for part in transformer.blocks.modules() if isinstance(part, Linear))
    lengths_B = lengths_B.double()
    pairs = (lengths_B * (lengths_B + 1) / 2).sum().item()
    attention = 12.0 * config.n_layer * config.n_head * config.head_width * pairs
    return 6.0 * weights * lengths_B.sum().item() + attention


def matmul_tflops(device: torch.device, size: int) -> float:
    """What a product of two square bfloat16 matrices of random numbers reaches, in 1e12 operations per second."""
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    (seconds,) = take_turns({"product": lambda: a @ b}, repeats=10, warmup=3, device=device).values()
    return 2 * size**3 / statistics.median(seconds) / 1e12


def nominal_tflops(card: str) -> float | None:
    """The maker's figure, for the cards that we know."""
    return next((rate for name, rate in NOMINAL_TFLOPS.items() if name in card), None)


def peak_memory_mb(step: Any, device: torch.device) -> float | None:
    """Megabytes that PyTorch holds on the card at the peak of a step; None on a CPU (see `benchmarks.memory`)."""
    if device.type != "cuda":
        return None
    torch.cuda.reset_peak_memory_stats(device)
    step()
    synchronise(device)
    return torch.cuda.max_memory_allocated(device) / 2**20


def busy_share(step: Any, device: torch.device) -> float:
    """Share of three steps in which the device computes; of a CPU, in which its operations run."""
    import time

    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
    with profile(activities=activities) as profiler:
        synchronise(device)
        began = time.perf_counter()
        for _ in range(3):
            step()
        synchronise(device)
        wall = time.perf_counter() - began
    return min(1.0, busy_seconds(device_events(profiler, device)) / wall)


if __name__ == "__main__":
    main()
