"""Byte-level BPE by two rules: Hugging Face's list of pairs, and tiktoken's ranks.

The two libraries do BPE by different rules. Hugging Face's joins the pairs of a list, the earliest in the list first.
tiktoken joins any two neighbours that make a token, the token of the lowest id first, and takes a piece that is a token
as it is. They agree for every text if the list is in the order of its results' ids, and if a token's own bytes, under
tiktoken's rule and with the tokens of lower ids only, end as a pair of the list: whatever stands around these bytes,
nothing that is joined before the token crosses its borders, so no other pair that makes the token ever meets.
`tokenizer_of_tokens` checks both; `merges_of` finds the pairs of the list that way.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from heapq import heappop, heappush
from itertools import pairwise

from simcot_latent.data.patterns import leaves_out_text
from simcot_latent.data.tokenizer import Tokenizer
from simcot_latent.errors import UserError

# The characters that byte-level BPE writes bytes as: printable Latin-1 as itself, the others from U+0100 on
# (`bytes_to_unicode` of GPT-2's encoder.py).
_PRINTABLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
_OTHERS = [byte for byte in range(256) if byte not in _PRINTABLE]
_CHARACTER = {byte: chr(byte) for byte in _PRINTABLE} | {byte: chr(256 + i) for i, byte in enumerate(_OTHERS)}
_BYTE = {character: byte for byte, character in _CHARACTER.items()}

# `x{1,3}+` is possessive in tiktoken's regular expressions, and `(x{1,3})+` in Hugging Face's.
AMBIGUOUS = re.compile(r"\{\d*,?\d*\}\+")

MAX_TOKEN = 1024
"""Characters of the longest token that is read; the longest published ones are runs of 128 blanks."""


def tokenizer_of_tokens(
    name: str,
    tokens: Sequence[str],
    merges: Sequence[str],
    pattern: str,
    special: Collection[int],
    roles: Mapping[str, str],
    *,
    normal_form: str | None = None,
    ignore_merges: bool = False,
) -> Tokenizer:
    """A byte-level BPE that joins pairs of a list (see the module's docstring), as a tiktoken encoding.

    A token that no text can give stands for nothing here; it is called `<|unused_ID|>`.

    Args:
        name: the tokenizer's.
        tokens: by id; bytes written in byte-level characters, special tokens as they are.
        merges: the pairs, each joined by a blank, the most urgent first.
        pattern: see `Tokenizer`.
        special: the ids of tokens that are special.
        roles, normal_form: see `Tokenizer`.
        ignore_merges: whether a piece that is a token is taken as it is.

    Raises:
        UserError: the two rules do not agree, or see `Tokenizer`. The message names no file: the caller knows it.
    """
    if AMBIGUOUS.search(pattern):
        raise UserError(f"pattern {pattern!r}: a + after braces means another thing in tiktoken")
    special_tokens = {tokens[i]: i for i in sorted(special)}
    if longest := [token for token in tokens if len(token) > MAX_TOKEN]:
        raise UserError(
            f"token {longest[0][:20]!r}... has {len(longest[0]):,} characters; at most {MAX_TOKEN:,} are read"
        )
    id_of = {token: i for i, token in enumerate(tokens) if token not in special_tokens}
    try:
        bytes_of = {i: bytes(map(_BYTE.__getitem__, token)) for token, i in id_of.items()}
    except KeyError as error:
        raise UserError(f"its tokens are not byte-level: {error.args[0]!r} stands for no byte") from error
    pairs: set[tuple[bytes, bytes]] = set()
    results: list[int] = []
    for merge in merges:
        left, _, right = merge.partition(" ")
        if not {left, right, left + right} <= id_of.keys():
            raise UserError(f"merge {merge!r} is not of tokens")
        pairs.add((bytes_of[id_of[left]], bytes_of[id_of[right]]))
        results.append(id_of[left + right])
    for before, after in pairwise(results):
        if before > after:
            raise UserError(f"its merges are not in the order of ids: {tokens[after]!r} comes after {tokens[before]!r}")
    ranks = {token: i for i, token in bytes_of.items() if len(token) == 1}
    missing = bytes(byte for byte in range(256) if bytes([byte]) not in ranks)
    every_token = set(bytes_of.values())
    for i, token in sorted(bytes_of.items()):
        if len(token) == 1:
            continue
        if tuple(_bpe(token, ranks)) in pairs:
            ranks[token] = i
            continue
        splits = {(token[:n], token[n:]) for n in range(1, len(token))}
        if ignore_merges and all(split in pairs for split in splits if every_token.issuperset(split)):
            ranks[token] = i  # a whole piece, or whatever makes it: so Hugging Face writes what was tiktoken's
        elif not ignore_merges and splits.isdisjoint(pairs):
            special_tokens[unused(i)] = i
        else:
            raise UserError(
                f"its merges make {tokens[i]!r} in another way than tiktoken, which joins any two neighbours"
            )
    tokenizer = Tokenizer(name, pattern, ranks, special_tokens, roles, normal_form, missing)
    if leaves_out_text(pattern):
        raise UserError(f"pattern {pattern!r} leaves out text, which tiktoken would drop")
    return tokenizer


def merges_of(ranks: Mapping[bytes, int]) -> list[str]:
    """The pairs, as `tokenizer_of_tokens` takes them, that make the tokens of a tiktoken encoding."""
    before: dict[bytes, int] = {token: i for token, i in ranks.items() if len(token) == 1}
    merges: list[str] = []
    for token, i in sorted(ranks.items(), key=lambda item: item[1]):
        if len(token) > 1:
            parts = _bpe(token, before)
            pairs = [parts]
            if len(parts) > 2:  # a whole piece, or made by tokens of higher ids: by any two that are tokens
                splits = [(token[:n], token[n:]) for n in range(1, len(token))]
                pairs = [split for split in splits if ranks.keys() >= set(split)]
            merges += [" ".join(map(byte_level, pair)) for pair in pairs]
            before[token] = i
    return merges


def _bpe(token: bytes, ranks: Mapping[bytes, int]) -> list[bytes]:
    """What tiktoken's rule joins the bytes of a token to: of all neighbours that are a token together those of the
    lowest rank, the first of them, again and again.
    """
    n = len(token)
    ends = list(range(1, n + 1))  # where the part that starts at each byte ends
    before = list(range(-1, n))  # where the part before it starts; at the end of the token, the last part's start
    heap: list[tuple[int, int, int]] = []

    def offer(start: int) -> None:
        """The pair of the part at `start` and the next, if it is a token."""
        middle = ends[start]
        if start >= 0 and middle < n and (rank := ranks.get(token[start : ends[middle]])) is not None:
            heappush(heap, (rank, start, ends[middle]))

    is_part = [True] * n
    for start in range(n):
        offer(start)
    while heap:
        _, start, end = heappop(heap)
        middle = ends[start]
        if not is_part[start] or middle >= n or ends[middle] != end:
            continue  # one of the two has been joined to another since
        is_part[middle] = False
        ends[start], before[end] = end, start
        offer(start)
        if start > 0:
            offer(before[start])
    return [token[start : ends[start]] for start in range(n) if is_part[start]]


def byte_level(token: bytes) -> str:
    return "".join(map(_CHARACTER.__getitem__, token))


def unused(i: int) -> str:
    return f"<|unused_{i}|>"
