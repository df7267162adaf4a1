"""python -m benchmarks.gpu.profile: a trace of one latent step at G, batch 32, its dearest kernels and longest gaps.

A gap is a time in which no kernel runs between two that do: the card waits for the CPU there. Reports the ten kernels
that take most time in all, the ten longest gaps with what ran before and after, and how the time of a step divides.
"""

from __future__ import annotations

import argparse
import gzip
import shutil
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.common import load_problems, synchronise
from benchmarks.gpu.common import Report, device_of, parse_part
from benchmarks.train_step import Bench
from simcot_latent.profiling import PREFIX


@dataclass(frozen=True)
class Span:
    """Something that ran: its name, and when, in microseconds."""

    name: str
    start: float
    end: float


def main() -> None:
    args = parse_part(__doc__)
    device = device_of(args)
    size, batch_size, dtype = ("S", 4, "float32") if args.tiny else ("G", 32, "bfloat16")
    report = Report(
        "profile", args, size=size, batch_size=batch_size, dtype=dtype, data=args.gsm8k or "embedded problems"
    )
    settings = argparse.Namespace(
        seed=args.seed, device=args.device, dtype=dtype, mode="latent", thoughts=10, latents_per_step=2,
        decoder_layers=1, optimizer="adamw", compile=False, activation_checkpointing=False,
    )  # fmt: skip
    bench = Bench.make(size, batch_size, load_problems(args.gsm8k, "train", 512), settings)
    for _ in range(3):
        bench.ours()
    synchronise(device)
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
    with profile(activities=activities) as profiler:
        bench.ours()
        synchronise(device)
    spans = device_events(profiler, device)
    wall = max(span.end for span in spans) - min(span.start for span in spans)
    busy = busy_seconds(spans) * 1e6
    for name, microseconds, calls in dearest(spans, 10):
        report.add(kind="kernel", name=name, microseconds=microseconds, calls=calls, share=microseconds / wall)
    for before, after, microseconds in longest_gaps(spans, 10):
        report.add(kind="gap", before=before, after=after, microseconds=microseconds)
    for event in profiler.key_averages():
        if event.key.startswith(PREFIX):
            name = event.key.removeprefix(PREFIX)
            report.add(kind="part", name=name, cpu_us=event.cpu_time_total, device_us=event.device_time_total)
    trace = report.out / "profile_trace.json"
    profiler.export_chrome_trace(str(trace))
    with trace.open("rb") as plain, gzip.open(f"{trace}.gz", "wb") as packed:
        shutil.copyfileobj(plain, packed)
    trace.unlink()
    report.headline(f"{len(spans)} kernels in {wall / 1000:.1f} ms, of which {busy / wall:.0%} something runs")
    if spans:
        name, microseconds, calls = dearest(spans, 1)[0]
        report.headline(f"dearest: {name[:60]}, {calls} calls, {microseconds / wall:.0%}")
    print(f"trace: {trace}.gz (for https://ui.perfetto.dev)")


def device_events(profiler: profile, device: torch.device) -> list[Span]:
    """What ran on the device, in order; of a CPU, its operations, those that others call left out."""
    spans: list[Span] = []
    for event in profiler.events() or []:
        if device.type == "cuda":
            wanted = event.device_type.name == "CUDA" and not event.name.startswith(PREFIX)
        else:
            wanted = event.name.startswith("aten::") and (
                event.cpu_parent is None or not event.cpu_parent.name.startswith("aten::")
            )
        if wanted:
            spans.append(Span(event.name, event.time_range.start, event.time_range.end))
    return sorted(spans, key=lambda span: span.start)


def busy_seconds(spans: Sequence[Span]) -> float:
    """Seconds in which at least one of them ran; spans come in order of their starts."""
    total, reached = 0.0, float("-inf")
    for span in spans:
        total += max(0.0, span.end - max(span.start, reached))
        reached = max(reached, span.end)
    return total / 1e6


def dearest(spans: Sequence[Span], count: int) -> list[tuple[str, float, int]]:
    """The names that take most time in all: microseconds, and how often they ran."""
    times: defaultdict[str, list[float]] = defaultdict(list)
    for span in spans:
        times[span.name].append(span.end - span.start)
    rows: list[tuple[str, float, int]] = [(name, sum(each), len(each)) for name, each in times.items()]
    return sorted(rows, key=lambda row: row[1], reverse=True)[:count]


def longest_gaps(spans: Sequence[Span], count: int) -> list[tuple[str, str, float]]:
    """The longest times in which nothing ran, in microseconds, with the names before and after."""
    gaps: list[tuple[str, str, float]] = []
    last: Any = None
    for span in spans:
        if last is not None and span.start > last.end:
            gaps.append((last.name, span.name, span.start - last.end))
        if last is None or span.end > last.end:
            last = span
    return sorted(gaps, key=lambda gap: gap[2], reverse=True)[:count]


if __name__ == "__main__":
    main()
