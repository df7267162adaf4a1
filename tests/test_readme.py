"""README and `docs/`: commands name keys and flags that exist, and what else they show is what the code does.

What can run in seconds is run by `end_to_end/test_documentation.py`.
"""

from __future__ import annotations

import io
import json
import re
import runpy
import shlex
import sys
import xml.etree.ElementTree as ElementTree
from contextlib import redirect_stdout, suppress
from dataclasses import MISSING, fields
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
from documents import BLOCK, INLINE, PAGES, REPOSITORY, Command, blocks, commands, files, load_hooks, settings
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import OmegaConf, open_dict

from simcot_latent.cli import quote_text
from simcot_latent.config import (
    DecoderConfig,
    LatentConfig,
    LoRAConfig,
    LossConfig,
    RunConfig,
    as_plain,
    config_dir,
    instantiate,
    parse,
    typed,
)
from simcot_latent.data.sources.arithmetic import Arithmetic
from simcot_latent.errors import UserError
from simcot_latent.evals import eval_names
from simcot_latent.evaluate import EvalConfig
from simcot_latent.export import ExportConfig
from simcot_latent.import_checkpoint import ImportConfig
from simcot_latent.model.packing import Packing
from simcot_latent.parts import PARTS, find, keys
from simcot_latent.probe import ProbeConfig

hooks = load_hooks()

CONFIGS = {"eval": EvalConfig, "probe": ProbeConfig, "export": ExportConfig, "import": ImportConfig}

# The modules that hydra reads the command line of, and their configuration.
HYDRA = {
    "simcot_latent.train": "train",
    "simcot_latent.probe": "probe",
    "simcot_latent.export": "export",
    "simcot_latent.import_checkpoint": "import",
    **{f"{package}evals.{name}": "eval" for package in ("", "simcot_latent.") for name in eval_names()},
}
PLACEHOLDERS = {"evals.NAME", "simcot_latent.evals.NAME", "benchmarks.<name>"}

EXTENDING = REPOSITORY / "docs/extending.md"
"""The page whose commands need the files that it prints; `end_to_end/test_extending.py` runs every one of them."""

COMMANDS = [command for page in PAGES if page != EXTENDING for command in commands(page)]


def composed(*overrides: str, config: str = "train") -> Any:
    with initialize_config_dir(str(config_dir().resolve()), version_base=None):
        return compose(config, [*overrides])


def single(override: Override) -> str:
    """An override of a sweep, as its first run has it."""
    line = str(override.input_line)
    return f"{override.key_or_group}={next(override.sweep_string_iterator())}" if override.is_sweep_override() else line


def check_hydra(config: str, arguments: list[str]) -> Any:
    """Composes a command line and makes what it configures, short of reading any file.

    Returns:
        The configuration.

    Raises:
        UserError, HydraException: a key or a value is none.
    """
    if "-m" in arguments:
        arguments = list(map(single, OverridesParser.create().parse_overrides([a for a in arguments if a != "-m"])))
    raw = composed(*(quote_text(a) for a in arguments if a not in ("...", "--cfg", "job")), config=config)
    method_or_options = raw.copy()
    with open_dict(method_or_options):
        assert OmegaConf.is_list(method_or_options.pop("use"))  # a command imports these modules before it goes on
    if config == "train":
        parse(method_or_options)
    else:
        typed(CONFIGS[config], method_or_options)
    if raw.get("data") is not None:
        instantiate(raw.data, "data")
    return raw


@lru_cache
def help_of(target: str) -> str:
    """What a program prints for `--help`."""
    out = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), suppress(SystemExit):
        patch.setattr(sys, "argv", [target, "--help"])
        if target.endswith(".py"):
            patch.syspath_prepend(str((REPOSITORY / target).parent))
            runpy.run_path(str(REPOSITORY / target), run_name="__main__")
        else:
            runpy.run_module(target, run_name="__main__", alter_sys=True)
    return out.getvalue()


def check(command: Command) -> None:
    """A command of any kind."""
    program, module = command.words[0], command.module
    if module in PLACEHOLDERS or (not command.is_block and (not command.arguments or command.words[0] == "torchrun")):
        return  # the name of a command, not one to type
    if module in HYDRA:
        check_hydra(HYDRA[module], command.arguments)
    elif program in ("python", "torchrun"):
        target = module or command.words[1]
        assert module or (REPOSITORY / target).is_file()
        flags = {word.partition("=")[0] for word in command.arguments if word.startswith("-")}
        if flags:
            assert flags <= set(re.findall(r"--?[a-z][\w-]*", help_of(target)))
        else:
            assert module is None or (REPOSITORY / (module.replace(".", "/") + ".py")).is_file()
    elif program == "pip":
        assert "install" in command.words or "download" in command.words
        extras = re.findall(r"\[(\w+)\]", command.line)
        assert all(f"\n{extra} = [" in (REPOSITORY / "pyproject.toml").read_text() for extra in extras)
        assert "-c" not in command.words or (REPOSITORY / command.words[command.words.index("-c") + 1]).is_file()
    else:
        assert f'"{program}>=' in (REPOSITORY / "pyproject.toml").read_text()


@pytest.mark.parametrize("command", COMMANDS, ids=str)
def test_commands_name_keys_and_flags_that_exist(command: Command) -> None:
    check(command)


def test_there_are_commands() -> None:
    """And a line that is none, or a key that is none, would be noticed."""
    assert len(COMMANDS) > 50
    assert {command.page for command in COMMANDS} > {"README.md", "running.md", "weights.md"}
    for line in (
        "python -m simcot_latent.train mode=latent latent.n_latent=3",
        "python -m simcot_latent.train loss.step_reduction=mean",
        "python -m simcot_latent.train -m latent.n_latents=2,4 sede=0,1",
        "torchrun --standalone -m simcot_latent.train data.pat=x data=gsm8k",
        "python -m evals.gsm8k ckpt=x limits=3",
        "python -m benchmarks.memory --data x --size S",
        "pip install -c constraint.txt -e .",
        "pip install -e '.[dew]'",
        "tox",
    ):
        with pytest.raises((UserError, HydraException, AssertionError)):
            check(Command("here", line, tuple(shlex.split(line)), is_block=True))


# What else each command needs, in several ways since some values exclude others.
CONTEXTS = [
    ("train", ("data=arithmetic", "out_dir=x")),
    ("train", ("data=gsm8k",)),
    ("train", ("mode=weighted",)),
    ("train", ("latent.stages=0",)),
    *(("train", (f"method={method}",)) for method in ("simcot_codi", "kava", "lotus", "colar", "soft", "icot")),
    ("eval", ("ckpt=x", "data=gsm8k")),
    ("probe", ("ckpt=x", "data=gsm8k")),
    ("export", ("ckpt=x", "out=x")),
    ("import", ("source=x", "kind=codi", "base=x", "out=x")),
]


@lru_cache
def is_setting(code: str) -> bool:
    """Whether some command takes these settings; of `key=`, which is the name of a key, whether it has that key."""
    words = shlex.split(code)
    names = {word[:-1] for word in words if word.endswith("=")}
    words = [word for word in words if not word.endswith("=")]
    for config, others in CONTEXTS:
        given = {word.partition("=")[0] for word in words}
        try:
            raw = check_hydra(config, [*(word for word in others if word.partition("=")[0] not in given), *words])
        except (UserError, HydraException):
            continue
        if all(is_key(raw, name) for name in names):
            return True
    return False


def is_key(raw: Any, name: str) -> bool:
    """Whether a configuration has a key, whatever its value."""
    if (config_dir() / name).is_dir():
        return True  # a group, such as method
    section, _, key = name.rpartition(".")
    return key in ((OmegaConf.select(raw, section) or {}) if section else raw)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_settings_in_the_text_exist(page: Path) -> None:
    found = [re.sub(r"=N\b", "=1", code) for code in settings(page) if code != "key=value"]
    own = {Path(name).stem for name in files(page)}
    assert [code for code in found if not is_setting(code) and code.partition("=")[2] not in own] == []


def test_a_setting_that_is_none_is_noticed() -> None:
    assert is_setting("data.path= latent.n_latents=2")
    for code in ("latent.n_latent=2", "latent.n_latent=", "mode=lattent", "loss.step_reduction=mean", "data.pat="):
        assert not is_setting(code)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_block_is_of_a_known_kind(page: Path) -> None:
    """A block without a language is commands, all of which are checked; drawings are `text`."""
    kinds = {language for language, _ in BLOCK.findall(page.read_text(encoding="utf-8"))}
    assert kinds <= {"", "text", "python", "bash", "yaml", "bibtex"}
    assert page.read_text(encoding="utf-8").count("```") == 2 * len(BLOCK.findall(page.read_text(encoding="utf-8")))
    for body in blocks(page, "python"):
        compile(body, str(page), "exec")


# --- figures and tables ----------------------------------------------------------------------------------------------


def test_the_readme_is_short() -> None:
    assert (REPOSITORY / "README.md").stat().st_size <= 12_000


def test_figures_of_the_readme_are_in_the_log() -> None:
    """Its results, row by row, and its picture of decoded thoughts."""
    log = (REPOSITORY / "results/LOG.md").read_text(encoding="utf-8")
    results = (REPOSITORY / "README.md").read_text(encoding="utf-8").split("\n## Results\n")[1].split("\n## ")[0]
    figures = re.findall(r"[\d.]+% \([\d.]+ to [\d.]+\)", results)
    assert len(figures) >= 6
    assert [figure for figure in figures if figure not in log] == []
    picture = ElementTree.parse(REPOSITORY / "docs/figures/thoughts.svg").getroot()
    texts = list(picture.iter("{http://www.w3.org/2000/svg}text"))
    decoded = [str(element.text) for element in texts if element.get("class") == "step"]
    probabilities = [
        text.removeprefix("p = ") for text in (str(each.text) for each in texts) if text.startswith("p = ")
    ]
    assert len(decoded) == len(probabilities) == 10
    for text, probability in zip(decoded, probabilities, strict=True):
        written = f"<<{text}>>" if "=" in text else f"#### {text}"
        assert f"| `{written}` | {probability} |" in log


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_modules_that_are_named_are_there(page: Path) -> None:
    """By their place in the repository or in the package; tests by their names."""
    named = {code for code in INLINE.findall(page.read_text(encoding="utf-8")) if re.fullmatch(r"[\w/]+\.py", code)}
    named -= files(page).keys()
    places = (
        REPOSITORY,
        REPOSITORY / "simcot_latent",
        *{test.parent for test in REPOSITORY.glob("tests/**/test_*.py")},
    )
    assert [name for name in named if not any((place / name).is_file() for place in places)] == []


def test_the_drawing_of_a_packed_batch() -> None:
    page = (REPOSITORY / "docs/reading-the-code.md").read_text(encoding="utf-8")
    (call,) = re.findall(r"Packing\.of\((.+), tight=True\)", page)
    packing = Packing.of(*json.loads(f"[{call}]"), tight=True)
    for name in ("row_P", "offset_P", "slot_P", "length_B"):
        (drawn,) = re.findall(rf"^{name} +([\d ]+)$", page, re.MULTILINE)
        assert list(map(int, drawn.split())) == getattr(packing, name).tolist(), name
    assert packing.rectangles == tuple((int(a), int(b)) for a, b in re.findall(r"rectangle (\d) x (\d)", page))
    assert packing.slots - len(packing) == 1  # slot 17


GROUPS = ("data", "model", "tokenizer")  # lora is a group as well, with one set of keys
ROW = re.compile(r"^\| `([\w.]+)` \| `.+` \|.* \w.*\|$", re.MULTILINE)


def test_the_options_page_has_every_key() -> None:
    """With a default and a meaning each; it is generated."""
    page = hooks.options_page()
    parts = re.split(r"^## (.+)$", page, flags=re.MULTILINE)[1:]
    found = {title: set(ROW.findall(part)) for title, part in zip(parts[::2], parts[1::2], strict=True)}
    assert list(found) == list(hooks.COMMANDS)
    for title, (_, config, _) in hooks.COMMANDS.items():
        raw = as_plain(composed(config=config))
        sections = [key for key, value in raw.items() if isinstance(value, dict) and key not in GROUPS]
        wanted = (raw.keys() | {f"{section}.{key}" for section in sections for key in raw[section]}) - {*sections}
        assert wanted <= found[title]
    for group in GROUPS:
        for choice in hooks.choices(group):
            values = as_plain(composed(f"{group}={choice}"))[group]
            assert {f"{group}.{key}" for key in values if key != "_target_"} <= found["Training"]
    for option, default in {
        "latent.n_latents": "5",
        "data.version": "2",
        "out_dir": "null",
        "mode": "latent",
        "loop": "sequential",
        "terms": "[]",
        "use": "[]",
    }.items():
        assert f"| `{option}` | `{default}` | " in page


@pytest.mark.parametrize("group", hooks.GROUPS)
def test_parts_are_those_of_the_table_and_of_the_pages(group: str) -> None:
    """Each has a yaml file, and a line on the options page and on that about methods."""
    several = {"distill": {"none", "hidden_kv"}}.get(group, set())  # of which a method may have more than one
    assert hooks.choices(group) == sorted({*keys(group), *several})
    page, methods = hooks.options_page(), (REPOSITORY / "docs/methods.md").read_text(encoding="utf-8")
    for key in keys(group):
        assert f"\n- `{group}={key}`: " in page
        assert f"\n| `{group}={key}` | " in methods
    for mode in ("latent", "weighted"):
        value = as_plain(composed(f"mode={mode}"))[group] or "none"
        assert f"`{group}={value}`" in page.split(f"### Keys of mode={mode}\n")[1].split("\n###")[0]


@pytest.mark.parametrize(("group", "key"), [(group, key) for group in hooks.GROUPS for key in PARTS[group]])
def test_the_settings_of_a_part_are_keys_of_its_yaml_and_of_the_options_page(group: str, key: str) -> None:
    """With the defaults of its class, and a meaning."""
    section, config = hooks.GROUPS[group], find(group, key).Config
    shared = {field.name for cls in (LatentConfig, DecoderConfig, LossConfig) for field in fields(cls)}
    own = {field.name for field in fields(config) if field.name not in shared}
    options, values = hooks.own_options(group, key), as_plain(composed(f"{group}={key}"))[section]
    assert {option.key for option in options} == {f"{section}.{name}" for name in own}
    assert {name: values[name] for name in own} == {name: getattr(config(), name) for name in own}
    page = hooks.options_page()
    parts = page.split(f"\nFurther keys with `{group}={key}`:\n")
    assert len(parts) == (2 if own else 1)
    for option in options:
        line = hooks.row([f"`{option.key}`", f"`{option.default}`", option.meaning])
        assert ROW.fullmatch(line)
        assert f"\n{line}\n" in parts[1].split("\nFurther keys")[0]


@pytest.mark.parametrize("method", hooks.choices("method"))
def test_methods_are_on_the_pages(method: str) -> None:
    assert f"\n- `method={method}`: " in hooks.options_page()
    assert f"`method={method}`" in (REPOSITORY / "docs/methods.md").read_text(encoding="utf-8")


def test_an_option_without_a_meaning_is_noticed() -> None:
    class Section:
        """Nothing is said here of `key`."""

        def __init__(self, key: int = 1) -> None:
            self.key = key

    with pytest.raises(KeyError):
        hooks.options_in(Section, {"key": 1}, "section.")


@pytest.mark.parametrize(
    ("cls", "section", "config"),
    [
        (LatentConfig, "latent", "train"),
        (DecoderConfig, "decoder", "train"),
        (LossConfig, "loss", "train"),
        (LoRAConfig, "lora", "train"),
        (RunConfig, None, "train"),
        (Arithmetic, "data", "train"),
        *((cls, None, config) for config, cls in CONFIGS.items()),
    ],
)
def test_defaults_in_the_code_are_those_of_the_yaml(cls: type, section: str | None, config: str) -> None:
    values = as_plain(composed(config=config))
    values = values if section is None else values[section]
    for field in fields(cls):
        if field.name in ("model", "data", "tokenizer", "lora", "rationale", "mode") and section is None:
            continue  # groups, and what a mode sets
        if cls is Arithmetic and field.name == "version":
            continue  # in code the default is what settings without a version mean, those of earlier checkpoints
        default = field.default if field.default_factory is MISSING else field.default_factory()
        default = list(default) if isinstance(default, tuple) else default
        assert default == values[field.name], field.name
