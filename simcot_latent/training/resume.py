"""Going on with a run: what is saved for it, what is restored, and which options may differ."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from simcot_latent.checkpoint import Checkpoint, TrainerState, load_checkpoint, load_trainer_state, progress
from simcot_latent.checkpoint_config import setting
from simcot_latent.checkpoint_folders import CONFIG, STATE_JSON, STATE_TENSORS
from simcot_latent.config import MethodConfig, RunConfig, one_line
from simcot_latent.errors import UserError, some
from simcot_latent.logs import warn
from simcot_latent.loops.base import ThoughtLoop, is_like
from simcot_latent.method import Method
from simcot_latent.model.lora import LoRA, added_weights, frozen_weights
from simcot_latent.training.optimizer import Muon
from simcot_latent.weights import require_finite

if TYPE_CHECKING:
    from simcot_latent.training.setup import Job

ABOUT_THE_COMMAND = {"resume", "resume_with_changes", "out_dir", "max_minutes"}
"""Options that say nothing about the run itself."""

FREE = {
    "device", "compile", "compile_thoughts", "later_attention", "activation_checkpointing", "device_batch_size",
    "profile", "log_every", "eval_every",
    "eval_batch_size", "checkpoint_every", "keep_checkpoints", "on_nonfinite", "max_nonfinite", "verify", "run",
    "wandb_project",
}  # fmt: skip
"""Options that say where and in what pieces it is computed, what is reported and what kept: the same training."""


PREFIX = "optimizer/"
"""Of the names of what optimizers keep: `optimizer/<parameter>/<key>`."""

UNMERGED = "unmerged/"
"""Of the names of what a merged model does not hold (`lora.merge`): frozen weights, and what is beside them."""


def trainer_state(method: Method, optimizers: Sequence[torch.optim.Optimizer], **values: Any) -> TrainerState:
    """What it takes to go on with a run, beside its checkpoint."""
    names: dict[Tensor, str] = {p: name for name, p in method.named_parameters()}
    tensors = {
        f"{PREFIX}{names[parameter]}/{key}": value
        for optimizer in optimizers
        for parameter, moments in optimizer.state.items()
        for key, value in moments.items()
    }
    if method.lora is not None and method.lora.merged:
        unmerged = frozen_weights(method.model) | added_weights(method.model)
        tensors |= {f"{UNMERGED}{name}": tensor for name, tensor in unmerged.items()}
    return TrainerState(tensors | {"random/cpu": torch.get_rng_state()}, values)


def restore(
    folder: Path, num_steps: int, method: Method, optimizers: Sequence[torch.optim.Optimizer], job: Job
) -> dict[str, Any]:
    """Puts a checkpoint's weights, moments and random state in place; the plain values beside them.

    Raises:
        UserError: it is damaged, or was trained with other options than `resume` allows, see `check_changes`.
    """
    run = job.run
    saved = load_checkpoint(folder, job.device, key="out_dir", verify=run.verify, merge_lora=False)
    state = load_trainer_state(folder, run.verify)
    step, planned = progress(state, folder)
    if step != saved.step:
        raise UserError(
            f"{folder / STATE_JSON}: says step={step}, but {folder / CONFIG} says step={saved.step}; they are not of "
            "one checkpoint"
        )
    check_changes(saved, planned, num_steps, method, job)
    unmerged = {name.removeprefix(UNMERGED): x for name, x in state.tensors.items() if name.startswith(UNMERGED)}
    if unmerged:
        require_finite(unmerged, folder / STATE_TENSORS)
    copy_weights(saved, method, unmerged)
    tensors = state.tensors
    if drops_decoder(method):
        tensors = {name: x for name, x in tensors.items() if not name.startswith(f"{PREFIX}step_decoder.")}
    restore_moments(tensors, method, optimizers, folder / STATE_TENSORS)
    try:
        torch.set_rng_state(state.tensors["random/cpu"])
    except (KeyError, RuntimeError, TypeError) as error:
        raise UserError(f"{folder / STATE_TENSORS}: random/cpu is not the state of a random generator") from error
    job.console.print(f"going on from {folder}")
    return state.values


def drops_decoder(method: Method) -> bool:
    """Whether a decoder that an earlier version made, and did not train, is left out: that of loss.step_weight=0."""
    return method.step_decoder is None and method.config.steps == "decoder" and method.config.loss.step_weight == 0


MOMENTS: dict[type[torch.optim.Optimizer], tuple[str, ...]] = {
    torch.optim.AdamW: ("step", "exp_avg", "exp_avg_sq"),
    Muon: ("momentum",),
}
"""What an optimizer keeps of a parameter that has had a gradient."""


def restore_moments(
    tensors: Mapping[str, Tensor], method: Method, optimizers: Sequence[torch.optim.Optimizer], file: Path
) -> None:
    """Gives the optimizers what they kept of each parameter, see `trainer_state`.

    Raises:
        UserError: something is missing, left over, of another shape, or a number that moments cannot be.
    """
    left = {name for name in tensors if name.startswith(PREFIX)}
    owner = {p: o for o in optimizers for group in o.param_groups for p in group["params"]}
    for name, parameter in method.named_parameters():
        if (optimizer := owner.get(parameter)) is None:  # it is frozen
            continue
        keys = {key: f"{PREFIX}{name}/{key}" for key in MOMENTS[type(optimizer)]}
        found = [full for full in keys.values() if full in tensors]
        if not found:  # it has had no gradient yet
            continue
        if missing := [full for full in keys.values() if full not in tensors]:
            raise UserError(f"{file}: lacks {missing[0]}")
        for key, full in keys.items():
            tensor, shape = tensors[full], torch.Size() if key == "step" else parameter.shape
            if tensor.shape != shape or tensor.dtype != torch.float32:
                raise UserError(f"{file}: {full} must be float32 numbers of shape {tuple(shape)}")
            if not tensor.isfinite().all() or (key in ("step", "exp_avg_sq") and (tensor < 0).any()):
                right = " and at least 0" if key in ("step", "exp_avg_sq") else ""
                raise UserError(f"{file}: {full} holds numbers that no training leaves; they must be finite{right}")
        # Step counts stay on the CPU where the optimizer put them there.
        stays = parameter.device.type == "cpu"
        optimizer.state[parameter] = {
            key: tensors[full] if key == "step" and stays else tensors[full].to(parameter.device)
            for key, full in keys.items()
        }
        left.difference_update(found)
    if left:
        raise UserError(f"{file}: holds {some(sorted(left))}, of which this run has no parameter")


def copy_weights(saved: Checkpoint, method: Method, unmerged: Mapping[str, Tensor]) -> None:
    """A checkpoint's weights into what is to be trained; of the same shapes, see `never_changing`.

    Args:
        unmerged: weights of the model that are to be taken in place of the merged ones.

    Raises:
        UserError: a further part is of other shapes.
    """
    modules = {"model": saved.model, "loop": saved.loop, "step_decoder": saved.step_decoder}
    states = {name: module.state_dict() for name, module in modules.items() if module is not None}
    states["model"] |= unmerged
    if "step_decoder" in states:  # whose table is the model's
        table = {name: x for name, x in states["model"].items() if name.startswith("embedding.")}
        states["step_decoder"] |= table
    for name, module in method.named_children():
        try:
            module.load_state_dict(states[name] if name in states else saved.parts[name])
        except RuntimeError as error:
            raise UserError(
                f"{saved.path}/{name}.safetensors: does not fit this run ({one_line(str(error))})"
            ) from error


def check_changes(saved: Checkpoint, planned: int, num_steps: int, method: Method, job: Job) -> None:
    """Says which options differ from those of the run so far.

    Args:
        planned: the steps that it was training for, where this run is for `num_steps`.

    Raises:
        UserError: one does that can never change in a run; or, with resume=auto, one that changes what is trained (but
            for `resume_with_changes=true`).
    """
    changes = changed_options(with_defaults(saved.config, method, job.raw), job.raw)
    barred = {key: text for key, text in changes.items() if key.partition(".")[0] not in FREE}
    if never := never_changing(saved, planned, num_steps, method, job.run):
        others = f"; options that differ: {', '.join(barred.values())}" if barred else ""
        raise UserError(
            f"resume: {saved.path} cannot be gone on with: {', '.join(never)} may not change in a run; give the same, "
            f"or another out_dir{others}"
        )
    if barred and job.run.resume == "auto" and not job.run.resume_with_changes:
        raise UserError(
            f"resume=auto: {saved.path} was trained with other options: {', '.join(barred.values())}; give the same, "
            "another out_dir, or resume_with_changes=true"
        )
    if changes:
        warn(job.console, f"resume: from here on other options than before: {', '.join(changes.values())}")


def never_changing(saved: Checkpoint, planned: int, num_steps: int, method: Method, run: RunConfig) -> list[str]:
    """What differs from the run so far and may not, whatever `resume_with_changes` says: weights or moments would not
    fit, or the schedules of stages and learning rate would be others."""
    found: list[str] = []
    if planned != num_steps:
        found.append(f"the number of steps (was {planned}, is {num_steps}; see num_iterations)")
    if (before := setting(saved, "optimizer")) != run.optimizer:
        found.append(f"optimizer (was {before}, is {run.optimizer})")
    pairs = {"model": (saved.model, method.model), "decoder": (saved.step_decoder, method.step_decoder)}
    seen: set[str] = set()
    for name, (theirs, ours) in pairs.items():
        before, now = (None if part is None else dataclasses.asdict(part.config) for part in (theirs, ours))
        if before is None or now is None:
            if before != now and not (name == "decoder" and now is None and drops_decoder(method)):
                found.append(f"{name} (there was {'none' if before is None else 'one'})")
            continue
        differ = [key for key in now if before[key] != now[key] and key not in seen]
        seen.update(differ)  # the decoder has most of its shape from the model
        found += [f"{name}.{key} (was {before[key]}, is {now[key]})" for key in differ]
    return (
        found + other_lora(saved.lora, method.lora) + other_loop(saved.loop, method.loop) + other_parts(saved, method)
    )


def other_lora(theirs: LoRA | None, ours: LoRA | None) -> list[str]:
    """How what is beside two models differs; whether checkpoints merge it may change."""
    if theirs is None or ours is None:
        return [] if theirs is ours else [f"lora (there was {'none' if theirs is None else 'one'})"]
    before, now = dataclasses.asdict(theirs), dataclasses.asdict(ours)
    changed = [key for key in now if before[key] != now[key] and key != "merged"]
    return [f"lora.{key} (was {before[key]}, is {now[key]})" for key in changed]


def other_loop(theirs: ThoughtLoop | None, ours: ThoughtLoop | None) -> list[str]:
    """How two thought loops differ."""
    if ours is None or (theirs is not None and is_like(theirs, ours)):
        return [] if theirs is None or ours is not None else [f"loop (was {theirs.key}, is none)"]
    if theirs is None or type(theirs) is not type(ours):
        return [f"loop (was {'none' if theirs is None else theirs.key}, is {ours.key})"]
    before, now = dataclasses.asdict(theirs.config), dataclasses.asdict(ours.config)
    return [f"latent.{key} (was {before[key]}, is {now[key]})" for key in now if before[key] != now[key]]


def other_parts(saved: Checkpoint, method: Method) -> list[str]:
    """What else is trained now and was not before, or the other way round."""
    now = {name for name, _ in method.named_children()} - {"model", "loop", "step_decoder"}
    return [
        f"{name} (there was {'one' if name in saved.parts else 'none'})" for name in sorted(saved.parts.keys() ^ now)
    ]


def with_defaults(before: dict[str, Any], method: Method, now: dict[str, Any]) -> dict[str, Any]:
    """A saved configuration, with the defaults of the options that came into being after it was saved.

    Args:
        now: the configuration of this run, which says what class its data source is.
    """
    groups = {key: value for key, value in defaults(MethodConfig).items() if key in ("distill", "written")}
    filled = defaults(RunConfig) | groups | before
    data, target = filled.get("data"), now["data"]["_target_"]
    if isinstance(data, dict) and data.get("_target_") == target:
        module, _, name = target.rpartition(".")
        source: type = getattr(import_module(module), name)
        filled["data"] = (defaults(source) if dataclasses.is_dataclass(source) else {}) | data
    sections = [(field.name, getattr(method.config, field.name)) for field in dataclasses.fields(method.config)]
    for name, value in [*sections, ("lora", method.run.lora)]:
        given, saved = now.get(name), filled.get(name)
        if isinstance(saved, dict) and isinstance(given, dict) and dataclasses.is_dataclass(value):
            # A method's section need not have all keys: those that this run leaves out are no change either.
            filled[name] = {k: v for k, v in defaults(type(value)).items() if k in given} | saved
    return filled


def defaults(cls: type) -> dict[str, Any]:
    """The fields of a dataclass that have a default, by name."""
    found: dict[str, Any] = {}
    for field in dataclasses.fields(cls):
        if field.default is not dataclasses.MISSING:
            found[field.name] = field.default
        elif field.default_factory is not dataclasses.MISSING:
            value = field.default_factory()
            found[field.name] = defaults(type(value)) if dataclasses.is_dataclass(value) else value
    return found


def changed_options(before: dict[str, Any], now: dict[str, Any], prefix: str = "") -> dict[str, str]:
    """`key (was .., is ..)` of each option that a resumed run was given another value for, by its key."""
    changes: dict[str, str] = {}
    for key in sorted((before.keys() | now.keys()) - (set() if prefix else ABOUT_THE_COMMAND)):
        old, new = before.get(key), now.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            changes |= changed_options(old, new, f"{prefix}{key}.")
        elif old != new:
            changes[f"{prefix}{key}"] = f"{prefix}{key} (was {old}, is {new})"
    return changes
