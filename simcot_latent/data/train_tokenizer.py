"""Trains the default tokenizer's byte-level BPE and writes its ranks file.

    python -m simcot_latent.data.train_tokenizer --out FILE [--arithmetic N] [--gsm8k FOLDER] [--text FILE ...]

Each corpus counts equally, however long it is. The same inputs give the same file, byte for byte; the command behind
the shipped one is in `simcot_latent.data.tokenizer`. Only training text is read: the train splits of the two sources,
and the files named. It takes seconds.
"""

import argparse
import heapq
import math
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path

import regex

from simcot_latent.cli import print_whatever_comes
from simcot_latent.data.sources import Source
from simcot_latent.data.sources.arithmetic import Arithmetic
from simcot_latent.data.sources.gsm8k import GSM8K
from simcot_latent.data.tokenizer import PATTERN, SPECIAL_TOKENS, default_tokenizer, write_ranks
from simcot_latent.errors import UserError
from simcot_latent.paths import expanded
from simcot_latent.text import valid_text

# Tokens whatever the corpus, since the pattern promises them as single tokens ("##" only on the way to "####").
MARKS = (b"<<", b">>", b"##", b"####")


def train_bpe(counts: Mapping[str, int], n_ranks: int) -> dict[bytes, int]:
    """Byte-level BPE: joins the most frequent pair of neighbours until there are `n_ranks` tokens.

    A token is its bytes, as in tiktoken: pairs that join to the same bytes count as one. Of equally frequent ones the
    bytes that sort first are taken.

    Args:
        counts: pieces of text and how often each occurs; no token crosses a piece.
        n_ranks: number of tokens, the 256 single bytes and `MARKS` among them.

    Returns:
        A token's bytes to its rank: bytes 0 to 255, then `MARKS`, then what was joined, in that order.

    Raises:
        UserError: `n_ranks` is too small to hold bytes and `MARKS`, or the pieces run out of pairs.
    """
    ranks = {token: i for i, token in enumerate([*(bytes([byte]) for byte in range(256)), *MARKS])}
    if n_ranks < len(ranks):
        raise UserError(f"{n_ranks} tokens are too few: the single bytes and the marks alone are {len(ranks)}")
    words = [(_join([bytes([byte]) for byte in piece.encode()], ranks), count) for piece, count in counts.items()]
    pair_counts: Counter[bytes] = Counter()
    words_with: defaultdict[bytes, set[int]] = defaultdict(set)  # may still name a word that the pair has left
    for i, (parts, count) in enumerate(words):
        for pair in _pairs(parts):
            pair_counts[pair] += count
            words_with[pair].add(i)
    heap = [(-count, pair) for pair, count in pair_counts.items()]
    heapq.heapify(heap)
    while len(ranks) < n_ranks:
        if not heap:
            raise UserError(f"the text is too small: it gives {len(ranks)} tokens, not {n_ranks}")
        negative_count, best = heapq.heappop(heap)
        if -negative_count != pair_counts[best]:
            continue  # stale: the pair was counted anew, and that count is in the heap too
        ranks[best] = len(ranks)
        changed: set[bytes] = set()
        for i in words_with.pop(best):
            parts, count = words[i]
            joined = _join(parts, ranks)
            for pair in _pairs(parts):
                pair_counts[pair] -= count
                changed.add(pair)
            for pair in _pairs(joined):
                pair_counts[pair] += count
                changed.add(pair)
                words_with[pair].add(i)
            words[i] = joined, count
        for pair in changed:
            if pair_counts[pair] > 0:
                heapq.heappush(heap, (-pair_counts[pair], pair))
    return ranks


def count_pieces(texts: Iterable[str]) -> Counter[str]:
    """How often each piece of the default pattern occurs in `texts`."""
    find = regex.compile(PATTERN).findall
    counts: Counter[str] = Counter()
    for text in texts:
        counts.update(find(valid_text(text)))
    return counts


def weigh_equally(corpora: Sequence[Mapping[str, int]]) -> Counter[str]:
    """Counts of all corpora together, scaled so that each corpus has the same total; in whole numbers, so exactly."""
    totals = [sum(corpus.values()) for corpus in corpora]
    common = math.lcm(*totals)
    counts: Counter[str] = Counter()
    for corpus, total in zip(corpora, totals, strict=True):
        for piece, count in corpus.items():
            counts[piece] += count * (common // total)
    return counts


def problem_texts(source: Source) -> list[str]:
    """Question, written solution and answer of each problem of the source's train split."""
    return [f"{p.question}\n{p.rationale}\n#### {p.answer}\n" for p in source.load("train").problems]


def main(arguments: Sequence[str] | None = None) -> int:
    """The command. Returns its exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m simcot_latent.data.train_tokenizer",
        description="Train the byte-level BPE of the default tokenizer. Each corpus counts equally.",
    )
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="ranks file to write")
    parser.add_argument("--arithmetic", type=int, metavar="N", help="N problems of the embedded source")
    parser.add_argument("--gsm8k", metavar="FOLDER", help="GSM8K's train split in this folder")
    parser.add_argument("--text", type=Path, nargs="+", default=[], metavar="FILE", help="UTF-8 text; each is a corpus")
    parser.add_argument(
        "--vocab-size", type=int, default=2048, metavar="N", help="tokens, special ones counted (default: 2048)"
    )
    options = parser.parse_args(arguments)
    print_whatever_comes()
    try:
        _train(options)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _train(options: argparse.Namespace) -> None:
    corpora: dict[str, list[str]] = {}
    if options.arithmetic is not None:
        corpora["arithmetic"] = problem_texts(Arithmetic(train_size=options.arithmetic))
    if options.gsm8k is not None:
        corpora["gsm8k"] = problem_texts(GSM8K(path=options.gsm8k))
    corpora |= {str(file): [_read(expanded(file, "--text"))] for file in options.text}
    if not corpora:
        raise UserError("nothing to train on: give --arithmetic, --gsm8k or --text")
    out = expanded(options.out, "--out")
    counts = {name: count_pieces(texts) for name, texts in corpora.items()}
    if empty := [name for name, corpus in counts.items() if not corpus]:
        raise UserError(f"no text in {', '.join(empty)}")

    ranks = train_bpe(weigh_equally(list(counts.values())), options.vocab_size - len(SPECIAL_TOKENS))
    try:
        write_ranks(out, ranks)
    except OSError as error:
        raise UserError(f"{out}: cannot write the ranks: {error.strerror}") from error
    tokenizer = default_tokenizer(out)
    print(f"{out}: {tokenizer.n_vocab} tokens, {len(SPECIAL_TOKENS)} of them special")
    for name, texts in corpora.items():
        n_tokens = sum(len(tokenizer.encode(text)) for text in texts)
        whole = sum(n for piece, n in counts[name].items() if piece.encode() in ranks) / counts[name].total()
        print(f"{name}: {len(texts)} texts, {n_tokens / len(texts):.1f} tokens each, {whole:.1%} of pieces one token")


def _read(file: Path) -> str:
    try:
        return file.read_bytes().decode("utf-8")  # bytes: no newline is translated
    except OSError as error:
        raise UserError(f"{file}: cannot read it: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{file}: not UTF-8 text (byte {error.start})") from error


def _pairs(parts: Sequence[bytes]) -> list[bytes]:
    return [left + right for left, right in pairwise(parts)]


def _join(parts: Iterable[bytes], ranks: Mapping[bytes, int]) -> list[bytes]:
    """Joins neighbours that together are a token, as tiktoken does: lowest rank first, from the left, to the end."""
    parts = list(parts)
    while True:
        found = [(ranks[pair], i) for i, pair in enumerate(_pairs(parts)) if pair in ranks]
        if not found:
            return parts
        _, i = min(found)
        parts[i : i + 2] = [parts[i] + parts[i + 1]]


if __name__ == "__main__":
    sys.exit(main())
