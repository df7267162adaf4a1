"""python -m benchmarks.generate --data path/to/gsm8k: questions answered a second, against `transformers`.

Latent: questions of GSM8K's test set, thoughts, then an answer of a fixed number of tokens, in batches of similar
length; the peer is a batched, cached loop on `transformers`. Written: the same questions and a fixed number of tokens
after them; the peer is `transformers.generate`. Both sides have random weights of the same shape and get the same
batches. A question never ends early on either side, so that both do the same work.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Sequence
from copy import deepcopy
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from benchmarks.common import SIZES, compare, load_problems, make_parser, report, take_turns
from benchmarks.peers import think_and_answer, transformers_model, write
from simcot_latent.checkpoint import Checkpoint
from simcot_latent.curricula.base import Stage
from simcot_latent.data.batch import by_length
from simcot_latent.data.format import AnswerFormat, encode_question
from simcot_latent.data.tokenizer import Tokenizer, default_tokenizer
from simcot_latent.distributed import autocast, pick_device, pick_dtype
from simcot_latent.generate import generate
from simcot_latent.loops.sequential import Sequential, SequentialConfig
from simcot_latent.model.cache import StaticCaches
from simcot_latent.model.gpt import GPT
from simcot_latent.model.linear import keep_weights_in


def main() -> None:
    args = parse_arguments()
    torch.set_num_threads(args.threads)
    questions = [problem.question for problem in load_problems(args.data, "test", args.questions)]
    rows = [
        row
        for size in track(args.sizes, "sizes", console=Console(stderr=True))
        for row in measure(size, questions, args)
    ]
    table = Table("size", "way", "questions/s, ours", "questions/s, transformers", "same dtype", "each at its default")
    for row in rows:
        table.add_row(
            row["size"],
            row["way"],
            f"{row['ours_per_s']:.1f}",
            f"{row['peer_per_s']:.1f}",
            f"{row['speedup']:.2f}x",
            f"{row['speedup_at_defaults']:.2f}x ({row['our_default']})",
        )
    latent_to_written = {
        size: next(r["ours_per_s"] for r in rows if r["size"] == size and r["way"] == "latent")
        / next(r["ours_per_s"] for r in rows if r["size"] == size and r["way"] == "written")
        for size in args.sizes
    }
    tokens = args.written_tokens / (args.thoughts + args.answer_tokens)
    report("generate", args, rows, table, latent_to_written=latent_to_written, written_to_latent_tokens=tokens)
    for size, ratio in latent_to_written.items():
        Console().print(
            f"{size}: latent answers {ratio:.2f}x the questions/s of written steps, at 1/{tokens:.2f} of the tokens"
        )


def parse_arguments() -> argparse.Namespace:
    parser = make_parser(__doc__)
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=["S"])
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--questions", type=int, default=128)
    parser.add_argument("--thoughts", type=int, default=6)
    parser.add_argument("--answer-tokens", type=int, default=6)
    parser.add_argument("--written-tokens", type=int, default=30)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of both sides")
    parser.add_argument("--cuda-graphs", action="store_true", help="time our side with cuda_graphs=true as well")
    return parser.parse_args()


def measure(size: str, questions: Sequence[str], args: argparse.Namespace) -> list[dict[str, Any]]:
    """Both ways of answering at one size."""
    torch.manual_seed(args.seed)
    device, dtype = pick_device(args.device), getattr(torch, args.dtype)
    config, tokenizer = SIZES[size], endless(default_tokenizer())
    with device:
        ours, peer = GPT(config).eval(), transformers_model(config).to(dtype)
    thinks = AnswerFormat(thinks=True)
    prompts = [encode_question(tokenizer, question, thinks) for question in questions]
    batches = by_length(list(map(len, prompts)), args.batch_size)
    default = pick_dtype("auto", device, config.n_embd)
    # A model of its own: graphs hold on to the copies of its weights.
    graphed, caches = (deepcopy(ours) if args.cuda_graphs else ours), StaticCaches(config.context_length)
    if args.cuda_graphs:
        keep_weights_in(graphed, dtype)

    def answer(way: str, tokens: int, dtype: torch.dtype, caches: StaticCaches | None = None) -> Callable[[], None]:
        checkpoint = Checkpoint(ours if caches is None else graphed, None, tokenizer, {})
        if way == "latent":
            checkpoint.answers, checkpoint.loop = thinks, Sequential(config.n_embd, SequentialConfig())
            checkpoint.stage = Stage(args.thoughts, first_written=None)

        def run() -> None:
            with autocast(device, dtype):
                for batch in batches:
                    generate(checkpoint, [questions[i] for i in batch], tokens, caches=caches)

        return run

    def peer_thinks() -> None:
        for batch in batches:
            think_and_answer(peer, [prompts[i] for i in batch], args.thoughts, tokenizer.eot_id, args.answer_tokens)

    def peer_writes() -> None:
        for batch in batches:
            write(peer, [prompts[i] for i in batch], args.written_tokens)

    ways = {
        "latent": (args.answer_tokens, peer_thinks),
        "written": (args.written_tokens, peer_writes),
    }
    rows: list[dict[str, Any]] = []
    for way, (tokens, theirs) in ways.items():
        sides = {"ours": answer(way, tokens, dtype), "peer": theirs}
        if default != dtype:
            sides["default"] = answer(way, tokens, default)
        if args.cuda_graphs:
            sides["graphs"] = answer(way, tokens, dtype, caches)
        seconds = take_turns(sides, args.repeats, warmup=1, device=device)
        fast = "default" if "default" in sides else "ours"
        per_s = {name: len(questions) / statistics.median(values) for name, values in seconds.items()}
        rows.append(
            {
                "size": size,
                "way": way,
                "batch_size": args.batch_size,
                "dtype": args.dtype,
                "ours_per_s": per_s["ours"],
                "peer_per_s": per_s["peer"],
                **{key.replace("ratio", "speedup"): x for key, x in compare(seconds, "peer", "ours").items()},
                **({"graphs_per_s": per_s["graphs"]} if args.cuda_graphs else {}),
                "our_default": str(default).removeprefix("torch."),
                "speedup_at_defaults": compare(seconds, "peer", fast)["ratio"],
            }
        )
    return rows


def endless(tokenizer: Tokenizer) -> Tokenizer:
    """A tokenizer whose end token no model writes, and that leaves what was written as it is, as the peers do."""
    id_of = tokenizer.id_of
    tokenizer.id_of = lambda role: -1 if role == "end" else id_of(role)
    tokenizer.decode = lambda ids: ""
    return tokenizer


if __name__ == "__main__":
    main()
