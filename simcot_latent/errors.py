"""The one exception that a user's mistake ends in, and how a value or a file is refused."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from difflib import get_close_matches


class UserError(ValueError):
    """Bad input: the message is one line that names the file, line or key and says what would be right.

    Command-line entries print it as it is, without a traceback, and exit with status 2. It may quote what a stranger's
    file says: line breaks, terminal escapes and the like are shown as `\\n`, `\\x1b`.
    """

    def __init__(self, message: str = "") -> None:
        super().__init__("".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in message))


def require(ok: bool, key: str, value: object, right: str) -> None:
    """Raises a `UserError` that names the key, its value and what would be right, unless `ok`."""
    if not ok:
        raise UserError(f"{key}={'null' if value is None else value}: must be {right}")


def require_choice(key: str, value: object, choices: tuple[str, ...]) -> None:
    """`require` for a value that is one of a few words."""
    require(value in choices, key, value, f"one of {', '.join(choices)}{did_you_mean(str(value), choices)}")


def some(words: Iterable[str], most: int = 3) -> str:
    """The first few of what may be many, and how many more there are."""
    words = list(words)
    more = f" and {len(words) - most} more" if len(words) > most else ""
    return ", ".join(words[:most]) + more


def either(words: Iterable[str]) -> str:
    """One of several words, for people: `a, b or c`."""
    *others, last = words
    return f"{', '.join(others)} or {last}" if others else last


def did_you_mean(typed: str, known: Iterable[str]) -> str:
    """The end of a message about a word that is not known: the one or two that are nearest to it, if any is near."""
    by_lower = {word.lower(): word for word in known}
    near = [by_lower[word] for word in get_close_matches(typed.lower(), by_lower, n=2, cutoff=0.7)]
    return f"; did you mean {' or '.join(near)}?" if near else ""


@contextmanager
def file_errors(key: str) -> Iterator[None]:
    """Turns what a file system refuses (a full disk, a read-only folder, a name too long) into a `UserError`.

    Args:
        key: what the line begins with, such as `out_dir=runs/latent`.
    """
    from safetensors import SafetensorError  # which hides the OSError of a save

    try:
        yield
    except BrokenPipeError:
        raise  # of the console, no file
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())
        file = getattr(error, "filename", None)
        raise UserError(f"{key}: {reason}" + (f" ({file})" if file else "")) from error
