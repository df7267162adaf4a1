"""The one exception that a user's mistake ends in, and how a value is refused."""


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
