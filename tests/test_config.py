"""Run configurations: what hydra composes, what `parse` makes of it and what it refuses."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import DictConfig, OmegaConf

from simcot_latent.cli import use_parts
from simcot_latent.config import (
    LatentConfig,
    LossConfig,
    MethodConfig,
    RunConfig,
    as_plain,
    config_dir,
    instantiate,
    parse,
    typed,
)
from simcot_latent.data.sources import Source
from simcot_latent.data.tokenizer import Tokenizer
from simcot_latent.errors import UserError, require
from simcot_latent.loops.sequential import Sequential
from simcot_latent.model.gpt import GPTConfig
from simcot_latent.parts import PARTS, keys
from simcot_latent.terms.base import Term


@pytest.fixture(scope="module", autouse=True)
def hydra_ready() -> Iterator[None]:
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        yield


def composed(*overrides: str) -> DictConfig:
    """What a command's main gets."""
    raw = compose("train", overrides=list(overrides))
    use_parts(raw)
    return raw


@pytest.fixture(scope="module")
def default() -> DictConfig:
    return composed()


def message(*overrides: str) -> str:
    """The error of a configuration, which must be one line."""
    with pytest.raises(UserError) as caught:
        parse(composed(*overrides))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def choices(group: str) -> list[str]:
    return sorted(file.stem for file in (config_dir() / group).glob("*.yaml"))


@pytest.mark.parametrize("experiment", choices("experiment"))
def test_experiments_are_runs_that_can_be_changed(experiment: str) -> None:
    run, _ = parse(composed(f"experiment={experiment}", "learning_rate=0.5"))
    assert experiment.endswith(run.mode)
    assert run.learning_rate == 0.5
    assert (run.init_from is None) == experiment.startswith("arithmetic")
    assert run.num_epochs >= (1 if run.init_from is None else 2)


# --- what there is to choose -----------------------------------------------------------------------------------------


def test_the_default_is_latent_mode_on_embedded_data_and_downloads_nothing() -> None:
    run, method = parse(composed())
    assert (run.mode, run.run, run.num_iterations, run.step_weight_multiplier) == ("latent", "", -1, 2.0)
    assert run.out_dir is run.init_from is None
    assert not run.resume
    assert method == MethodConfig.simcot()
    assert run.data["_target_"].endswith("arithmetic.Arithmetic")
    assert run.tokenizer["_target_"].endswith("default_tokenizer")


@pytest.mark.parametrize("mode", choices("mode"))
@pytest.mark.parametrize("model", choices("model"))
def test_every_mode_takes_every_model(mode: str, model: str) -> None:
    run, _ = parse(composed(f"mode={mode}", f"model={model}"))
    assert run.mode == mode
    GPTConfig(vocab_size=300, **run.model)


def test_the_gpt2_preset_is_gpt2() -> None:
    run, _ = parse(composed("model=gpt2"))
    config = GPTConfig(vocab_size=50257, **run.model)
    assert (config.n_layer, config.n_head, config.n_embd, config.context_length) == (12, 12, 768, 1024)
    assert (config.positions, config.norm, config.activation, config.bias) == (
        "learned", "layernorm", "gelu_tanh", True
    )  # fmt: skip


@pytest.mark.parametrize("data", choices("data"))
def test_every_data_source_can_be_made(data: str, tmp_path: Path) -> None:
    """Of the class that its file names, with the file's values."""
    section = composed(f"data={data}").data
    source: Source = instantiate(section, "data")
    assert f"{type(source).__module__}.{type(source).__qualname__}" == section["_target_"]
    for key, value in as_plain(section).items():
        if key != "_target_":
            found = getattr(source, key)
            assert (list(found) if isinstance(found, tuple) else found) == value, key


def test_tokenizers_can_be_made() -> None:
    assert choices("tokenizer") == ["default", "gpt2"]
    tokenizer = instantiate(composed().tokenizer, "tokenizer")
    assert isinstance(tokenizer, Tokenizer)


def test_every_key_of_the_yaml_files_is_one_of_the_declared_and_the_other_way_round() -> None:
    keys = set(composed("mode=latent")) | set(composed("mode=weighted"))
    # `own` is no key: it holds those of the sections that a part of one's own declares.
    assert keys == (set(RunConfig.__dataclass_fields__) | set(MethodConfig.__dataclass_fields__)) - {"own"}


# --- what is refused -------------------------------------------------------------------------------------------------

REFUSED = {
    "rationale=natrual": ("rationale=natrual", "natural", "equations"),
    "on_too_long=cut": ("on_too_long=cut", "error", "drop"),
    "step_weight_multiplier=-0.5": ("step_weight_multiplier=-0.5", "at least 0"),
    "step_weight_multiplier=nan": ("step_weight_multiplier",),
    "num_iterations=0": ("num_iterations=0", "-1"),
    "num_iterations=-2": ("num_iterations=-2", "-1"),
    "num_iterations=many": ("num_iterations", "many", "Integer"),
    "num_epochs=0": ("num_epochs=0", "at least 1"),
    "num_epochs=1.5": ("num_epochs", "1.5"),
    "device_batch_size=0": ("device_batch_size=0", "at least 1"),
    "target_examples_per_step=-4": ("target_examples_per_step=-4", "at least 1"),
    "learning_rate=0": ("learning_rate=0", "above 0"),
    "learning_rate=nan": ("learning_rate", "above 0"),
    "betas=[0.9]": ("betas", "two"),
    "betas=[0.9,1.0]": ("betas", "[0, 1)"),
    "betas=[a,b]": ("betas[0]", "'a'"),
    "weight_decay=-1": ("weight_decay=-1", "at least 0"),
    "warmup_ratio=1.5": ("warmup_ratio=1.5", "0 to 1"),
    "lr_schedule=step": ("lr_schedule=step", "linear", "cosine", "constant"),
    "final_lr_ratio=2": ("final_lr_ratio=2", "0 to 1"),
    "max_grad_norm=0": ("max_grad_norm=0", "above 0"),
    "seed=-1": ("seed=-1", "from 0"),
    "seed=x": ("seed", "'x'"),
    "dtype=float16": ("dtype=float16", "auto", "float32", "bfloat16"),
    "resume=maybe": ("resume", "maybe"),
    "resume=true": ("resume", "out_dir="),
    "log_every=0": ("log_every=0", "at least 1"),
    "eval_every=0": ("eval_every=0", "-1"),
    "eval_examples=0": ("eval_examples=0", "at least 1"),
    "eval_batch_size=0": ("eval_batch_size=0", "at least 1"),
    "checkpoint_every=0": ("checkpoint_every=0", "-1"),
    "keep_checkpoints=0": ("keep_checkpoints=0", "at least 1"),
    "max_new_tokens=0": ("max_new_tokens=0", "at least 1"),
    "new_token_init=null": ("new_token_init=null: must be mean, or a token",),
    "run=null": ("run=null: must be a text; leave it out for its default",),
    "seed=null": ("seed=null: must be a whole number; leave it out",),
    "dtype=null": ("dtype=null: must be a text",),
    "compile=null": ("compile=null: must be true or false",),
    "betas=null": ("betas=null: must be a list",),
    "resume=null": ("resume=null: must be true, false, or auto",),
    "+objective=null": ("objective: is no key any more", "curriculum=, loop=, steps= and terms=", "docs/extending.md"),
    "+objective=simcot_latent.objectives.latent.LatentObjective": ("objective: is no key any more", "loop="),
    "+model.projector_width=24": ("model.projector_width: is latent.projector_width now",),
    "latent.projector_width=0": ("latent.projector_width=0: must be at least 1, or null for no projector",),
    "terms=null": ("terms=null: must be a list; leave it out for its default",),
    "terms=contrast": ("terms: ",),
    "terms=[contrast]": ("terms=[contrast]: must be registered", "use=[module]"),
    "latent=null": ("latent=null: must be a section of keys",),
    "latent.missing=null": ("latent.missing=null: must be a text",),
    "loss.step_weight=null": ("loss.step_weight=null: must be a number",),
    "latent.n_latents=0": ("latent.n_latents=0", "at least 1"),
    "latent.n_latents=-4": ("latent.n_latents=-4", "at least 1"),
    "latent.n_latents=abc": ("latent.n_latents", "'abc'", "Integer"),
    "latent.latents_per_step=0": ("latent.latents_per_step=0", "at least 1"),
    "latent.latents_per_step=3": ("latent.n_latents=5", "a multiple of latent.latents_per_step=3"),
    "latent.surplus=keep": ("latent.surplus=keep", "merge", "drop"),
    "latent.missing=none": ("latent.missing=none", "mask", "answer"),
    "latent.warmup=1": ("latent.warmup=1", "below 1"),
    "latent.warmup=-0.1": ("latent.warmup=-0.1", "from 0"),
    "latent.stages=[1]": ("latent.stages[0]=1", "steps", "share"),
    "latent.stages=[{steps:1}]": ("latent.stages[0]", "steps", "share"),
    "latent.stages=[{steps:6,share:0.1}]": ("latent.stages[0]", "1 to 5"),
    "latent.stages=[{steps:1.5,share:0.1}]": ("latent.stages[0]", "1 to 5"),
    "latent.stages=[{steps:1,share:0.1},{steps:2,share:0}]": ("latent.stages[1]", "above 0"),
    "latent.stages=[{steps:1,share:0.5},{steps:2,share:0.4}]": ("latent.stages", "with the warm-up", "below 1"),
    "latent.stages=all": ("latent.stages=all", "a share of training"),
    "latent.stages=1": ("latent.stages=1", "below 1"),
    "latent.stages=0.85": ("latent.stages", "with the warm-up", "below 1"),
    "optimizer=sgd": ("optimizer=sgd", "adamw, muon"),
    "matrix_lr=0": ("matrix_lr=0", "above 0"),
    "latent.reset_optimizer=2x": ("latent.reset_optimizer", "2x"),
    "decoder.n_layer=0": ("decoder.n_layer=0", "at least 1", "null"),
    "decoder.init=zero": ("decoder.init=zero", "random", "base"),
    "loss.answer_weight=-1": ("loss.answer_weight=-1", "at least 0"),
    "loss.step_weight=-1": ("loss.step_weight=-1", "at least 0"),
    "loss.step_reduction=sum": ("loss.step_reduction=sum", "token", "coconut", "codi"),
    "+foo=1": ("foo", "mode=latent"),
    "+latent.foo=1": ("latent.foo", "foo"),
}


@pytest.mark.parametrize("override", REFUSED)
def test_impossible_values_are_named_with_what_would_be_right(override: str) -> None:
    text = message(override)
    for word in REFUSED[override]:
        assert word in text


def test_sections_of_the_other_mode_are_refused() -> None:
    assert message("mode=weighted", "+latent.n_latents=3") == "latent: mode=weighted has no such key"


def test_edges_that_are_fine() -> None:
    for override in (
        "step_weight_multiplier=0", "num_iterations=1", "warmup_ratio=0", "warmup_ratio=1", "max_grad_norm=null",
        "seed=0", "eval_every=-1", "checkpoint_every=-1", "weight_decay=0", "latent.warmup=0", "loss.step_weight=0",
        "latent.stages=[{steps:1,share:0.1},{steps:2,share:0.1}]", "learning_rate=1",
    ):  # fmt: skip
        raw = composed(override)
        run, method = parse(raw)
        key = override.partition("=")[0]
        section, _, name = key.rpartition(".")
        assert getattr(getattr(method, section) if section else run, name) == OmegaConf.select(raw, key), override
    stages = parse(composed("latent.stages=[{steps:1,share:0.1}]"))[1].latent.stages
    assert stages == [{"steps": 1, "share": 0.1}]


@pytest.mark.parametrize(
    ("section", "override", "named"),
    [
        ("data", "+data.pth=x", "pth"),
        ("data", "data.train_size=many", "data.train_size"),
        ("data", "data.operations=[%]", "data.operations"),
        ("tokenizer", "+tokenizer.size=5", "size"),
        ("tokenizer", "tokenizer.ranks=/nowhere/ranks", "/nowhere/ranks"),
    ],
)
def test_sections_that_name_a_class_are_checked_by_it(section: str, override: str, named: str) -> None:
    with pytest.raises(UserError, match=named) as caught:
        instantiate(composed(override)[section], section)
    assert "\n" not in str(caught.value)


# --- the parts of a method -------------------------------------------------------------------------------------------


def with_parts(*overrides: str, **parts: Any) -> DictConfig:
    """What a command composes where a yaml file of one's own chooses parts."""
    raw = composed(*overrides)
    for key, value in parts.items():
        OmegaConf.update(raw, key, value, merge=False)
    return raw


PARTS_OF = {
    (): ("replace", "sequential", "decoder"),
    ("mode=weighted",): ("none", "none", "none"),
    ("loop=pause",): ("replace", "pause", "decoder"),
    ("curriculum=none", "loop=pause", "steps=none"): ("none", "pause", "none"),
    ("mode=latent", "steps=none"): ("replace", "sequential", "none"),
    ("mode=weighted", "loop=sequential"): ("none", "sequential", "none"),
}


@pytest.mark.parametrize("overrides", PARTS_OF)
def test_each_part_can_be_chosen_by_itself(overrides: tuple[str, ...]) -> None:
    curriculum, loop, steps = PARTS_OF[overrides]
    _, method = parse(composed(*overrides))
    assert (method.curriculum, method.loop, method.steps, method.terms) == (curriculum, loop, steps, [])
    assert method.parts == [
        pair for pair in (("curriculum", curriculum), ("loop", loop), ("steps", steps)) if pair[1] != "none"
    ]


# Parts that mode=latent does not go with.
NEEDS = {
    "curriculum=remove_tokens": ["mode=weighted"],
    "loop=none": ["mode=weighted"],
    "loop=compressed": ["steps=compressed"],
    "steps=compressed": ["loop=compressed"],
    "steps=own_head": ["loop=looped"],
    "distill=kv": ["loop=jacobi"],
    "distill=hidden_kv": ["loop=jacobi"],
}


def test_every_part_of_the_table_is_a_file_that_chooses_it() -> None:
    for group in ("curriculum", "loop", "steps", "distill", "written"):
        assert [key for key in choices(group) if key != "hidden_kv"] == keys(group), "which is two of them"
        for key in choices(group):
            chosen = parse(composed(f"{group}={key}", *NEEDS.get(f"{group}={key}", [])))[1]
            several = [] if key == "none" else key.split("_")
            assert getattr(chosen, group) == (several if group == "distill" else key)


@pytest.mark.parametrize(
    ("parts", "words"),
    [
        (
            {"loop": "paus"},
            (f"loop=paus: must be one of {', '.join(keys('loop'))}; did you mean pause?", "use=[module]"),
        ),
        ({"loop": "NONE"}, (f"loop=NONE: must be one of {', '.join(keys('loop'))}", "did you mean none?")),
        (
            {"curriculum": "x"},
            ("curriculum=x: must be one of fixed_k, none, remove_tokens, replace; a part of your own",),
        ),
        (
            {"steps": "decode"},
            ("steps=decode: must be one of compressed, decoder, none, own_head; did you mean decoder",),
        ),
        ({"loop": None}, ("loop=null: must be the name of a part",)),
        ({"loop": 3}, ("loop=3: must be the name of a part",)),
        ({"curriculum": {"a": 1}}, ("curriculum={'a': 1}: must be the name of a part",)),
        ({"steps": ["decoder"]}, ("steps=['decoder']: must be the name of a part",)),
    ],
)
def test_a_part_that_is_not_there_is_named(parts: dict[str, Any], words: tuple[str, ...]) -> None:
    with pytest.raises(UserError) as caught:
        parse(with_parts(**parts))
    for word in words:
        assert word in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (
            "mode=weighted loop=pause curriculum=replace",
            "rationale=natural: must be equations with curriculum=replace, which writes single steps",
        ),
        (
            "loop=pause latent.feeds_last=false",
            "latent.feeds_last=false: must be true with loop=pause, whose thoughts are all read",
        ),
        (
            "loop=jacobi latent.feeds_last=false curriculum=none",
            "latent.feeds_last=false: must be true with loop=jacobi, whose thoughts are all read",
        ),
        (
            "loop=looped latent.projector_width=8",
            "latent.projector_width=8: must be null with loop=looped, which has none",
        ),
        (
            "loop=none curriculum=none steps=own_head",
            "steps=own_head: needs thoughts, which loop=none has not; take a loop, or steps=none",
        ),
        ("latent.feeds_last=false", "latent.feeds_last=False: must be true in stages of a single thought"),
    ],
)
def test_what_does_not_go_together_is_refused_before_data_are_loaded(overrides: str, says: str) -> None:
    """And the part that is the cause is named."""
    assert message(*overrides.split()).startswith(says)


@pytest.mark.parametrize("override", ["latent.stages=3", "latent.stages=[{steps:9,share:2}]", "latent.stages=0.9"])
def test_stages_are_those_of_a_curriculum_that_has_some(override: str) -> None:
    parse(composed("curriculum=none", override))
    for curriculum in ("replace", "fixed_k"):
        assert message(f"curriculum={curriculum}", override).startswith("latent.stages")


@dataclass(frozen=True)
class NoisyConfig:
    """One setting of its own, one that `latent` has, one with a default that nobody gives."""

    noise: float = 0.1
    feeds_last: bool = True
    shape: str = "normal"

    def __post_init__(self) -> None:
        require(self.noise >= 0, "latent.noise", self.noise, "at least 0")


class Noisy(Sequential):
    Config = NoisyConfig  # type: ignore[assignment]


@dataclass(frozen=True)
class ContrastConfig:
    margin: float = 1.0
    negatives: int = 4


class Contrast(Term):
    Config = ContrastConfig


@pytest.fixture
def own_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """A loop and a term of somebody's own in the table."""
    monkeypatch.setitem(PARTS["loop"], "noisy", Noisy)
    monkeypatch.setitem(PARTS["term"], "contrast", Contrast)


@pytest.mark.usefixtures("own_parts")
def test_a_part_of_ones_own_has_settings_of_its_own() -> None:
    raw = with_parts(
        "+latent.noise=3", "latent.feeds_last=false", "latent.n_latents=3", "latent.latents_per_step=2",
        "+loss.margin=0.25",
        loop="noisy", terms=["contrast"],
    )  # fmt: skip
    before = as_plain(raw)
    _, method = parse(raw)
    assert as_plain(raw) == before
    assert method.parts[1:] == [("loop", "noisy"), ("steps", "decoder"), ("term", "contrast")]
    assert method.own == {"noise": 3.0, "margin": 0.25}
    assert isinstance(method.own["noise"], float)
    assert method.settings(NoisyConfig) == NoisyConfig(noise=3.0, feeds_last=False, shape="normal")
    assert method.settings(ContrastConfig) == ContrastConfig(margin=0.25, negatives=4)
    assert method.latent == LatentConfig(n_latents=3, latents_per_step=2, feeds_last=False)
    assert method.loss == LossConfig()
    # Nothing given: its defaults, and what the sections say.
    _, method = parse(with_parts(loop="noisy"))
    assert method.own == {}
    assert method.settings(NoisyConfig) == NoisyConfig()


@pytest.mark.usefixtures("own_parts")
@pytest.mark.parametrize(
    ("override", "parts", "words"),
    [
        ("+latent.noise=much", {"loop": "noisy"}, ("latent.noise: ", "'much'")),
        ("+latent.noise=null", {"loop": "noisy"}, ("latent.noise=null: must be a number",)),
        ("+latent.noise=-1", {"loop": "noisy"}, ("latent.noise=-1.0: must be at least 0",)),
        ("+latent.nois=1", {"loop": "noisy"}, ("latent.nois: no such key",)),
        ("+latent.noise=1", {}, ("latent.noise: no such key",)),  # the loop that is chosen has none
        ("+latent.margin=1", {"loop": "noisy"}, ("latent.margin: no such key",)),
        ("+loss.margin=1", {"loop": "noisy"}, ("loss.margin: no such key",)),
        ("+loss.negatives=1.5", {"terms": ["contrast"]}, ("loss.negatives: ", "1.5")),
        ("+noise=1", {"loop": "noisy"}, ("noise: mode=latent has no such key",)),
    ],
)
def test_own_settings_are_checked_as_all_others(override: str, parts: dict[str, Any], words: tuple[str, ...]) -> None:
    with pytest.raises(UserError) as caught:
        parse(with_parts(override, **parts))
    for word in words:
        assert word in str(caught.value)
    assert "\n" not in str(caught.value)


# --- what is kept ----------------------------------------------------------------------------------------------------

VALUES: dict[str, st.SearchStrategy[Any]] = {
    "seed": st.integers(0, 2**31),
    "learning_rate": st.floats(1e-9, 1e3),
    "step_weight_multiplier": st.floats(0, 100),
    "num_iterations": st.just(-1) | st.integers(1, 10**9),
    "betas": st.lists(st.floats(0, 0.999), min_size=2, max_size=2),
    "run": st.text(),
    "out_dir": st.none() | st.text().filter(str.strip),  # of a folder without a name it says so
    "init_from": st.none() | st.text(),
    "dtype": st.sampled_from(["auto", "float32", "bfloat16"]),
    "compile": st.booleans(),
    "latent": st.fixed_dictionaries({"n_latents": st.integers(1, 9).map(lambda n: 2 * n),
                                     "latents_per_step": st.sampled_from([1, 2]), "warmup": st.floats(0, 0.69)}),
}  # fmt: skip


@settings(deadline=None, max_examples=30)
@given(st.fixed_dictionaries({}, optional=VALUES))
def test_a_configuration_survives_the_checkpoint(default: DictConfig, values: dict[str, Any]) -> None:
    """As plain values, through JSON and back: what `config.json` holds is what was run."""
    # Text is what it is: where it holds ${..}, no interpolation is meant.
    raw = default.copy()
    for key, value in values.items():
        if isinstance(value, str):
            value = value.replace("${", "$ {")
        OmegaConf.update(raw, key, value)
    before = parse(raw)
    after = parse(DictConfig(json.loads(json.dumps(as_plain(raw)))))
    assert after == before


def test_parse_leaves_what_it_was_given_alone() -> None:
    raw = composed("latent.n_latents=8")
    before = as_plain(raw)
    parse(raw)
    assert as_plain(raw) == before


def test_typed_converts_to_the_declared_types() -> None:
    latent = typed(LatentConfig, {"n_latents": "6", "warmup": 0}, "latent")
    assert (latent.n_latents, latent.warmup, latent.groups) == (6, 0.0, 6)
    assert isinstance(latent.warmup, float)
    with pytest.raises(UserError, match=r"latent\.warmup: .*'soon'"):
        typed(LatentConfig, {"warmup": "soon"}, "latent")


# Of every key a value that is not its default.
OTHER_VALUES: dict[str, Any] = {
    "curriculum": "none",
    "loop": "another",
    "steps": "none",
    "rationale": "natural",
    "on_too_long": "drop",
    "step_weight_multiplier": 1.5,
    "track_step_accuracy": False,
    "num_epochs": 3,
    "num_iterations": 7,
    "device_batch_size": 5,
    "target_examples_per_step": 6,
    "optimizer": "adamw",
    "learning_rate": 0.5,
    "matrix_lr": 0.25,
    "betas": [0.5, 0.25],
    "weight_decay": 0.75,
    "warmup_ratio": 0.125,
    "lr_schedule": "cosine",
    "final_lr_ratio": 0.375,
    "max_grad_norm": 2.5,
    "seed": 11,
    "device": "cpu",
    "dtype": "bfloat16",
    "compile": True,
    "compile_thoughts": True,
    "later_attention": "sdpa",
    "activation_checkpointing": True,
    "profile": True,
    "out_dir": "somewhere",
    "init_from": "some/model",
    "new_token_init": "the",
    "resume": True,
    "resume_with_changes": True,
    "max_minutes": 5.0,
    "on_nonfinite": "skip",
    "max_nonfinite": 17,
    "verify": False,
    "log_every": 3,
    "eval_every": 4,
    "eval_examples": 12,
    "eval_batch_size": 13,
    "checkpoint_every": 14,
    "keep_checkpoints": 15,
    "max_new_tokens": 16,
    "run": "a name",
    "wandb_project": "another",
    "latent.n_latents": 7,
    "latent.latents_per_step": 2,
    "latent.surplus": "drop",
    "latent.missing": "mask",
    "latent.warmup": 0.5,
    "latent.stages": 0.125,
    "latent.reset_optimizer": True,
    "latent.feeds_last": False,
    "latent.projector_width": 24,
    "decoder.n_layer": 2,
    "decoder.init": "base",
    "loss.answer_weight": 0.5,
    "loss.step_weight": 0.25,
    "loss.step_reduction": "codi",
    "lora.rank": 3,
    "lora.alpha": 4.0,
    "lora.dropout": 0.25,
    "lora.targets": ["qkv"],
    "lora.split": True,
    "lora.new_rows": False,
    "lora.merge": False,
    "distill": ["hidden"],
    "written": "joint",
}


def test_every_key_reaches_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """All of them together, each with a value of its own: none is dropped or lands in another's place. That each does
    what it says is shown in end_to_end/test_train_options.py."""
    monkeypatch.setitem(PARTS["loop"], "another", type("Another", (Sequential,), {}))  # which has all settings, too
    raw = composed()
    for key, value in OTHER_VALUES.items():
        assert OmegaConf.select(raw, key) != value, f"{key}: that is the default"
        OmegaConf.update(raw, key, value)
    run, method = parse(raw)
    found = dict(vars(run)) | {
        key: getattr(method, key) for key in ("curriculum", "loop", "steps", "distill", "written")
    }
    found |= {f"lora.{key}": value for key, value in vars(found.pop("lora")).items()}
    found |= {f"{name}.{key}": value for name in ("latent", "decoder", "loss")
              for key, value in vars(getattr(method, name)).items()}  # fmt: skip
    groups = {"mode", "model", "data", "tokenizer", "lora"}
    # Which is refused with latent.missing=answer.
    assert found.pop("latent.drop_last_step") is False
    assert found.keys() - groups == OTHER_VALUES.keys(), "a key is missing in the table above"
    assert {key: found[key] for key in OTHER_VALUES} == OTHER_VALUES
