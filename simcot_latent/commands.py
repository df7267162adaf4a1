"""The commands that pip installs: `simcot-train`, `simcot-eval`, `simcot-probe`, `simcot-export`, `simcot-import`.

Each is `python -m simcot_latent.<module>` by another name. A shell that completes their arguments (`-sc`, see hydra's
https://hydra.cc/docs/tutorials/basic/running_your_app/tab_completion/) asks at every key, so nothing heavy is imported
for it.
"""

from __future__ import annotations

import os
import runpy
import sys

from omegaconf import OmegaConf

from simcot_latent import cli
from simcot_latent.config import CHOICES, config_dir
from simcot_latent.errors import UserError, did_you_mean
from simcot_latent.evals import eval_names

COMPLETION = ("-sc", "--shell-completion")


def train() -> None:
    _run("simcot_latent.train", "train")


def probe() -> None:
    _run("simcot_latent.probe", "probe")


def export() -> None:
    _run("simcot_latent.export", "export")


def import_() -> None:
    _run("simcot_latent.import_checkpoint", "import")


def evaluate() -> None:
    """`simcot-eval <name> ckpt=DIR ..`; the name of an eval comes first."""
    if _completing():
        _complete_eval()
        return
    names = eval_names()
    name, *rest = sys.argv[1:] or [""]
    if name in ("--help", "-h"):
        print(
            f"usage: simcot-eval NAME ckpt=DIR [KEY=VALUE ...]\n\nNAME is one of {', '.join(names)}.\n"
            "`simcot-eval NAME --help` lists the keys."
        )
        return
    if name not in names:
        later = next((argument for argument in rest if argument in names), None)
        if later is not None:
            cli.fail(UserError(f"{later}: the name of the eval comes first, as in `simcot-eval {later} {name}`"))
        given = "which eval?" if not name or "=" in name else f"{name}: is no eval;"
        near = did_you_mean(name, names)
        cli.fail(UserError(f"{given} give one of {', '.join(names)} first, as in `simcot-eval gsm8k ckpt=DIR`{near}"))
    del sys.argv[1]
    _run(f"simcot_latent.evals.{name}", "eval")


def _run(module: str, config_name: str) -> None:
    if _completing():
        _complete(config_name)
    else:
        runpy.run_module(module, run_name="__main__", alter_sys=True)


def _completing() -> bool:
    return any(argument in COMPLETION for argument in sys.argv[1:])


def _complete_eval() -> None:
    """Completes the eval's name, or what follows it as the keys of the eval on its data."""
    line = os.environ.get("COMP_LINE", "")
    words = line.split()
    if "query=bash" in sys.argv and (len(words) < 2 or (len(words) == 2 and not line[-1].isspace())):
        print(" ".join(name for name in eval_names() if name.startswith("".join(words[1:]))))
        return
    if len(words) > 1:
        command, name, *rest = words
        end = " " if line[-1].isspace() else ""
        os.environ["COMP_LINE"] = " ".join([command, f"data={name}", *rest]) + end
    _complete("eval")


def _complete(config_name: str) -> None:
    """Completes a word of the command line: a value of few if that is what it begins, else what hydra knows."""
    line = os.environ.get("COMP_LINE", "")
    word = line.split()[-1] if line and not line[-1].isspace() else ""
    key, equals, begun = word.partition("=")
    values = _values(key.lstrip("+"), config_name) if equals else ()
    if not values:
        cli.run(lambda raw: None, config_name)
        return
    found = [f"{key}={value}" for value in values if value.startswith(begun)]
    print(*found, sep="\n" if "query=fish" in sys.argv else " ")


def _values(key: str, config_name: str) -> tuple[str, ...]:
    """The values of a key that has few, hydra's groups left out; none of any other."""
    few = CHOICES[config_name] | {"device": ("auto", "cpu", "cuda", "mps"), "resume": ("true", "false", "auto")}
    if key in few:
        return few[key]
    for file in (config_name, "mode/latent") if config_name == "train" else (config_name,):
        if isinstance(OmegaConf.select(OmegaConf.load(config_dir() / f"{file}.yaml"), key), bool):
            return "true", "false"
    return ()
