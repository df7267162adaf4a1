"""python -m benchmarks.gpu.generate: questions per second on the card, against `transformers`.

As `benchmarks.generate`, in bfloat16 on both sides, with and without CUDA graphs on ours: thoughts and an answer
against a batched, cached loop on `transformers`, and written steps against its `generate`. At batch 1 it is latency.
"""

from __future__ import annotations

import argparse

import torch

from benchmarks.common import load_problems
from benchmarks.generate import measure
from benchmarks.gpu.common import Report, device_of, is_out_of_memory, parse_part


def main() -> None:
    args = parse_part(__doc__)
    device = device_of(args)
    sizes, batches = (["S"], [4]) if args.tiny else (["G", "M"], [256, 32, 1])
    report = Report("generate", args, data=args.gsm8k or "embedded problems")
    problems = load_problems(args.gsm8k, "test", 8 if args.tiny else 512)
    for batch_size in batches:
        for size in sizes:
            if report.seconds_left < (5 if args.tiny else 20):
                report.leave_out(f"{size} batch {batch_size}", "no time left")
                continue
            # Of one question at a time fewer are enough, and they are what latency is of.
            questions = [problem.question for problem in problems[: 16 if batch_size == 1 else len(problems)]]
            settings = argparse.Namespace(
                seed=args.seed, device=args.device, batch_size=batch_size, thoughts=6, answer_tokens=6,
                written_tokens=30, repeats=1 if args.tiny else 3,
                dtype="float32" if args.tiny else "bfloat16", cuda_graphs=True,
            )  # fmt: skip
            try:
                rows = measure(size, questions, settings)
            except Exception as error:  # a peer that does not know the card, say
                why = "out of memory" if is_out_of_memory(error) else f"{type(error).__name__}: {str(error)[:300]}"
                report.leave_out(f"{size} batch {batch_size}", why)
                continue
            for row in rows:
                per_s = {key: row[key] for key in ("ours_per_s", "graphs_per_s", "peer_per_s")}
                latency = {key.replace("per_s", "ms"): 1000 / x for key, x in per_s.items()} if batch_size == 1 else {}
                report.add(**row, **latency, graphs_speedup=row["graphs_per_s"] / row["peer_per_s"])
                text = f"{size} {row['way']} batch {batch_size}: {row['ours_per_s']:.0f} questions/s"
                graphs = f"{row['graphs_per_s']:.0f} with graphs"
                report.headline(f"{text} ({graphs}), transformers {row['peer_per_s']:.0f}: {row['speedup']:.2f}x")
            if device.type == "cuda":
                torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
