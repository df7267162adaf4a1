"""The way from what a shell hands over to what a command gets."""

from __future__ import annotations

import sys

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import DictConfig, OmegaConf

from simcot_latent import cli
from simcot_latent.errors import UserError

PARSER = OverridesParser.create()


def received(argument: str) -> object:
    """The value that a command sees for `question=...` on its command line."""
    override = PARSER.parse_override(cli.quote_text(argument))
    return OmegaConf.create({"value": override.value()}).value


# What a shell can hand over: no null character, and no half of a surrogate pair.
TEXT = st.text(st.characters(exclude_characters="\0", exclude_categories=("Cs",)), min_size=1)
PIECES = [
    "'",
    '"',
    "\\",
    "${",
    "}",
    "$",
    ",",
    " ",
    "=",
    "a",
    "[",
    "]",
    "{",
    ":",
    "#",
    "\n",
    "?",
    "(",
    ")",
    "~",
    "..",
    "1",
]
AWKWARD = st.lists(st.sampled_from(PIECES), min_size=1).map("".join)


def already_quoted(text: str) -> bool:
    return len(text) >= 2 and text[0] == text[-1] and text[0] in "'\""


@settings(deadline=None, max_examples=300)
@given(TEXT | AWKWARD)
def test_free_text_arrives_as_it_was_typed(text: str) -> None:
    if text not in ("null", "???") and not already_quoted(text):  # "???" is OmegaConf's word for a missing value
        assert received(f"question={text}") == text


@pytest.mark.parametrize(
    "text",
    [
        "'3 pens' and '4 pens'",
        '"3" or "4"',
        "'Tis 3 o' clock'",
        "a\\${b}",
        "\\",
        "x\\",
        'x\\"',
        "${oc.env:HOME}",
        "${}",
        "a ${b",
        "- 3 + 4",
        "3",
        "true",
    ],
)
def test_text_that_looks_like_something_else(text: str) -> None:
    assert received(f"question={text}") == text


def test_text_that_is_quoted_for_hydra_already() -> None:
    assert received("question='How many, John?'") == "How many, John?"
    assert received('question="How many, John?"') == "How many, John?"
    assert received("question=null") is None
    assert received("question=") == ""


@pytest.mark.parametrize("key", [*cli.TEXT_KEYS, "+data.path", "++out_dir"])
def test_paths_may_hold_anything(key: str) -> None:
    path = "/home/o'brien, j/runs=1/(old) 100% {x}"
    override = PARSER.parse_override(cli.quote_text(f"{key}={path}"))
    assert override.value() == path
    assert override.key_or_group == key.lstrip("+")


@pytest.mark.parametrize("argument", ["seed=0,1", "latent.stages=[{steps: 1, share: 0.1}]", "-m", "--help", "~data"])
def test_what_is_no_free_text_is_hydras(argument: str) -> None:
    assert cli.quote_text(argument) == argument


@pytest.mark.parametrize("flag", ["-m", "--multirun"])
def test_in_a_sweep_commas_separate(flag: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["train", flag, "run=a,b"])
    override = PARSER.parse_override(cli.quote_text("run=a,b"))
    assert override.is_sweep_override()
    assert list(override.sweep_iterator()) == ["a", "b"]


def call(main: object, *arguments: str, config: str = "probe") -> int:
    """A command with a main of our own; its exit status."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["command", *arguments])
        patch.setenv("HYDRA_FULL_ERROR", "0")
        try:
            cli.run(main, config)  # type: ignore[arg-type]
        except SystemExit as stop:
            return int(stop.code or 0)
    return 0


def test_main_gets_the_configuration(capsys: pytest.CaptureFixture[str]) -> None:
    seen: list[DictConfig] = []
    assert call(seen.append, "question=It's 3, isn't it?", "limit=7", "data=gsm8k", "data.path=a,b") == 0
    (raw,) = seen
    assert (raw.question, raw.limit, raw.data.path, raw.ckpt) == ("It's 3, isn't it?", 7, "a,b", None)
    captured = capsys.readouterr()
    assert captured.out + captured.err == ""


def refuse(raw: DictConfig) -> None:
    raise UserError("key=1:\n  must be  2")


@pytest.mark.parametrize(
    ("main", "arguments", "named"),
    [
        (refuse, (), "error: key=1: must be 2\n"),
        (print, ("limits=3",), "limits"),
        (print, ("data=gsm9k",), "gsm9k"),
        (print, ("limit=[1",), "[1"),
        (print, ("limit",), "limit"),
        (print, ("=",), "error: "),
        (print, ("data=null,",), "error: "),
        (print, ("hydra.nothing=1",), "hydra.nothing"),
        (lambda raw: raw.limit, ("limit=${nowhere}",), "nowhere"),
    ],
)
def test_a_mistake_is_one_line_on_stderr(
    main: object, arguments: tuple[str, ...], named: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(main, *arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    assert named in captured.err
    assert "HYDRA_FULL_ERROR" not in captured.err
    assert "site-packages" not in captured.err


def test_a_bug_of_ours_is_not_dressed_up_as_a_mistake() -> None:
    def broken(raw: DictConfig) -> None:
        raise KeyError("ours")

    with pytest.raises(KeyError, match="ours"):
        call(broken)
