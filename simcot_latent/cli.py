"""From a command line to a function: hydra's overrides, and errors as one line."""

from __future__ import annotations

import errno
import functools
import io
import os
import re
import sys
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import MISSING, fields, is_dataclass
from typing import TYPE_CHECKING, Any, NoReturn

import hydra
from hydra._internal.utils import get_args_parser
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException, MissingConfigException
from omegaconf import DictConfig, ListConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from simcot_latent.config import REMOVED, as_plain, config_dir, instantiate, literal, one_line
from simcot_latent.data.problem import Problem
from simcot_latent.data.sources import Source, Split, load_first
from simcot_latent.errors import UserError, did_you_mean
from simcot_latent.files import is_plain
from simcot_latent.logs import warn
from simcot_latent.parts import use
from simcot_latent.paths import expanded

if TYPE_CHECKING:  # torch takes seconds to import: too long for a shell that completes a word
    from rich.console import Console

    from simcot_latent.checkpoint import Checkpoint

PATH_KEYS = ("ckpt", "data.path", "out_dir", "init_from", "out", "source", "base", "tokenizer.ranks")
"""Keys whose value is a path: `~` is the home folder."""

# Keys whose value is free text or a path: taken as it stands, whatever hydra's grammar makes of `?`, `,` or `'`.
TEXT_KEYS = (*PATH_KEYS, "question", "run", "wandb_project", "new_token_init")

RENAMED = {"model.projector_width": "latent.projector_width"}
"""Keys of earlier versions, which still serve, and what they are called now."""

MAX_MADE = 100_000
"""The most problems of a split that a checkpoint may have an eval make; a command line may ask for more."""

# What is wrong with the machine, not with the program.
OF_THE_MACHINE = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENAMETOOLONG, errno.EFBIG,
                  errno.ENOTDIR, errno.EISDIR, errno.EIO, errno.ELOOP, errno.EMFILE}  # fmt: skip

QUOTED = re.compile(r"""'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*\"""", re.DOTALL)


def run(main: Callable[[DictConfig], None], config_name: str) -> None:
    """Runs a command: composes `configs/<config_name>.yaml` with the command line's overrides and calls `main`.

    A `UserError`, or anything hydra finds wrong with the overrides, is printed as one line; the exit status is then 2.
    """
    os.environ["HYDRA_FULL_ERROR"] = "1"  # exceptions reach us, instead of being printed with part of a traceback
    print_whatever_comes()
    check_dashes(sys.argv[1:])
    arguments = [under_new_name(argument) for argument in without_nulls(sys.argv[1:], config_name)]
    sys.argv[1:] = flags_last([quote_text(argument) for argument in arguments])

    composed = False

    @functools.wraps(main)
    def task(raw: DictConfig) -> None:
        nonlocal composed
        composed = True
        try:  # here, since hydra would announce an exception with lines of its own
            expand_paths(raw)
            use_parts(raw)
            main(raw)
        except (UserError, OmegaConfBaseException) as error:
            fail(error)
        except OSError as error:
            if error.errno not in OF_THE_MACHINE:
                raise
            fail(UserError(f"{error.filename}: {error.strerror}" if error.filename else str(error.strerror)))

    try:
        hydra.main(version_base="1.3", config_path=str(config_dir()), config_name=config_name)(task)()
    except (HydraException, OmegaConfBaseException, ValueError) as error:
        if composed:  # ours
            raise
        fail(error, config_name)  # a plain ValueError is hydra's word for data=null
    except BrokenPipeError:  # the reader of a pipe (`| head`) has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)


def print_whatever_comes() -> None:
    """Lets nothing that is printed end a command: what a console's encoding lacks is printed as `\\u2265`."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def check_dashes(arguments: list[str]) -> None:
    """Ends the command if a key is written as an option, as in `--mode=latent`.

    Hydra's own options stay, also shortened (`--multi`) or with a value in the same word (`--cfg=job`, `-cjob`).
    """
    actions = get_args_parser()._actions
    for argument in arguments:
        word, equals, value = argument.partition("=")
        options = [o for action in actions if action.nargs != 0 or not equals for o in action.option_strings]
        if word.startswith("--"):
            theirs = any(option.startswith(word) for option in options)
        else:
            theirs = any(word == option if equals else word.startswith(option) for option in options)
        if re.match(r"--?[A-Za-z_]", word) and not theirs:
            fail(UserError(f"{argument}: leave out the dashes, as in {word.lstrip('-')}={value or 'VALUE'}"))


def under_new_name(argument: str) -> str:
    """`key=value` with the present name of a key that has been renamed; one that is gone ends the command."""
    key, equals, value = argument.partition("=")
    plain = key.lstrip("+~")
    if equals and plain in REMOVED:
        fail(UserError(f"{plain}: {REMOVED[plain]}"))
    return f"{key.replace(plain, RENAMED[plain])}{equals}{value}" if plain in RENAMED else argument


def flags_last(arguments: Sequence[str]) -> list[str]:
    """`key=value` first, then hydra's own options: its parser takes no further `key=value` after an option's value."""
    actions = {option: action for action in get_args_parser()._actions for option in action.option_strings}
    overrides: list[str] = []
    flags: list[str] = []
    before: Any = None  # the option before, if a value of it may follow
    for argument in arguments:
        is_option = argument.startswith("-")
        is_value = before is not None and not is_option and (before.nargs is None or argument in before.choices)
        (flags if is_option or is_value else overrides).append(argument)
        matches = [action for option, action in actions.items() if option.startswith(argument)] if is_option else []
        before = matches[0] if matches and matches[0].nargs in (None, "?") else None
    return [*overrides, *flags]


def use_parts(raw: DictConfig) -> None:
    """Imports the modules of `use=[..]`, which register parts; only a command line or its own yaml files name any."""
    modules = [] if raw.get("use") is None else raw.use
    if not isinstance(modules, list | ListConfig) or not all(isinstance(module, str) for module in modules):
        raise UserError(f"use={modules}: must be a list of modules, such as use=[my_parts]")
    use(list(modules))
    with open_dict(raw):
        raw.pop("use", None)


def without_nulls(arguments: list[str], config_name: str) -> list[str]:
    """Leaves out `experiment=null` and the like: what the configuration has as a group's default, but hydra refuses."""
    groups = null_groups(config_name)
    given = [argument.partition("=")[0] for argument in arguments]
    return [a for a in arguments if not any(a == f"{group}=null" and given.count(group) == 1 for group in groups)]


def null_groups(config_name: str) -> set[str]:
    """The groups of which a configuration takes none by default."""
    defaults = OmegaConf.select(OmegaConf.load(config_dir() / f"{config_name}.yaml"), "defaults")
    return {key for entry in defaults if not isinstance(entry, str) for key, value in entry.items() if value is None}


def expand_paths(raw: DictConfig) -> None:
    """Replaces `~` at the start of a path, wherever it was set."""
    for key in PATH_KEYS:
        section, _, name = key.rpartition(".")
        parent = raw if not section else raw.get(section)
        if isinstance(parent, DictConfig) and name in parent and str(parent[name]).startswith("~"):
            parent[name] = literal(str(expanded(parent[name], key)))


def overridden(section: str) -> list[str]:
    """The keys of a section that the command line sets, such as `model` or `model.n_layer`."""
    keys = [override.partition("=")[0].lstrip("+") for override in HydraConfig.get().overrides.task]
    return [key for key in keys if key == section or key.startswith(f"{section}.")]


def trained_problems(
    raw: DictConfig, checkpoint: Checkpoint, split: Split, limit: int | None, console: Console
) -> tuple[Sequence[Problem], Source, dict[str, Any]]:
    """The first `limit` problems (None: all) of a split of `trained_source`, which it also gives.

    What is worth a line about the settings and the problems is printed.

    Raises:
        UserError: see `trained_source` and `load_first`.
    """
    source, data = trained_source(raw, checkpoint, split, limit)
    for note in data_notes(raw, checkpoint, data):
        console.print(note)
    for key, value, trained in other_settings(data, checkpoint.config["data"]):
        warn(console, f"data.{key}={value}, but {trained} in training: what is new to this model there is not known")
    loaded = load_first(source, split, limit)
    for note, count in sorted(loaded.notes.items()):
        console.print(f"{split}: {count} x {note}")
    return loaded.problems, source, data


def trained_source(
    raw: DictConfig, checkpoint: Checkpoint, split: Split, limit: int | None
) -> tuple[Source, dict[str, Any]]:
    """The data source of an eval or a probe of the first `limit` problems of a split, and its settings.

    Which source it is, the command line says. If it is the one that the model was trained on, it has its settings then,
    with this command's overrides: so an embedded test set has the difficulty that was trained for, and a local
    `data.path` is remembered. What the checkpoint says is taken as it stands, since the folder may be a stranger's:
    plain values for fields of that source, nothing to import, to call or to resolve.

    Raises:
        UserError: the checkpoint says anything else, or the source refuses a value.
    """
    from simcot_latent.checkpoint_config import setting
    from simcot_latent.checkpoint_folders import CONFIG

    settings, trained = as_plain(raw.data), setting(checkpoint, "data")
    file = f"{checkpoint.path}/{CONFIG}"
    remembered: dict[str, Any] = {}
    if trained["_target_"] == settings["_target_"]:
        source_class = hydra.utils.get_class(settings["_target_"])
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
            makes = hasattr(source_class, "load_first")  # its problems, where others read as many as a file holds
            bounded = ["validation_size", "test_size"]
            if split == "train" and (limit is None or limit > MAX_MADE):  # of which there may well be more in training
                bounded.append("train_size")
            if makes and key in bounded and type(value) is int and value > MAX_MADE:
                raise UserError(
                    f"{file}: run.data.{key}={value}: must be at most {MAX_MADE:,}; if you trust it, give "
                    f"data.{key}= yourself{', or give a limit=' if key == 'train_size' else ''}"
                )
            remembered[key] = value
        # A setting that came into being later has the value that a source has without it: the class's default, which is
        # not the yaml file's where the data changed (data.version).
        later = (
            [f for f in fields(source_class) if f.name not in trained.keys() | given]
            if is_dataclass(source_class)
            else []
        )
        remembered |= {f.name: f.default for f in later if f.default not in (MISSING, settings.get(f.name))}
    try:
        source = instantiate(raw.data, "data", remembered)
    except UserError as error:
        blamed = any(f"data.{key}" in str(error) or f"'{key}'" in str(error) for key in remembered)
        raise UserError(f"{error} ({file} says so)" if blamed else str(error)) from error
    if "path" in remembered and hasattr(source, "tells_names"):
        source.tells_names = False
    return source, settings | remembered


def data_notes(raw: DictConfig, checkpoint: Checkpoint, data: dict[str, Any]) -> Iterable[str]:
    """What is worth a line about the settings that `trained_source` chose."""
    trained = checkpoint.config["data"]["_target_"]
    if trained != data["_target_"]:
        yield f"trained on {trained[:100]!r}, not on {data['_target_']}: the settings are the command line's"
    for key in ("path", "tolerance"):
        if data.get(key) != raw.data.get(key):
            yield f"data.{key}={data[key]}, as in training"


def other_settings(data: dict[str, Any], trained: dict[str, Any]) -> list[tuple[str, Any, Any]]:
    """Settings of a source that decide which problems are held out and differ from training: name, here, then.

    A model may have been trained on problems that such a test set holds.
    """
    if data.get("_target_") != trained.get("_target_"):
        return []
    return [(k, data[k], trained[k]) for k in ("version", "unseen_steps") if k in trained and data.get(k) != trained[k]]


def choose_tolerance(given: float | None, source: Source) -> float:
    """How far an answer may be from gold and still be right, see `same_number`: as given, or as the data state it."""
    return getattr(source, "tolerance", 0.0) if given is None else given


def fail(error: Exception, config_name: str | None = None) -> NoReturn:
    """Prints an error as one line and exits; of the ranks of a torchrun that find the same, one prints it.

    Args:
        config_name: what was composed, if the error came of that.
    """
    from simcot_latent.distributed import first_to_say

    message = message_of(error, set() if config_name is None else null_groups(config_name))
    if first_to_say(message):
        print(f"error: {message}", file=sys.stderr, flush=True)
    sys.exit(2)


def quote_text(argument: str) -> str:
    """Quotes the value of `key=text` for hydra where the key is one of `TEXT_KEYS` and the text is not quoted yet."""
    key, equals, text = argument.partition("=")
    if not equals or key.lstrip("+") not in TEXT_KEYS or text in ("", "null") or QUOTED.fullmatch(text):
        return argument
    sweeps = "--multirun" in sys.argv or "-m" in sys.argv
    if sweeps and any(mark in text for mark in (",", "(")):
        return argument  # there a comma separates the runs
    if not sweeps:  # where each run may be named after its settings
        # OmegaConf reads \${ as ${, and backslashes in front of it as half as many.
        text = re.sub(r"(\\*)\$\{", r"\1\1\\${", text)
    # Hydra reads \\" inside double quotes, and a run of backslashes before a quote as half as many.
    escaped = re.sub(r'(\\*)"', r'\1\1\\"', text)
    escaped = re.sub(r"(\\+)\Z", r"\1\1", escaped)
    return f'{key}="{escaped}"'


def message_of(error: Exception, nullable: Collection[str] = ()) -> str:
    """An exception's message, and that of what caused it, on one line.

    Args:
        nullable: the groups that may be null.
    """
    if isinstance(error, MissingConfigException) and error.missing_cfg_file and error.options:
        group, _, name = error.missing_cfg_file.rpartition("/")
        choices = [*error.options, "null"] if group in nullable else error.options
        return f"{group}={name}: must be one of {', '.join(choices)}{did_you_mean(name, choices)}"
    if match := re.match(r"Could not override '(.+?)'", str(error)):
        return f"{match[1]}: no such key{nearest_keys(match[1], error.__cause__)}"
    if isinstance(error, ValueError) and "Config group override must be" in str(error):  # `mode=null`
        for argument in (a for a in sys.argv[1:] if a.endswith("=null")):
            group = argument.removesuffix("=null").lstrip("+")
            if group and (config_dir() / group).is_dir():
                choices = sorted(file.stem for file in (config_dir() / group).glob("*.yaml"))
                choices += ["null"] if group in nullable else []
                plus = "; leave out the +" if argument.startswith("+") else ""
                return f"{argument}: must be one of {', '.join(choices)}{plus}"
    messages = [str(error)]
    if isinstance(error, HydraException) and error.__cause__ is not None:
        messages.append(str(error.__cause__))
    text = one_line(" ".join(messages))
    text = re.sub(r"Config search path:.*?(?=Set|$)", "", text)
    text = text.replace("Set the environment variable HYDRA_FULL_ERROR=1 for a complete stack trace.", "")
    return text.strip()


def nearest_keys(key: str, error: BaseException | None) -> str:
    """`did_you_mean` among the keys of the configuration that the error came from; sections may be left out."""
    node = getattr(error, "parent_node", None)
    if not isinstance(node, DictConfig):
        return ""
    keys = list(dotted_keys(node._get_root()))
    within = {known.rpartition(".")[2]: known for known in keys}
    return f"; did you mean {within[key]}?" if key in within else did_you_mean(key, keys) or did_you_mean(key, within)


def dotted_keys(node: Any, prefix: str = "") -> Iterable[str]:
    """Every key of a configuration, sections included, as it is typed; hydra's own are left out."""
    for key in node:
        name = f"{prefix}{key}"
        if name != "hydra" and key != "_target_":
            yield name
            child = OmegaConf.select(node, str(key)) if not OmegaConf.is_interpolation(node, key) else None
            if isinstance(child, DictConfig):
                yield from dotted_keys(child, f"{name}.")
