"""The way from what a shell hands over to what a command gets."""

from __future__ import annotations

import errno
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hydra._internal.utils import get_args_parser
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import DictConfig, OmegaConf

from simcot_latent import cli, parts
from simcot_latent.config import config_dir
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


@pytest.mark.parametrize("config", ["train", "probe"])
def test_null_for_a_group_that_is_null(config: str) -> None:
    """`experiment=null` and `data=null` are documented defaults; hydra itself refuses them."""
    seen: list[DictConfig] = []
    group = "experiment" if config == "train" else "data"
    assert call(seen.append, f"{group}=null", config=config) == 0
    assert seen[0].get(group) is None


def test_null_does_not_hide_another_choice(capsys: pytest.CaptureFixture[str]) -> None:
    assert call(print, "experiment=smollm2_gsm8k_latent", "experiment=null", config="train") == 2
    assert "experiment" in capsys.readouterr().err


def test_a_token_as_new_token_init() -> None:
    for typed in ("new_token_init=<<", 'new_token_init="<<"'):  # what a shell makes of "<<" and of '"<<"'
        seen: list[DictConfig] = []
        assert call(seen.append, typed, config="train") == 0
        assert seen[0].new_token_init == "<<"


@pytest.mark.parametrize("key", cli.PATH_KEYS)
def test_home_in_every_path(key: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Also where a shell has left it alone, as bash does behind `key=`; `~` within a name is a name."""
    monkeypatch.setenv("HOME", str(tmp_path / "${a}"))
    config = {"ckpt": "eval", "out": "export", "source": "import", "base": "import"}.get(key, "train")
    data = ["data=gsm8k"] if key == "data.path" else []
    for typed, means in (("~/a=b", f"{tmp_path}/${{a}}/a=b"), ("~", f"{tmp_path}/${{a}}"), ("a/~/b", "a/~/b")):
        seen: list[DictConfig] = []
        assert call(seen.append, *data, f"{key}={typed}", config=config) == 0
        assert OmegaConf.select(seen[0], key) == means


def test_home_in_a_sweep(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["train", "-m", "out_dir=~/a b=c"])
    override = PARSER.parse_override(cli.quote_text("out_dir=~/a b=c"))
    assert not override.is_sweep_override()
    assert override.value() == "~/a b=c"


@pytest.mark.parametrize(
    "typed", ["~/k${seed} b", "runs/${seed}", "'~/k${seed}'", '"~/k${seed}"', "'~/a,b/${seed}'", "'~/a (b)'"]
)
def test_runs_of_a_sweep_named_after_their_settings(typed: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What holds a comma or a parenthesis is hydra's, unless it is quoted."""
    monkeypatch.setattr(sys, "argv", ["train", "-m", f"out_dir={typed}"])
    override = PARSER.parse_override(cli.quote_text(f"out_dir={typed}"))
    assert not override.is_sweep_override()
    config = OmegaConf.create({"seed": 3, "out_dir": override.value()})
    assert config.out_dir == typed.strip("'\"").replace("${seed}", "3")


def test_nobodys_home(capsys: pytest.CaptureFixture[str]) -> None:
    assert call(print, "out_dir=~nobody-of-that-name/runs", config="train") == 2
    assert "error: out_dir=~nobody-of-that-name/runs: no home folder" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("typed", "means"),
    [
        ("--mode=latent", "mode=latent"),
        ("--mode", "mode=VALUE"),
        ("-mode=latent", "mode=latent"),
        ("--data.path=a=b", "data.path=a=b"),
        ("--run=mine", "run=mine"),  # a key of ours, and an option of hydra's that takes no value
        ("--resume=true", "resume=true"),
        ("--verify=false", "verify=false"),
        ("-compile=true", "compile=true"),  # begins as -c does
    ],
)
def test_a_key_written_as_an_option(typed: str, means: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(print, typed, config="train") == 2
    assert capsys.readouterr().err == f"error: {typed}: leave out the dashes, as in {means}\n"


@pytest.mark.parametrize(
    "arguments",
    [
        "--help", "-h", "--hydra-help", "--version", "--cfg job", "--cfg=job", "-c job", "-cjob", "--resolve", "--run",
        "--package _global_", "--multirun", "-m", "--multi", "--shell-completion", "-sc query=bash", "--config-dir /x",
        "--config-dir=/x=y", "-cd /x", "-cn=eval", "--config-path=/x", "--config-name=eval", "--info", "--info=all",
        "--experimental-rerun=x.pickle", "seed=-1", "~data", "-1", "question=--mode=latent", "-",
    ],
)  # fmt: skip
def test_options_of_hydras_stay(arguments: str) -> None:
    cli.check_dashes(arguments.split())


# Options of hydra's with their values, as its parser takes them.
OPTIONS = ["-m", "--multirun", "--multi", "--help", "--resolve", "--run", "--cfg=job", "-cjob", "-c job", "--cfg job",
           "--config-dir /x", "--config-dir=/x=y", "-cd /x", "--config-n probe", "-cn=eval", "--package _global_",
           "-p a", "--info", "--info=all", "--info plugins", "-i defaults-tree", "-sc"]  # fmt: skip
OVERRIDES = ["seed=3", "loop=noisy", "~data", "+latent.noise=1", "question=--cfg job", "use=[my_parts]", "a='b c'"]


@pytest.mark.parametrize("option", OPTIONS)
def test_an_option_keeps_its_value_and_no_more(option: str) -> None:
    words = option.split()
    apart = ["seed=3", "loop=noisy", "run=x", *words]
    assert cli.flags_last(["seed=3", *words, "loop=noisy", "run=x"]) == apart
    assert get_args_parser().parse_args(apart).overrides == apart[:3]


@given(st.data())
def test_what_follows_an_option_counts_too(data: st.DataObject) -> None:
    """Hydra's parser refuses `--config-dir /x loop=noisy` behind another `key=value`; the order of the rest stays."""
    options = data.draw(st.lists(st.sampled_from(OPTIONS), max_size=3))
    overrides = data.draw(st.lists(st.sampled_from(OVERRIDES), max_size=4))
    # Each an index of the place before which it stands among the others.
    places = data.draw(st.lists(st.integers(0, len(overrides)), min_size=len(options), max_size=len(options)))
    mixed: list[str] = []
    for place in range(len(overrides) + 1):
        mixed += [word for option, at in zip(options, places, strict=True) if at == place for word in option.split()]
        mixed += overrides[place : place + 1]
    in_order = [option for _, option in sorted(zip(places, options, strict=True), key=lambda pair: pair[0])]
    apart = [*overrides, *(word for option in in_order for word in option.split())]
    assert cli.flags_last(mixed) == apart
    parsed = get_args_parser().parse_args(apart)
    assert parsed.overrides == overrides


def test_an_option_between_two_keys(tmp_path: Path) -> None:
    """As one types a folder of one's own files, and then a choice from it."""
    (tmp_path / "loop").mkdir()
    (tmp_path / "loop/noisy.yaml").write_text("# @package _global_\nloop: noisy\n")
    for arguments in (
        ("seed=3", "--config-dir", str(tmp_path), "loop=noisy", "run=x"),
        (f"--config-dir={tmp_path}", "loop=noisy", "seed=3", "run=x"),
    ):
        seen: list[DictConfig] = []
        assert call(seen.append, *arguments, config="train") == 0
        assert (seen[0].seed, seen[0].loop, seen[0].run) == (3, "noisy", "x")


@pytest.mark.parametrize(
    ("typed", "means"),
    [
        ("model.projector_width=24", "latent.projector_width=24"),
        ("+model.projector_width=24", "+latent.projector_width=24"),
        ("++model.projector_width=a=b", "++latent.projector_width=a=b"),
        ("~model.projector_width", "~latent.projector_width"),
        ("latent.projector_width=24", "latent.projector_width=24"),
        ("model.n_layer=2", "model.n_layer=2"),
        ("run=model.projector_width", "run=model.projector_width"),
        ("my.model.projector_width=1", "my.model.projector_width=1"),
        ("--help", "--help"),
    ],
)
def test_a_key_of_an_earlier_version_serves(typed: str, means: str) -> None:
    assert cli.under_new_name(typed) == means


def test_keys_of_an_earlier_version_reach_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    for typed in ("model.projector_width=24", "+model.projector_width=24", "++model.projector_width=24"):
        seen: list[DictConfig] = []
        assert call(seen.append, typed, config="train") == 0
        assert seen[0].latent.projector_width == 24
        assert "projector_width" not in seen[0].model
    assert set(cli.RENAMED.values()) <= set(cli.dotted_keys(seen[0]))
    assert not set(cli.RENAMED) & set(cli.dotted_keys(seen[0]))
    assert capsys.readouterr().err == ""


# --- parts of one's own ----------------------------------------------------------------------------------------------


@pytest.fixture
def own_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The current folder with a module `my_cli_parts`, which registers a loop; all is forgotten afterwards."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(parts, "PARTS", {group: dict(found) for group, found in parts.PARTS.items()})
    (tmp_path / "my_cli_parts.py").write_text(
        "from simcot_latent.loops.pause import Pause\nfrom simcot_latent.parts import register\n"
        "@register('loop', 'theirs')\nclass Theirs(Pause): ...\n"
    )
    yield tmp_path
    sys.modules.pop("my_cli_parts", None)


@pytest.mark.parametrize("config", ["train", "probe", "eval", "export", "import"])
def test_modules_are_imported_before_a_command_begins(config: str, own_module: Path) -> None:
    """Whatever the command: each may meet a checkpoint of such a part. What a command gets is as without."""
    seen: list[tuple[DictConfig, str]] = []

    def main(raw: DictConfig) -> None:
        seen.append((raw, parts.find("loop", "theirs").__name__))

    assert call(main, "use=[my_cli_parts]", config=config) == 0
    raw, name = seen[0]
    assert name == "Theirs"
    assert "use" not in raw
    plain: list[DictConfig] = []
    assert call(plain.append, config=config) == 0
    assert plain[0] == raw


@pytest.mark.parametrize(
    ("typed", "says"),
    [
        ("use=my_cli_parts", "use=my_cli_parts: must be a list of modules, such as use=[my_parts]"),
        ("use=[1]", "use=[1]: must be a list of modules, such as use=[my_parts]"),
        ("use=[my_cli_parts,null]", "use=['my_cli_parts', None]: must be a list of modules"),
        ("use=3", "use=3: must be a list of modules"),
        ("use=false", "use=False: must be a list of modules"),
        ("use=[no_such_parts]", "use=[no_such_parts]: cannot be imported (ModuleNotFoundError: No module named"),
    ],
)
def test_what_is_no_list_of_modules(
    typed: str, says: str, own_module: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(print, typed) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith(f"error: {says}")
    assert captured.err.count("\n") == 1


@pytest.mark.parametrize("typed", ["use=null", "use=[]"])
def test_no_module_at_all(typed: str) -> None:
    seen: list[DictConfig] = []
    assert call(seen.append, typed) == 0
    assert "use" not in seen[0]


EXPERIMENTS = ", ".join(sorted(file.stem for file in (config_dir() / "experiment").glob("*.yaml")))


@pytest.mark.parametrize(
    ("typed", "means"),
    [
        ("learning_rat=1", "learning_rat: no such key; did you mean learning_rate?"),
        ("n_latents=3", "n_latents: no such key; did you mean latent.n_latents?"),
        ("latent.n_latnts=3", "latent.n_latnts: no such key; did you mean latent.n_latents?"),
        ("latnt.n_latents=3", "latnt.n_latents: no such key; did you mean latent.n_latents?"),
        ("data.trainsize=3", "data.trainsize: no such key; did you mean data.train_size or data.test_size?"),
        ("tokeniser=gpt2", "tokeniser: no such key; did you mean tokenizer?"),
        ("mode=lattent", "mode=lattent: must be one of latent, weighted; did you mean latent?"),
        ("data=gsm8", "data=gsm8: must be one of arithmetic, gsm8k, gsm8k_aug; did you mean gsm8k?"),
        ("zzz=1", "zzz: no such key"),
        ("experiment=nul", f"experiment=nul: must be one of {EXPERIMENTS}, null; did you mean null?"),
        ("mode=nul", "mode=nul: must be one of latent, weighted"),
        ("mode=null", "mode=null: must be one of latent, weighted"),
        ("+mode=null", "+mode=null: must be one of latent, weighted; leave out the +"),
        ("+experiment=null", f"+experiment=null: must be one of {EXPERIMENTS}, null; leave out the +"),
    ],
)
def test_a_typo_names_what_was_meant(typed: str, means: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(print, typed, config="train") == 2
    assert capsys.readouterr().err == f"error: {means}\n"


class LateFailure:
    """A command that fails at writing."""

    def __init__(self, error: OSError) -> None:
        self.error = error

    def __call__(self, raw: DictConfig) -> None:
        raise self.error


def test_what_is_wrong_with_the_machine_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert call(LateFailure(PermissionError(errno.EACCES, "Permission denied", "/a/b"))) == 2
    assert capsys.readouterr().err == "error: /a/b: Permission denied\n"
    assert call(LateFailure(OSError(errno.ENOSPC, "No space left on device"))) == 2
    assert capsys.readouterr().err == "error: No space left on device\n"
    with pytest.raises(ConnectionResetError):
        call(LateFailure(ConnectionResetError(errno.ECONNRESET, "Connection reset by peer")))


def refuse(raw: DictConfig) -> None:
    raise UserError("key=1:\n  must be  2")


@pytest.mark.parametrize(
    ("main", "arguments", "named"),
    [
        (refuse, (), "error: key=1:\\n must be 2\n"),
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


def test_a_key_that_is_gone_names_what_takes_its_place(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.under_new_name("objective=mine.Objective")
    assert caught.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith("error: objective: is no key any more; a method is a choice of parts, curriculum=, loop=")
    assert said.count("\n") == 1
