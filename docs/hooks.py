"""What MkDocs builds besides the pages of this folder: the options page, and pages from elsewhere in the repository.

MkDocs calls `on_files` and `on_page_markdown` (https://www.mkdocs.org/user-guide/configuration/#hooks). Nothing is
fetched from a network.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from hydra import compose, initialize_config_dir
from hydra.utils import get_class, get_object
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page
from omegaconf import OmegaConf

from simcot_latent.config import SECTIONS, LoRAConfig, MethodConfig, config_dir
from simcot_latent.parts import NONE, PARTS, find

REPOSITORY = Path(__file__).parents[1]

# Pages that are files elsewhere in the repository. Links between them are rewritten.
ELSEWHERE = {
    "README.md": "index.md",
    "results/LOG.md": "log.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "LICENSE": "LICENSE",
}

# The commands: their title, their configuration in configs/, and the dataclass behind it.
COMMANDS = {
    "Training": ("python -m simcot_latent.train", "train", "simcot_latent.config.RunConfig"),
    "Evaluating": ("python -m evals.NAME", "eval", "simcot_latent.evaluate.EvalConfig"),
    "Probing": ("python -m simcot_latent.probe", "probe", "simcot_latent.probe.ProbeConfig"),
    "Importing": (
        "python -m simcot_latent.import_checkpoint",
        "import",
        "simcot_latent.import_checkpoint.ImportConfig",
    ),
    "Exporting": ("python -m simcot_latent.export", "export", "simcot_latent.export.ExportConfig"),
}
MODEL = "simcot_latent.model.gpt.GPTConfig"
NOT_KEYS = {"vocab_size"}  # the tokenizer sets it

# A section of a docstring (Google's style), and an item in it: names, and what they mean.
SECTION = re.compile(r"^(?:Attributes|Args):\n((?: {4}.*\n?|\n)+)", re.MULTILINE)
ITEM = re.compile(r"^ {4}(\w+(?:, \w+)*): (.*(?:\n {8}.*)*)", re.MULTILINE)

# Where a configuration's default is not what a command has.
DEFAULTS = {("eval", "data"): "NAME"}

# The groups that the parts of a method are chosen from, and the section that the settings of their parts are keys of.
GROUPS = {"curriculum": "latent", "loop": "latent", "steps": "loss", "distill": "loss", "written": "loss"}

# What no dataclass has a field for.
OTHERS = {
    "experiment": "a method with data, base model and training recipe, a file in `configs/experiment/`, see below.",
    "method": "a method by its name, a choice of parts with their settings, see below and [Methods](methods.md).",
    "use": "modules that register parts of your own, such as `[my_parts]`, see [Extending](extending.md).",
}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the pages that are generated or stand elsewhere."""
    for source, page in ELSEWHERE.items():
        files.append(File.generated(config, page, content=(REPOSITORY / source).read_text(encoding="utf-8")))
    files.append(File.generated(config, "options.md", content=options_page()))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Rewrites the links of a page that stands elsewhere, and of others to such a page."""
    at = {page: source for source, page in ELSEWHERE.items()}.get(page.file.src_uri, f"docs/{page.file.src_uri}")

    def link(match: re.Match[str]) -> str:
        found = (REPOSITORY / at).parent.joinpath(match["target"]).resolve()
        if not found.is_relative_to(REPOSITORY):
            return match[0]
        wanted = found.relative_to(REPOSITORY).as_posix()
        return f"]({ELSEWHERE.get(wanted, wanted.removeprefix('docs/'))}{match['anchor']})"

    return re.sub(r"\]\((?!\w+:)(?P<target>[^()\s#]+)(?P<anchor>(?:#[^()\s]*)?)\)", link, markdown)


# --- the options page ------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Option:
    """One key of a command line: its default as yaml has it, and what it does."""

    key: str
    default: str
    meaning: str


@cache
def options_page() -> str:
    """Every key of every command, from the dataclasses and the yaml files behind them."""
    return "\n".join(_lines())


def _lines() -> Iterator[str]:
    yield "# All options"
    yield ""
    yield "This page is generated from the code: meanings are the docstrings of the configuration classes, defaults are"
    yield "what `configs/*.yaml` compose to. Options are given as `key=value` on the command line, see"
    yield "[Running](running.md#the-command-line)."
    for title, (command, name, cls) in COMMANDS.items():
        yield from ("", f"## {title}", "", f"`{command}`", "", *table(options_of(name, get_class(cls))))
        if name == "train":
            yield from (*_methods(), *_parts(), *_modes(), *_lora())
            yield from (*_sources(), *_models(), *_tokenizers(), *_presets())


def _methods() -> Iterator[str]:
    yield from ("", "### Methods", "")
    yield "Each is a mode with other parts and settings; every key may be set beside it."
    yield ""
    for name in choices("method"):
        choice = chosen("train", f"method={name}")
        parts = ", ".join(f"`{group}={choice[group]}`" for group in GROUPS)
        yield f"- `method={name}`: {comment('method', name)} Parts: {parts}."


def _parts() -> Iterator[str]:
    yield from ("", "### Parts of a method", "")
    yield "A mode or a method chooses them; each may be replaced on the command line, as in `mode=latent loop=pause`."
    for group in GROUPS:
        yield ""
        yield from (f"- `{group}={name}`: {comment(group, name)}" for name in choices(group))
    for group in GROUPS:
        for name in (name for name in choices(group) if name in PARTS[group]):
            if options := own_options(group, name):
                yield from ("", f"Further keys with `{group}={name}`:", "", *table(options))


def own_options(group: str, name: str) -> list[Option]:
    """The keys that only this part has; its others are those of every method."""
    section = GROUPS[group]
    shared = {field.name for cls in SECTIONS.values() for field in dataclasses.fields(cls)}
    cls = find(group, name).Config
    own = [field.name for field in dataclasses.fields(cls) if field.name not in shared]
    found, values = meanings(cls), composed("train", f"{group}={name}")[section] if own else {}
    return [Option(f"{section}.{key}", text_of(values[key]), found[key]) for key in own]


def _lora() -> Iterator[str]:
    yield from ("", "### LoRA keys", "")
    names = choices("lora")
    yield from (row(["key", *(f"`lora={name}`" for name in names), "meaning"]), "|" + "---|" * (len(names) + 2))
    values = [composed("train", f"lora={name}")["lora"] for name in names]
    for options in zip(*(options_in(LoRAConfig, each, "lora.") for each in values), strict=True):
        yield row([f"`{options[0].key}`", *(f"`{option.default}`" for option in options), options[0].meaning])
    yield from ("", *(f"- `lora={name}`: {comment('lora', name)}" for name in names))


def _modes() -> Iterator[str]:
    run_keys = {field.name for field in dataclasses.fields(get_class(COMMANDS["Training"][2]))} - NOT_KEYS - {"mode"}
    for mode in choices("mode"):
        raw = composed("train", f"mode={mode}")
        sets = {key: value for key, value in read_yaml("mode", mode).items() if key in run_keys}
        yield from ("", f"### Keys of mode={mode}", "", comment("mode", mode))
        sets = {key: chosen("train", f"mode={mode}")[key] for key in GROUPS} | sets
        yield "It sets " + ", ".join(f"`{key}={text_of(value)}`" for key, value in sets.items()) + "."
        sections = {} if raw["loop"] == NONE else SECTIONS
        options = [o for key, cls in sections.items() for o in options_in(cls, raw[key], f"{key}.")]
        yield from ("", *(table(options) if options else ["It has no further keys."]))


def _sources() -> Iterator[str]:
    yield from ("", "### Data keys")
    for source in choices("data"):
        values = composed("train", f"data={source}")["data"]
        yield from ("", f"`data={source}`", "", *table(options_in(get_class(values["_target_"]), values, "data.")))


def _models() -> Iterator[str]:
    yield from ("", "### Model keys", "")
    yield "They shape a model that starts from random weights; `init_from` brings a shape of its own."
    values = {name: composed("train", f"model={name}")["model"] for name in choices("model")}
    presets = sorted(values, key=lambda name: values[name]["n_embd"])
    yield from ("", row(["key", *(f"`{name}`" for name in presets), "meaning"]), "|" + "---|" * (len(presets) + 2))
    for options in zip(*(options_in(get_class(MODEL), values[name], "model.") for name in presets), strict=True):
        yield row([f"`{options[0].key}`", *(f"`{option.default}`" for option in options), options[0].meaning])
    yield from ("", *(f"- `model={name}`: {comment('model', name)}" for name in presets))


def _tokenizers() -> Iterator[str]:
    yield from ("", "### Tokenizer keys")
    for name in choices("tokenizer"):
        values = composed("train", f"tokenizer={name}")["tokenizer"]
        options = options_in(get_object(values["_target_"]), values, "tokenizer.")
        yield from ("", f"`tokenizer={name}`" + ("" if options else " has no keys."))
        yield from ("", *table(options)) if options else ()


def _presets() -> Iterator[str]:
    yield from ("", "### Presets", "")
    yield from (f"- `experiment={name}`: {comment('experiment', name)}" for name in choices("experiment"))
    yield from ("", "They share these files of `configs/recipe/`:", "")
    yield from (f"- `{name}`: {comment('recipe', name)}" for name in choices("recipe"))


def options_of(config: str, cls: type) -> list[Option]:
    """The keys of a command, groups included; not the sections that belong to a choice of a group."""
    overrides = ("mode=latent",) if config == "train" else ()
    values = composed(config, *overrides)
    found = meanings(MethodConfig) | OTHERS | meanings(cls)
    keys = [field.name for field in dataclasses.fields(cls) if field.name not in NOT_KEYS]
    if config == "train":
        keys = ["mode", *GROUPS, "terms", *(key for key in keys if key != "mode")]
    groups = chosen(config)
    options = []
    for key in [*keys, "use", *(key for key in groups if key not in keys)]:
        default = DEFAULTS.get((config, key), groups[key] if key in groups else values[key])
        options.append(Option(key, text_of(default), found[key]))
    return sorted(options, key=lambda option: option.key not in groups)


def options_in(cls: Any, values: Mapping[str, Any], prefix: str) -> list[Option]:
    """The keys of a section that a class, or a function, stands behind.

    Raises:
        KeyError: a key has no description.
    """
    found = meanings(cls)
    names = (
        [f.name for f in dataclasses.fields(cls)]
        if dataclasses.is_dataclass(cls)
        else inspect.signature(cls).parameters
    )
    return [Option(prefix + name, text_of(values[name]), found[name]) for name in names if name not in NOT_KEYS]


def meanings(cls: Any) -> dict[str, str]:
    """What the docstring of a dataclass and its bases, or of a function, says of each field or parameter."""
    found: dict[str, str] = {}
    for owner in inspect.getmro(cls) if inspect.isclass(cls) else (cls,):
        for section in SECTION.findall(inspect.cleandoc(owner.__doc__ or "")):
            for names, meaning in ITEM.findall(section):
                for name in names.split(", "):
                    found.setdefault(name, plain(meaning))
    return found


def plain(description: str) -> str:
    """A description as the cell of a table, in the words of yaml."""
    return re.sub(r"(?<!`)\bNone\b(?!`)", "`null`", " ".join(description.split()))


def table(options: Iterable[Option]) -> Iterator[str]:
    """The rows of a Markdown table."""
    yield from ("| key | default | meaning |", "|---|---|---|")
    yield from (row([f"`{option.key}`", f"`{option.default}`", option.meaning]) for option in options)


def row(cells: Sequence[str]) -> str:
    """One row of a Markdown table."""
    return "| " + " | ".join(cell.replace("|", r"\|") for cell in cells) + " |"


def text_of(value: Any) -> str:
    """A value as one types it behind `key=`."""
    return value if isinstance(value, str) and value else json.dumps(value)


@cache
def composed(config: str, *overrides: str) -> dict[str, Any]:
    """A configuration as a command line makes it."""
    with initialize_config_dir(str(config_dir().resolve()), version_base=None):
        return OmegaConf.to_container(compose(config, [*overrides]))  # type: ignore[return-value]


@cache
def chosen(config: str, *overrides: str) -> dict[str, str | None]:
    """Which choice a command takes of each group of ours."""
    with initialize_config_dir(str(config_dir().resolve()), version_base=None):
        raw = compose(config, [*overrides], return_hydra_config=True)
    picked = OmegaConf.to_container(raw.hydra.runtime.choices)
    return {key: value for key, value in picked.items() if not key.startswith("hydra")}  # type: ignore[union-attr]


def choices(group: str) -> list[str]:
    """The choices of a group."""
    return sorted(file.stem for file in (config_dir() / group).glob("*.yaml"))


def read_yaml(group: str, name: str) -> dict[str, Any]:
    """A file of a group, as it stands."""
    return yaml.safe_load((config_dir() / group / f"{name}.yaml").read_text(encoding="utf-8")) or {}


def comment(group: str, name: str) -> str:
    """The comment at the top of a file of a group."""
    lines = (config_dir() / group / f"{name}.yaml").read_text(encoding="utf-8").splitlines()
    return " ".join(line.removeprefix("#").strip() for line in lines if re.match(r"# (?!@package)", line))
