"""The one exception that a user's mistake ends in."""


class UserError(ValueError):
    """Bad input: the message is one line that names the file, line or key and says what would be right.

    Command-line entries print it as it is, without a traceback, and exit with status 2.
    """
