"""From a command line to a function: hydra's overrides, and errors as one line."""

from __future__ import annotations

import functools
import os
import re
import sys
from collections.abc import Callable
from typing import Any, NoReturn

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from simcot_latent.config import as_plain, config_dir, one_line
from simcot_latent.errors import UserError

# Keys whose value is free text or a path: taken as it stands, whatever hydra's grammar makes of `?`, `,` or `'`.
TEXT_KEYS = ("question", "ckpt", "data.path", "out_dir", "init_from", "run", "out", "source", "base")

QUOTED = re.compile(r"""'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*\"""", re.DOTALL)


def run(main: Callable[[DictConfig], None], config_name: str) -> None:
    """Runs a command: composes `configs/<config_name>.yaml` with the command line's overrides and calls `main`.

    A `UserError`, or anything hydra finds wrong with the overrides, is printed as one line; the exit status is then 2.
    """
    os.environ["HYDRA_FULL_ERROR"] = "1"  # exceptions reach us, instead of being printed with part of a traceback
    sys.argv[1:] = [quote_text(argument) for argument in sys.argv[1:]]

    composed = False

    @functools.wraps(main)
    def task(raw: DictConfig) -> None:
        nonlocal composed
        composed = True
        try:
            main(raw)
        except (UserError, OmegaConfBaseException) as error:
            fail(error)  # here, since hydra would announce an exception with lines of its own

    try:
        hydra.main(version_base="1.3", config_path=str(config_dir()), config_name=config_name)(task)()
    except (HydraException, OmegaConfBaseException, ValueError) as error:
        if composed:  # ours
            raise
        fail(error)  # a plain ValueError is hydra's word for data=null
    except BrokenPipeError:  # the reader of a pipe (`| head`) has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)


def overridden(section: str) -> list[str]:
    """The keys of a section that the command line sets, such as `model` or `model.n_layer`."""
    keys = [override.partition("=")[0].lstrip("+") for override in HydraConfig.get().overrides.task]
    return [key for key in keys if key == section or key.startswith(f"{section}.")]


def trained_data(raw: DictConfig, trained: dict[str, Any]) -> dict[str, Any]:
    """The settings of the data source of an eval or a probe.

    If it is the source that the model was trained on, its settings then (`trained`), with this command's overrides: so
    an embedded test set has the difficulty that was trained for, and a local `data.path` is remembered.
    """
    settings = as_plain(raw.data)
    if settings["_target_"] != trained["_target_"]:
        return settings
    merged = OmegaConf.create(trained)
    for key in overridden("data"):
        if key != "data":
            OmegaConf.update(merged, key.removeprefix("data."), OmegaConf.select(raw, key), force_add=True)
    return as_plain(merged)


def fail(error: Exception) -> NoReturn:
    """Prints an error as one line and exits; of the ranks of a torchrun that find the same, one prints it."""
    from simcot_latent.distributed import first_to_say

    message = message_of(error)
    if first_to_say(message):
        print(f"error: {message}", file=sys.stderr, flush=True)
    sys.exit(2)


def quote_text(argument: str) -> str:
    """Quotes the value of `key=text` for hydra where the key is one of `TEXT_KEYS` and the text is not quoted yet."""
    key, equals, text = argument.partition("=")
    if not equals or key.lstrip("+") not in TEXT_KEYS or text in ("", "null") or QUOTED.fullmatch(text):
        return argument
    if "--multirun" in sys.argv or "-m" in sys.argv:  # there a comma separates the runs of a sweep
        return argument
    # OmegaConf reads \${ as ${, and backslashes in front of it as half as many.
    text = re.sub(r"(\\*)\$\{", r"\1\1\\${", text)
    # Hydra reads \\" inside double quotes, and a run of backslashes before a quote as half as many.
    escaped = re.sub(r'(\\*)"', r'\1\1\\"', text)
    escaped = re.sub(r"(\\+)\Z", r"\1\1", escaped)
    return f'{key}="{escaped}"'


def message_of(error: Exception) -> str:
    """An exception's message, and that of what caused it, on one line."""
    messages = [str(error)]
    if isinstance(error, HydraException) and error.__cause__ is not None:
        messages.append(str(error.__cause__))
    text = one_line(" ".join(messages))
    text = re.sub(r"Config search path:.*?(?=Set|$)", "", text)
    text = text.replace("Set the environment variable HYDRA_FULL_ERROR=1 for a complete stack trace.", "")
    return text.strip()
