"""What a run needs before its first step: a model and its tokenizer, problems in token ids."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from torch import nn

from simcot_latent.checkpoint import load_checkpoint
from simcot_latent.config import RunConfig, instantiate
from simcot_latent.data.batch import BatchOrder
from simcot_latent.data.format import Example
from simcot_latent.data.lazy import Lazily
from simcot_latent.data.problem import Problem
from simcot_latent.data.sources import LoadedSplit, Source, Split
from simcot_latent.data.sources.files import UNREAD
from simcot_latent.data.tokenizer import Tokenizer
from simcot_latent.distributed import Ranks
from simcot_latent.errors import UserError
from simcot_latent.interop.pretrained import load_pretrained, with_latent_tokens, with_projector
from simcot_latent.logs import track, warn
from simcot_latent.model.gpt import GPT, GPTConfig
from simcot_latent.objectives.base import Objective
from simcot_latent.training.stopping import StopSignal

if TYPE_CHECKING:
    from omegaconf import DictConfig


@dataclass
class Job:
    """All that stays the same during a run."""

    run: RunConfig
    raw: dict[str, Any]
    out_dir: Path
    start: Path | None
    """The checkpoint that training goes on from."""
    device: torch.device
    dtype: torch.dtype
    ranks: Ranks
    console: Console
    stop: StopSignal


def make_model(job: Job, raw: DictConfig) -> tuple[GPT, Tokenizer]:
    """The GPT that is to be trained and its tokenizer: new, or those of `init_from`.

    Raises:
        UserError: the shape is impossible, or the command line asks for another than that of `init_from`.
    """
    run = job.run
    if run.init_from is None:
        tokenizer: Tokenizer = instantiate(raw.tokenizer, "tokenizer")
        try:
            return GPT(GPTConfig(vocab_size=tokenizer.n_vocab, **run.model)), tokenizer
        except TypeError as error:
            raise UserError(f"model: {error}") from error
    if job.start is not None:  # what it began from need not be there any more
        saved = load_checkpoint(job.start, key="out_dir", verify=run.verify)
        return saved.model.train(), saved.tokenizer
    published = load_pretrained(run.init_from, key="init_from", verify=run.verify)
    saved = with_latent_tokens(published, str(run.new_token_init))
    from simcot_latent import cli  # hydra, which training from Python does without

    asked = cli.overridden("tokenizer")
    if asked and instantiate(raw.tokenizer, "tokenizer") != saved.tokenizer:
        raise UserError(
            f"tokenizer={asked[0]}: init_from={run.init_from} brings its own, {saved.tokenizer.name}; leave it out"
        )
    model, config = saved.model, asdict(saved.model.config)
    asked = cli.overridden("model")
    for key in run.model if "model" in asked else [name.removeprefix("model.") for name in asked]:
        if key == "projector_width" and config[key] is None:
            model = with_projector(model, run.model[key])
        elif run.model.get(key) != config.get(key):
            raise UserError(
                f"model.{key}={run.model.get(key)}: init_from={run.init_from} brings its own model, in which it is "
                f"{config.get(key)}; leave it out"
            )
    return model.train(), saved.tokenizer


def load_split(source: Source, split: Split, console: Console) -> LoadedSplit:
    """A split of the data, and what was noticed while reading it."""
    loaded = source.load(split)
    for note, count in sorted(loaded.notes.items()):
        if split == "train" or not note.startswith(UNREAD):  # which is the same for all splits of a folder
            console.print(f"{split}: {count} x {note}")
    return loaded


def encode_all(
    objective: Objective, problems: Sequence[Problem], split: str, job: Job
) -> tuple[Sequence[Problem], Sequence[Example]]:
    """Problems in token ids; those beyond the model's context end the run, or are dropped, counted and reported.

    Of train, only those that the run comes to are encoded (and made, where a source makes them), unless which ones are
    left depends on the length of all.

    Raises:
        UserError: a problem is too long (on_too_long=error), or none is left.
    """
    run = job.run
    limit = objective.model.config.context_length - objective.extra_length

    def encode(index: int) -> Example:
        example = objective.encode(problems[index])
        if example.length > limit and run.on_too_long == "error":
            raise UserError(
                f"{split} problem {index + 1} ({problems[index].question[:40]!r}...) has {example.length} tokens: "
                f"at most {limit} fit; "
                "raise model.context_length, or set on_too_long=drop"
            )
        return example

    if not problems:
        raise UserError(f"{split}: the data hold no problem")
    examples = Lazily(len(problems), encode)
    indices: Sequence[int] = range(len(problems))
    if split == "train" and run.num_iterations != -1 and run.on_too_long == "error":
        indices = BatchOrder(indices, run.target_examples_per_step, run.seed).read_by(run.num_iterations)
    for index in track(indices, f"encoding {split}", job.console):
        examples[index]
    if run.on_too_long == "error":
        return problems, examples
    kept = [i for i, example in enumerate(examples) if example.length <= limit]
    if dropped := len(problems) - len(kept):
        warn(job.console, f"{split}: dropped {dropped} of {len(problems)} problems of more than {limit} tokens")
    if not kept:
        raise UserError(f"{split}: no problem of at most {limit} tokens; raise model.context_length")
    return [problems[i] for i in kept], [examples[i] for i in kept]


def source_name(raw: dict[str, Any]) -> str:
    """The name of the run's data source, that of its module; its eval, if there is one, has the same."""
    return raw["data"]["_target_"].split(".")[-2]


def count_parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
