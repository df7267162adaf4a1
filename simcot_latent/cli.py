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
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from simcot_latent.checkpoint import CONFIG, Checkpoint, setting
from simcot_latent.config import as_plain, config_dir, instantiate, one_line
from simcot_latent.data.sources import Source
from simcot_latent.errors import UserError
from simcot_latent.files import is_plain

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


def trained_source(raw: DictConfig, checkpoint: Checkpoint) -> tuple[Source, dict[str, Any]]:
    """The data source of an eval or a probe, and its settings.

    Which source it is, the command line says. If it is the one that the model was trained on, it has its settings then,
    with this command's overrides: so an embedded test set has the difficulty that was trained for, and a local
    `data.path` is remembered. What the checkpoint says is taken as it stands, since the folder may be a stranger's:
    plain values for fields of that source, nothing to import, to call or to resolve.

    Raises:
        UserError: the checkpoint says anything else, or the source refuses a value.
    """
    settings, trained = as_plain(raw.data), setting(checkpoint, "data")
    file = f"{checkpoint.path}/{CONFIG}"
    remembered: dict[str, Any] = {}
    if trained["_target_"] == settings["_target_"]:
        given = {key.removeprefix("data.").partition(".")[0] for key in overridden("data")}
        for key, value in trained.items():
            if key == "_target_" or key in given or value == settings.get(key):
                continue
            if key.startswith("_"):
                raise UserError(f"{file}: run.data.{key}: is no setting of a data source")
            if not is_plain(value):
                raise UserError(
                    f"{file}: run.data.{key}: must be a number, a text, a truth value, null or a list of those; if you "
                    f"trust it, give data.{key}= yourself"
                )
            remembered[key] = value
    try:
        return instantiate(raw.data, "data", remembered), settings | remembered
    except UserError as error:
        blamed = any(f"data.{key}" in str(error) or f"'{key}'" in str(error) for key in remembered)
        raise UserError(f"{error} ({file} says so)" if blamed else str(error)) from error


def fail(error: Exception) -> NoReturn:
    """Prints an error as one line and exits."""
    print(f"error: {message_of(error)}", file=sys.stderr)
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
