"""What a checkpoint's `config.json` says, checked; and what earlier formats said, in the words of the present one.

A folder may come from a stranger: a part is named by its key in the table of parts, nothing names a class or a path.
"""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from simcot_latent.checkpoint_folders import CONFIG
from simcot_latent.curricula.base import Stage
from simcot_latent.data.format import AnswerFormat
from simcot_latent.errors import UserError, require
from simcot_latent.files import from_plain, read_json
from simcot_latent.model.gpt import GPTConfig
from simcot_latent.model.lora import LoRA
from simcot_latent.parts import FILE_NAME, NONE, RESERVED, find
from simcot_latent.terms.steps import StepGroups

if TYPE_CHECKING:
    from simcot_latent.checkpoint import Checkpoint

FORMAT = 3
"""Of `config.json`. 2: how the model answers was one object, `thoughts`, and the projector was the model's. 1, which
did not say so: as 2, but where `feeds_last` is false, `n_latents` was one more than it is now."""

MAX_NEW_TOKENS, MAX_THOUGHTS = 65_536, 4096
"""The most that a file may have a model write or think per answer, which decides how much memory an answer takes."""


@dataclass(frozen=True)
class SavedLoop:
    """A thought loop: its key in the table of parts, and the values of its `Config`."""

    key: str
    settings: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class SavedConfig:
    """What a checkpoint's `config.json` holds.

    Attributes:
        model, step_decoder: the shapes; None: no decoder.
        loop: how the model thinks; None: it does not.
        answers: what stands around its answers.
        stage: how problems were put to it when it was saved.
        groups: how thoughts stand for steps.
        steps: who was to say them, by its key in the table of parts.
        parts: what else was trained, each in a file of its name.
        lora: how the model was trained, where it was not as a whole.
        step: optimizer steps it was trained for.
        run: the run's options. Whoever uses one asks `setting`, since it is what the file says, no more.
        format: see `FORMAT`.
    """

    model: GPTConfig
    step_decoder: GPTConfig | None
    loop: SavedLoop | None
    answers: AnswerFormat
    stage: Stage
    groups: StepGroups
    step: int
    run: dict[str, Any]
    steps: str = NONE
    parts: list[str] = field(default_factory=list)
    lora: LoRA | None = None
    format: int = FORMAT

    def __post_init__(self) -> None:
        require(self.step >= 0, "step", self.step, "at least 0")
        context, thoughts = self.model.context_length, self.stage.thoughts
        most = min(MAX_THOUGHTS, context - 1)
        require(thoughts <= most, "stage.thoughts", thoughts, f"at most {most}, to fit the context")
        if thoughts and (self.loop is None or not self.answers.thinks):
            raise UserError(f"stage.thoughts={thoughts}: must be 0 without a loop, and with answers.thinks=false")
        if wrong := [name for name in self.parts if not (isinstance(name, str) and FILE_NAME.fullmatch(name))]:
            raise UserError(f"parts: {str(wrong[0])[:60]!r} is no name of a part, which is small letters, digits and _")
        if reserved := [name for name in self.parts if name in RESERVED or self.parts.count(name) > 1]:
            raise UserError(f"parts: {reserved[0]!r} must be the name of one part, and not {', '.join(RESERVED)}")
        if self.lora is not None:
            rows, most = self.lora.rows, self.model.vocab_size
            require(rows <= most, "lora.rows", rows, f"at most {most}, the rows of the table")
        if self.steps != NONE:
            find("steps", self.steps)
        decoder = self.step_decoder
        if decoder is not None:
            if decoder.n_embd != self.model.n_embd:
                raise UserError(f"step_decoder.n_embd={decoder.n_embd}: must be {self.model.n_embd} as model.n_embd")
            if decoder.context_length <= (c := self.groups.latents_per_step):
                raise UserError(
                    f"step_decoder.context_length={decoder.context_length}: too short for a step group of "
                    f"groups.latents_per_step={c}"
                )


def read_config(file: Path) -> SavedConfig:
    """What a checkpoint's `config.json` holds.

    Raises:
        UserError: it is missing, or not the configuration of a checkpoint.
    """
    config = read_json(file)
    written = config.get("format", 1)
    if type(written) is not int or written < 1:
        raise UserError(f"{file}: format={written!r}: must be a whole number from 1 to {FORMAT}")
    if written > FORMAT:
        raise UserError(f"{file}: is of format {written}, this version reads up to {FORMAT}; update simcot_latent")
    try:
        if written == 1:
            config = as_of_format_2(config)
        if config.get("format") == 2:
            config = as_of_format_3(config)
        return from_plain(SavedConfig, config, "config")
    except UserError as error:
        raise UserError(f"{file}: not the configuration of a checkpoint ({error})") from error


def as_of_format_2(config: dict[str, Any]) -> dict[str, Any]:
    """The configuration of a checkpoint of format 1, which counted a state that is only decoded among the thoughts."""
    config = deepcopy(config)
    thoughts, run = config.get("thoughts"), config.get("run")
    counted = [thoughts, run.get("latent") if isinstance(run, dict) else None]
    if isinstance(thoughts, dict) and thoughts.get("feeds_last") is False:
        for section in counted:
            if isinstance(section, dict) and type(section.get("n_latents")) is int and section["n_latents"] > 1:
                section["n_latents"] -= 1
    return config | {"format": 2}


@dataclass(frozen=True)
class _Thoughts:
    """How a model answered, in formats 1 and 2."""

    thinks: bool = False
    n_latents: int = 0
    latents_per_step: int = 1
    feeds_last: bool = True
    question_end: str = ""
    answer_mark: str = "####"


def as_of_format_3(config: dict[str, Any]) -> dict[str, Any]:
    """The configuration of a checkpoint of format 2, in which a model's projector and its loop were the model's.

    Raises:
        UserError: its `thoughts` are none.
    """
    config = deepcopy(config)
    thoughts = from_plain(_Thoughts, config.pop("thoughts", None), "config.thoughts")
    run = _object(config, "run")
    latent = _object(run, "latent")
    widths = [section.pop("projector_width", None) for section in (config.get("model"), config.get("step_decoder"))
              if isinstance(section, dict)]  # fmt: skip
    n, c, last = thoughts.n_latents, thoughts.latents_per_step, thoughts.feeds_last
    states = n + (n > 0 and not last)
    require(c >= 1 and states % c == 0, "thoughts.n_latents", n, f"of whole groups of latents_per_step={c}")
    in_the_end = latent.get("n_latents", n) == n
    config |= {
        "format": 3,
        "answers": {key: getattr(thoughts, key) for key in ("thinks", "question_end", "answer_mark")},
        "loop": None,
        "stage": {"thoughts": n, "first_written": None if n and in_the_end else states // c},
        "groups": {"latents_per_step": c}
        | {key: latent[key] for key in ("surplus", "missing") if isinstance(latent.get(key), str)},
    }
    if thoughts.thinks:
        settings = {"feeds_last": last, "projector_width": widths[0] if widths else None}
        config["loop"] = {"key": "sequential", "settings": settings}
    if isinstance(run.get("model"), dict):
        width = run["model"].pop("projector_width", None)
        if latent:
            latent["projector_width"] = width
    parts = {
        "simcot_latent.objectives.latent.LatentObjective": ("replace", "sequential", "decoder"),
        "simcot_latent.objectives.weighted.WeightedObjective": ("none", "none", "none"),
    }.get(str(run.get("objective")))
    if parts is not None:
        del run["objective"]
        run |= dict(zip(("curriculum", "loop", "steps"), parts, strict=True)) | {"terms": []}
    return config


def _object(values: dict[str, Any], key: str) -> dict[str, Any]:
    """The object under a key; an empty one where there is none."""
    found = values.get(key)
    return found if isinstance(found, dict) else {}


def setting(checkpoint: Checkpoint, key: str) -> Any:
    """An option of the run that a checkpoint is of.

    Raises:
        UserError: its configuration lacks the option, or holds an impossible value for it.
    """
    value = checkpoint.config.get(key)
    fits, right = {
        "max_new_tokens": (_is_whole(value, 1, MAX_NEW_TOKENS), f"a whole number from 1 to {MAX_NEW_TOKENS:,}"),
        "data": (isinstance(value, dict) and isinstance(value.get("_target_"), str), "an object with a _target_"),
    }.get(key, (isinstance(value, str), "a text"))
    if not fits:
        is_there = "" if key in checkpoint.config else ", and is not there"
        raise UserError(f"{checkpoint.path}/{CONFIG}: run.{key} must be {right}{is_there}")
    return value


def _is_whole(value: object, least: int, most: int) -> bool:
    return type(value) is int and least <= value <= most
