"""Regular expressions that cut text into the pieces that tokens never cross, and what is done about unknown ones.

A tokenizer's files name its pattern, and the files may be a stranger's. Some patterns take time that grows
exponentially with the text. Those of `KNOWN_PATTERNS` do not, so tiktoken may match them. Any other is matched by the
`regex` library, which can be told when to stop, and its size is bounded, since compiling it cannot be stopped.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from math import prod

import regex

from simcot_latent.errors import UserError

MAX_PATTERN = 2000
"""Characters of the longest pattern that is read. The longest published one has about 500."""

MAX_REPEATS = 1000
"""The most copies of a part that a pattern may ask for in braces, nested or not."""

SECONDS, SECONDS_PER_CHARACTER = 1.0, 1e-6
"""How long cutting a text may take."""

# Where the default tokenizer cuts text; BPE joins bytes inside a piece only. Every character is in exactly one piece.
# Digits, operators and blanks stand alone, so a number or an operator is the same tokens wherever it stands. There is
# no lookahead: over a very long run of blanks, GPT-2's `\s+(?!\S)` overflows tiktoken's stack.
PATTERN = (
    r"<<|>>|####"  # the marks of the data, one token each
    r"| ?[\p{L}\p{M}]+"  # a word, with the space before it
    r"|[\s\S]"  # any other character, alone
)

GPT2_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
"""https://github.com/openai/gpt-2/blob/master/src/encoder.py; `ByteLevel` of Hugging Face's library."""

DIGITS_PATTERN = r"\p{N}|'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s+(?![^\s\p{N}])|\s+"
"""GPT-2's after every digit has been cut off (SmolLM2): to the blanks before a digit, the text ends there."""

LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
"""https://github.com/meta-llama/llama3/blob/main/llama/tokenizer.py"""

QWEN2_PATTERN = LLAMA3_PATTERN.replace(r"\p{N}{1,3}", r"\p{N}")
"""https://huggingface.co/Qwen/Qwen2.5-0.5B/blob/main/tokenizer.json"""

TIKTOKEN_GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"
"""GPT-2's as tiktoken writes it (tiktoken_ext/openai_public.py); older versions of it have `GPT2_PATTERN`."""

NANOCHAT_PATTERN = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,2}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
)
"""https://github.com/karpathy/nanochat/blob/master/nanochat/tokenizer.py"""

KNOWN_PATTERNS = frozenset(
    (PATTERN, GPT2_PATTERN, TIKTOKEN_GPT2_PATTERN, DIGITS_PATTERN, LLAMA3_PATTERN, QWEN2_PATTERN, NANOCHAT_PATTERN)
)

# A character of each general category that texts have, and blanks, each before each.
_KINDS = "aAǅʰ中\u0301\u0903\u20dd1Ⅷ½_-()«».'$+^°\u2028\u2029 \u00a0\t\n\r\x00\u00ad\ue000"
_PROBE = "".join(before + after for before in _KINDS for after in _KINDS)

_BRACES = re.compile(r"\{(\d*),?(\d*)\}")


def require_pattern(pattern: str) -> None:
    """Refuses a pattern that would take long to compile.

    Raises:
        UserError: it is too long, or its repeats are too many.
    """
    if len(pattern) > MAX_PATTERN:
        raise UserError(f"pattern of {len(pattern):,} characters: must have at most {MAX_PATTERN:,}")
    counts = [max(int(n or 1) for n in match) if max(map(len, match)) < 6 else MAX_REPEATS + 1
              for match in _BRACES.findall(pattern)]  # fmt: skip
    if prod(max(1, count) for count in counts) > MAX_REPEATS:
        raise UserError(f"pattern {pattern[:60]!r}: its repeats in braces are more than {MAX_REPEATS} together")


def pieces(pattern: str, text: str) -> Iterator[str]:
    """The pieces of a text.

    Raises:
        UserError: the pattern takes too long, or is no regular expression to the `regex` library.
    """
    limit = SECONDS + SECONDS_PER_CHARACTER * len(text)
    try:
        for match in regex.finditer(pattern, text, timeout=limit):
            yield match.group()
    except TimeoutError as error:
        raise UserError(
            f"the tokenizer's pattern {pattern[:60]!r} took more than {limit:.0f} s for {len(text):,} characters; "
            "no text can be cut by it"
        ) from error
    except (regex.error, RecursionError, MemoryError, OverflowError) as error:
        raise UserError(f"the tokenizer's pattern {pattern[:60]!r} is not a regular expression ({error})") from error


def leaves_out_text(pattern: str) -> bool:
    """Whether some text is in no piece, which tiktoken would drop.

    Raises:
        UserError: see `pieces`.
    """
    return sum(map(len, pieces(pattern, _PROBE))) < len(_PROBE)


def finds_nothing(pattern: str) -> bool:
    """Whether no text has a piece that is not empty, as far as a text of all kinds of characters tells.

    Raises:
        UserError: see `pieces`.
    """
    return pattern not in KNOWN_PATTERNS and not any(pieces(pattern, _PROBE))
