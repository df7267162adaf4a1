"""The README's tables of options, and the defaults in the code, are those of the yaml files."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from simcot_latent.config import DecoderConfig, LatentConfig, LossConfig, RunConfig, as_plain, config_dir
from simcot_latent.data.sources.arithmetic import Arithmetic

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")


def composed(*overrides: str, config: str = "train") -> dict[str, Any]:
    with initialize_config_dir(str(config_dir().resolve()), version_base=None):
        return as_plain(compose(config, [*overrides]))


def rows(heading: str) -> Iterator[list[str]]:
    """The cells of every table row of a section that begins with a key in backticks."""
    section = README.split(f"\n### {heading}")[1].split("\n### ")[0].split("\n## ")[0]
    for line in section.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split(" | ")]
        if re.fullmatch(r"`[\w.]+`", cells[0]):
            yield [cell.strip("`") for cell in cells]


def value_of(config: dict[str, Any], key: str) -> Any:
    return OmegaConf.select(OmegaConf.create(config), key)


@pytest.mark.parametrize(
    ("heading", "config", "overrides"),
    [
        ("Training:", "train", ()),
        ("`mode=latent` only", "train", ()),
        ("Data keys", "train", ("data=arithmetic",)),
        ("Evaluating:", "eval", ()),
        ("Probing:", "probe", ()),
        ("Importing:", "import", ("data=gsm8k_aug",)),
        ("Exporting:", "export", ()),
    ],
)
def test_tables_of_options_hold_the_defaults(heading: str, config: str, overrides: tuple[str, ...]) -> None:
    default = composed(*overrides, config=config)
    named = {"mode": "latent", "data": "arithmetic", "model": "tiny", "tokenizer": "default"}  # hydra groups
    checked = 0
    for key, documented, *_ in rows(heading):
        if documented in ("required", "as `<name>`", "as `<name>") or key in (
            "data.path",
            "data.hub_id",
            "data.hub_config",
        ):
            continue
        if key in ("data.train_limit", "data.tolerance") or (key == "data" and config in ("probe", "import")):
            continue
        if key in named:
            assert documented == named[key]
            continue
        if key == "rationale":
            documented = documented.split("latent: `")[1]
        wanted = value_of(default, key)
        if key == "data.validation_size":
            assert int(documented) == 500
            continue
        found = OmegaConf.create(f"value: {documented}").value
        assert found == wanted, key
        checked += 1
    assert checked >= 3


@pytest.mark.parametrize(
    ("headings", "config"),
    [
        (("Training:", "`mode=latent` only"), "train"),
        (("Evaluating:",), "eval"),
        (("Probing:",), "probe"),
        (("Importing:",), "import"),
        (("Exporting:",), "export"),
    ],
)
def test_tables_of_options_leave_none_out(headings: tuple[str, ...], config: str) -> None:
    documented = {cells[0] for heading in headings for cells in rows(heading)}
    options = composed(config=config)
    groups = {"latent", "decoder", "loss"}  # whose keys have rows of their own
    keys = {key for key in options if key not in groups} | {
        f"{group}.{key}" for group in groups & options.keys() for key in options[group]
    }
    assert keys - documented == ({"objective"} if config == "train" else set())  # which a mode's file sets


@pytest.mark.parametrize(("preset", "column"), [("tiny", 1), ("small", 2), ("gpt2", 3)])
def test_the_table_of_model_keys_holds_the_presets(preset: str, column: int) -> None:
    model = composed(f"model={preset}")["model"]
    table = {cells[0].removeprefix("model."): cells[column] for cells in rows("Model keys")}
    assert {key: OmegaConf.create(f"value: {text}").value for key, text in table.items()} == model


@pytest.mark.parametrize(
    ("cls", "section"),
    [
        (LatentConfig, "latent"),
        (DecoderConfig, "decoder"),
        (LossConfig, "loss"),
        (RunConfig, None),
        (Arithmetic, "data"),
    ],
)
def test_defaults_in_the_code_are_those_of_the_yaml(cls: type, section: str | None) -> None:
    config = composed()
    values = config if section is None else config[section]
    for field in fields(cls):
        if field.name in ("model", "data", "tokenizer", "rationale", "mode", "objective") and section is None:
            continue  # groups, and what a mode sets
        if cls is Arithmetic and field.name == "version":
            continue  # in code the default is what settings without a version mean, those of earlier checkpoints
        default = field.default if field.default_factory is MISSING else field.default_factory()
        default = list(default) if isinstance(default, tuple) else default
        assert default == values[field.name], field.name
