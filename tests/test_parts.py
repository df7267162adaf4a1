"""The table of parts: what a key stands for, how a part of one's own comes into it, what is said where none is."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import simcot_latent as sl
from simcot_latent import parts
from simcot_latent.checkpoint import TrainerState, load_checkpoint
from simcot_latent.config import MethodConfig, RunConfig
from simcot_latent.curricula.base import Curriculum, Stage
from simcot_latent.data.tokenizer import Tokenizer
from simcot_latent.errors import UserError
from simcot_latent.loops.base import ThoughtLoop
from simcot_latent.loops.pause import Pause
from simcot_latent.loops.sequential import Sequential
from simcot_latent.method import Method
from simcot_latent.model.gpt import GPT
from simcot_latent.parts import PARTS, find, key_of, keys, register, use
from simcot_latent.terms.base import Term
from simcot_latent.training.saving import as_checkpoint, save_checkpoint

BASES: dict[str, type] = {
    "curriculum": Curriculum, "loop": ThoughtLoop, "steps": Term, "distill": Term, "written": Term, "term": Term,
}  # fmt: skip
LOOPS = ["compressed", "jacobi", "looped", "none", "pause", "pause_multipass", "sequential", "soft"]
SAID = ", ".join(LOOPS)


@pytest.fixture(autouse=True)
def own_table(monkeypatch: pytest.MonkeyPatch) -> None:
    """A table of its own for each test: what one registers, no other finds."""
    monkeypatch.setattr(parts, "PARTS", {group: dict(found) for group, found in PARTS.items()})


@pytest.fixture
def modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The current folder, empty; what is imported from it is forgotten again."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry not in ("", str(tmp_path))])
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        del sys.modules[name]


def message(call: str, *arguments: object) -> str:
    """The error of a function of `parts`, which must be one line."""
    with pytest.raises(UserError) as caught:
        getattr(parts, call)(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


class Noisy(Sequential):
    """A loop of somebody's own."""


# --- what there is ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("group", "key"), [(group, key) for group, found in PARTS.items() for key in found])
def test_every_key_stands_for_a_part_of_its_group(group: str, key: str) -> None:
    cls = find(group, key)
    assert issubclass(cls, BASES[group])
    assert not getattr(cls, "__abstractmethods__", None)
    assert key_of(group, cls) == key


def test_what_each_group_offers() -> None:
    """`none` too, where a method may go without; a term is always named."""
    assert {group: keys(group) for group in PARTS} == {
        "curriculum": ["fixed_k", "none", "remove_tokens", "replace"],
        "loop": LOOPS,
        "steps": ["compressed", "decoder", "none", "own_head"],
        "distill": ["hidden", "kv", "none"],
        "written": ["joint", "none"],
        "term": [],
    }
    assert find("loop", "pause") is Pause


def test_a_class_that_is_in_no_table_has_no_key() -> None:
    assert key_of("loop", Noisy) == ""
    assert key_of("curriculum", Pause) == "", "its key in another group says nothing"


# --- parts of one's own ----------------------------------------------------------------------------------------------


def test_what_is_registered_is_found() -> None:
    assert register("loop", "noisy")(Noisy) is Noisy, "a decorator gives back what it decorates"
    assert find("loop", "noisy") is Noisy
    assert key_of("loop", Noisy) == "noisy"
    assert keys("loop") == sorted([*LOOPS, "noisy"])
    assert keys("term") == []
    assert key_of("loop", Sequential) == "sequential", "whose subclass it is"
    assert sl.register is register


def test_a_loop_knows_its_key() -> None:
    register("loop", "noisy")(Noisy)
    for cls, key in ((Noisy, "noisy"), (Sequential, "sequential"), (Pause, "pause")):
        assert cls(8, cls.Config()).key == key


def test_a_key_is_one_parts() -> None:
    register("loop", "noisy")(Noisy)
    said = f"is {__name__}.Noisy already; take another key"
    with pytest.raises(UserError, match=r"register\('loop', 'noisy'\): " + said.replace(".", r"\.")):
        register("loop", "noisy")(Pause)
    assert find("loop", "noisy") is Noisy
    with pytest.raises(UserError, match=r"register\('loop', 'pause'\): is simcot_latent\.loops\.pause\.Pause already"):
        register("loop", "pause")(Noisy)
    assert find("loop", "pause") is Pause
    register("term", "pause")(Noisy)  # of another group


def test_a_module_that_is_imported_again_registers_its_part_again() -> None:
    """As a notebook does: the same class by its name, which is another object."""
    register("loop", "noisy")(Noisy)
    again = type("Noisy", (Sequential,), {"__module__": __name__, "__qualname__": "Noisy"})
    assert register("loop", "noisy")(again) is again
    assert find("loop", "noisy") is again
    assert register("loop", "pause")(Pause) is Pause
    assert key_of("loop", Pause) == "pause"


@pytest.mark.parametrize("group", ["loops", "", "Loop", "optimizer"])
def test_an_unknown_group(group: str) -> None:
    assert message("register", group, "x") == (
        f"register({group!r}, 'x'): the group must be one of curriculum, loop, steps, distill, written, term"
    )


class NoDataclass(Sequential):
    Config = int


class Needs(Sequential):
    @dataclass(frozen=True)
    class Config:
        need: int


class NoThink(ThoughtLoop):
    pass


@pytest.mark.parametrize(
    ("cls", "says"),
    [
        (lambda: None, "<lambda> must be a class"),
        (NoDataclass, "NoDataclass must have a dataclass as Config"),
        (Needs, "Needs must have a Config in which need has a default"),
        (NoThink, "NoThink must define think"),
    ],
)
def test_what_can_be_no_part_is_refused_where_it_is_registered(cls: Any, says: str) -> None:
    with pytest.raises(UserError) as caught:
        register("loop", "wrong")(cls)
    assert str(caught.value) == f"register('loop', 'wrong'): {says}"
    assert "wrong" not in PARTS["loop"]


@pytest.mark.parametrize("key", ["none", "My-Loop", "", "a.b"])
def test_what_can_be_no_key_is_refused(key: str) -> None:
    assert message("register", "loop", key) == (
        f"register('loop', {key!r}): the key must be small letters, digits and _, and not none"
    )


def test_a_curriculum_has_its_settings(
    make_model: Callable[..., GPT], make_run: Callable[..., RunConfig], tokenizer: Tokenizer
) -> None:
    @dataclass(frozen=True)
    class Settings:
        my_share: float = 0.5

    class Mine(Curriculum):
        Config = Settings

        def stage_at(self, progress: float) -> Stage:
            return Stage() if progress < self.config.my_share else Stage(self.latent.n_latents, first_written=None)

    register("curriculum", "mine")(Mine)
    model = make_model("llama", vocab_size=tokenizer.n_vocab)
    config = MethodConfig.simcot(curriculum="mine", own={"my_share": 0.25})
    method = Method(model, tokenizer, make_run(rationale="equations"), config)
    assert [method.stage_at(share).thoughts for share in (0.2, 0.3)] == [0, config.latent.n_latents]


# --- what is not there -----------------------------------------------------------------------------------------------

OWN = "; a part of your own is registered by the module that use=[module] names"


@pytest.mark.parametrize(
    ("group", "key", "says"),
    [
        ("loop", "sequentiel", f"must be one of {SAID}; did you mean sequential?"),
        ("loop", "Pause", f"must be one of {SAID}; did you mean pause?"),
        ("loop", "", f"must be one of {SAID}"),
        ("loop", "none", f"must be one of {SAID.replace('none, ', '')}"),  # which stands for no part
        ("curriculum", "replac", "must be one of fixed_k, none, remove_tokens, replace; did you mean replace?"),
        (
            "steps",
            "simcot_latent.terms.step_decoder.StepDecoderTerm",
            "must be one of compressed, decoder, none, own_head",
        ),
        ("term", "contrast", "must be registered"),
    ],
)
def test_a_key_that_is_not_there(group: str, key: str, says: str) -> None:
    named = f"terms=[{key}]" if group == "term" else f"{group}={key}"
    assert message("find", group, key) == f"{named}: {says}{OWN}"
    assert message("find", group, key, "config.json: loop.key") == f"config.json: loop.key: {says}{OWN}"


def test_what_is_registered_is_offered() -> None:
    register("term", "contrast")(Noisy)
    assert message("find", "term", "contrst") == (
        f"terms=[contrst]: must be one of contrast; did you mean contrast?{OWN}"
    )


# --- what a part learns ----------------------------------------------------------------------------------------------


class Judge(Term):
    """A term with a module of its own, by a name that each test gives."""

    module = "judge"

    def __init__(self, model: GPT, tokenizer: Tokenizer, method: MethodConfig) -> None:
        super().__init__(model, tokenizer, method)
        self.modules = {self.module: nn.Linear(2, 3)}


@pytest.fixture
def judging(
    make_model: Callable[..., GPT], make_run: Callable[..., RunConfig], tokenizer: Tokenizer,
    monkeypatch: pytest.MonkeyPatch,
) -> Callable[[str], Method]:  # fmt: skip
    """`judging(name)`: a method with a term whose module has that name."""

    def make(name: str) -> Method:
        monkeypatch.setattr(Judge, "module", name)
        register("term", "judge")(Judge)
        config = MethodConfig.simcot(terms=["judge"])
        return Method(make_model(vocab_size=tokenizer.n_vocab), tokenizer, make_run(rationale="equations"), config)

    return make


def test_what_a_term_learns_is_kept_with_the_run(judging: Callable[[str], Method], tmp_path: Path) -> None:
    method = judging("k2_judge")
    checkpoint = as_checkpoint(method, method.last_stage, {"max_new_tokens": 2}, step=3)
    folder = save_checkpoint(checkpoint, tmp_path, TrainerState({}, {}), keep=1)
    kept = load_checkpoint(folder).parts
    assert {name: sorted(part) for name, part in kept.items()} == {"k2_judge": ["bias", "weight"]}
    assert torch.equal(kept["k2_judge"]["weight"], method.get_parameter("k2_judge.weight"))


@pytest.mark.parametrize("name", ["Judge", "a.b", "", "_judge", "../judge", "trainer_state", "lora"])
def test_a_module_that_no_checkpoint_could_keep_is_refused_before_training(
    name: str, judging: Callable[[str], Method]
) -> None:
    with pytest.raises(UserError) as caught:
        judging(name)
    assert str(caught.value) == (
        f"terms: judge has a module of the name {name!r}: must be small letters, digits and _, and not model, lora, "
        "loop, step_decoder, trainer_state, of which a checkpoint has a file"
    )


# --- use=[module] ----------------------------------------------------------------------------------------------------

MODULE = """
from simcot_latent.loops.sequential import Sequential
from simcot_latent.parts import register

@register("loop", "theirs")
class Theirs(Sequential):
    pass
"""


def test_a_module_of_the_current_folder_registers_its_parts(modules: Path) -> None:
    (modules / "my_parts_a.py").write_text(MODULE)
    (modules / "inner").mkdir()
    (modules / "inner/my_parts_b.py").write_text(MODULE.replace("theirs", "deeper"))
    use(["my_parts_a", "inner.my_parts_b"])
    assert find("loop", "theirs").__module__ == "my_parts_a"
    assert find("loop", "deeper").__module__ == "inner.my_parts_b"
    use(["my_parts_a"])  # once more changes nothing
    assert sys.path.count(str(modules)) == 1


def test_a_module_that_is_installed_needs_no_folder(modules: Path) -> None:
    use(["simcot_latent.loops.pause"])
    with pytest.raises(UserError, match="my_parts_c"):
        use(["json", "my_parts_c"])


def test_nothing_to_use_changes_nothing(modules: Path) -> None:
    """The current folder, where anything may lie, comes before what is installed only where a module is asked for."""
    before = list(sys.path)
    use([])
    assert sys.path == before


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (None, "ModuleNotFoundError: No module named 'my_parts_d'"),
        ("import nothing_of_that_name", "ModuleNotFoundError: No module named 'nothing_of_that_name'"),
        ("1 / 0", "ZeroDivisionError: division by zero"),
        ("raise SystemExit(0)", "SystemExit: 0"),
        ("def f(:", "SyntaxError: invalid syntax"),
        ("raise ValueError('two\\n  lines')", "ValueError: two lines"),
    ],
)
def test_a_module_that_fails_is_named_with_its_reason(text: str | None, reason: str, modules: Path) -> None:
    if text is not None:
        (modules / "my_parts_d.py").write_text(text)
    said = message("use", ["my_parts_d"])
    assert said.startswith("use=[my_parts_d]: cannot be imported (")
    assert reason in said


@pytest.mark.parametrize("name", ["", ".relative", "a b/c"])
def test_what_is_no_name_of_a_module(name: str, modules: Path) -> None:
    assert message("use", [name]).startswith(f"use=[{name}]: cannot be imported (")


def test_what_a_module_says_itself_is_said(modules: Path) -> None:
    (modules / "my_parts_e.py").write_text(MODULE.replace("theirs", "pause"))
    assert message("use", ["my_parts_e"]) == (
        "register('loop', 'pause'): is simcot_latent.loops.pause.Pause already; take another key"
    )
