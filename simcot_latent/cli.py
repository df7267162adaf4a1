"""From a command line to a function: hydra's overrides, and errors as one line."""

from __future__ import annotations

import functools
import os
import re
import sys
from collections.abc import Callable
from typing import NoReturn

import hydra
from hydra.errors import HydraException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from simcot_latent.config import config_dir
from simcot_latent.errors import UserError

# Keys whose value is free text or a path: taken as it stands, whatever hydra's grammar makes of `?`, `,` or `'`.
TEXT_KEYS = ("question", "ckpt", "data.path", "out_dir", "init_from", "run", "out")


def run(main: Callable[[DictConfig], None], config_name: str) -> None:
    """Runs a command: composes `configs/<config_name>.yaml` with the command line's overrides and calls `main`.

    A `UserError`, or anything hydra finds wrong with the overrides, is printed as one line; the exit status is then 2.
    """
    os.environ["HYDRA_FULL_ERROR"] = "1"  # exceptions reach us, instead of being printed with part of a traceback
    sys.argv[1:] = [quote_text(argument) for argument in sys.argv[1:]]

    @functools.wraps(main)
    def task(raw: DictConfig) -> None:
        try:
            main(raw)
        except UserError as error:
            fail(error)  # here, since hydra would announce an exception with lines of its own

    try:
        hydra.main(version_base="1.3", config_path=str(config_dir()), config_name=config_name)(task)()
    except (HydraException, OmegaConfBaseException) as error:
        fail(error)


def fail(error: Exception) -> NoReturn:
    """Prints an error as one line and exits."""
    print(f"error: {one_line(error)}", file=sys.stderr)
    sys.exit(2)


def quote_text(argument: str) -> str:
    """Quotes the value of `key=text` for hydra where the key is one of `TEXT_KEYS` and the text is not quoted yet."""
    key, equals, text = argument.partition("=")
    if not equals or key.lstrip("+") not in TEXT_KEYS or text in ("", "null") or re.fullmatch(r"(['\"]).*\1", text):
        return argument
    if "--multirun" in sys.argv or "-m" in sys.argv:  # there a comma separates the runs of a sweep
        return argument
    # Hydra reads \\" inside double quotes, and a run of backslashes before a quote as half as many.
    escaped = re.sub(r'(\\*)"', r'\1\1\\"', text)
    escaped = re.sub(r"(\\+)$", r"\1\1", escaped)
    return f'{key}="{escaped}"'.replace("${", "\\${")


def one_line(error: Exception) -> str:
    """An exception's message, and that of what caused it, on one line."""
    messages = [str(error)]
    if isinstance(error, HydraException) and error.__cause__ is not None:
        messages.append(str(error.__cause__))
    text = " ".join(" ".join(message.split()) for message in messages)
    text = re.sub(r"Config search path:.*?(?=Set|$)", "", text)
    text = text.replace("Set the environment variable HYDRA_FULL_ERROR=1 for a complete stack trace.", "")
    return text.strip()
