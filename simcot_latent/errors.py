"""The one exception that a user's mistake ends in, and how a value or a file is refused."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class UserError(ValueError):
    """Bad input: the message is one line that names the file, line or key and says what would be right.

    Command-line entries print it as it is, without a traceback, and exit with status 2.
    """


def require(ok: bool, key: str, value: object, right: str) -> None:
    """Raises a `UserError` that names the key, its value and what would be right, unless `ok`."""
    if not ok:
        raise UserError(f"{key}={value}: must be {right}")


def require_choice(key: str, value: object, choices: tuple[str, ...]) -> None:
    """`require` for a value that is one of a few words."""
    require(value in choices, key, value, f"one of {', '.join(choices)}")


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
