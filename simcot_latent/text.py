"""Text that UTF-8 can hold: Python's strings may have lone surrogates, which it has no bytes for."""

from __future__ import annotations

import re

LONE_SURROGATE = re.compile("[\ud800-\udfff]")


def valid_text(text: str) -> str:
    """`text` with U+FFFD for each lone surrogate: one character for one, so that offsets hold."""
    return text if text.isascii() else LONE_SURROGATE.sub("\ufffd", text)


def character_starts(data: bytes) -> list[int]:
    """The byte at which each character of `data.decode("utf-8", errors="replace")` starts."""
    starts: list[int] = []
    begin = 0
    while begin < len(data):
        try:
            data[begin:].decode()
            valid_end = bad_end = len(data)
        except UnicodeDecodeError as error:  # bytes start to end are the ones that become one U+FFFD
            valid_end, bad_end = begin + error.start, begin + error.end
        starts += [i for i in range(begin, valid_end) if data[i] & 0xC0 != 0x80]  # not a continuation byte
        if valid_end < bad_end:
            starts.append(valid_end)
        begin = bad_end
    return starts
