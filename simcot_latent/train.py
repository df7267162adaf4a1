"""python -m simcot_latent.train: the training loop and its command line."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from simcot_latent.checkpoint import Checkpoint
from simcot_latent.config import RunConfig, as_plain, instantiate, parse
from simcot_latent.data.batch import BatchOrder, Prefetch, micro_batches, pin, to_device
from simcot_latent.data.format import Example
from simcot_latent.data.lazy import Lazily
from simcot_latent.data.problem import Problem
from simcot_latent.data.sources import Source
from simcot_latent.data.tokenizer import Tokenizer
from simcot_latent.distributed import Ranks, autocast, pick_device, pick_dtype, ranks_on
from simcot_latent.errors import UserError, file_errors
from simcot_latent.logs import RunLog, make_console, make_progress, warn
from simcot_latent.model.gpt import GPT, set_block_options
from simcot_latent.model.losses import add_up
from simcot_latent.model.thoughts import ThoughtFormat
from simcot_latent.objectives.base import Objective
from simcot_latent.profiling import PROFILED, SKIPPED, WARMUP, StepProfile, part
from simcot_latent.training.memory import out_of_memory
from simcot_latent.training.nonfinite import NonFinite, save_batch
from simcot_latent.training.optimizer import lr_multiplier, make_optimizers, update
from simcot_latent.training.reporting import Interval, Reporter
from simcot_latent.training.resume import restore, trainer_state
from simcot_latent.training.run_folder import RunFolder
from simcot_latent.training.saving import make_room, save_checkpoint
from simcot_latent.training.setup import Job, encode_all, load_split, make_model
from simcot_latent.training.stopping import StopSignal
from simcot_latent.training.validation import HeldOut, collapse, validate
from simcot_latent.weights import broken_weights

if TYPE_CHECKING:
    from omegaconf import DictConfig


@dataclass
class PreparedStep:
    """What an optimizer step trains on: this rank's micro-batches, and their totals."""

    batches: list[Any]
    totals: dict[str, Tensor]


def main(raw: DictConfig) -> None:
    """Trains as the composed configuration says."""
    import hydra

    run, sections = parse(raw)
    objective_class: type[Objective] = hydra.utils.get_class(run.objective)
    find_data = partial(instantiate, raw.data, "data")
    train(run, sections, as_plain(raw), find_data, objective_class, lambda job: make_model(job, raw))


def train(
    run: RunConfig,
    sections: Any,
    options: dict[str, Any],
    find_data: Callable[[], Source],
    objective_class: type[Objective],
    make: Callable[[Job], tuple[GPT, Tokenizer]],
) -> None:
    """One run from its start to its report.

    Args:
        run: what all objectives share.
        sections: an instance of the objective's own `Config`.
        options: the whole configuration as plain values, for checkpoints.
        find_data: gives the data.
        objective_class: what is to be trained for.
        make: makes the model and its tokenizer, once the seed is set.

    Raises:
        SystemExit: the run was stopped before its end; see `StopSignal`.
    """
    # oneDNN keeps a program of some 100 KB for each shape it meets, 1024 of them unless told otherwise; no two steps
    # have the same number of tokens. Few serve the layers of a step, and a step takes as long as before.
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "128")
    stop = StopSignal(run.max_minutes)
    device = pick_device(run.device)

    def train_on(ranks: Ranks) -> int:
        console = make_console(ranks.is_main, stop.reader_gone)
        with RunFolder(run, console) as folder:
            out_dir, start = ranks.on_main(folder.take)
            dtype = pick_dtype(run.dtype, device)
            job = Job(run, options, out_dir, start, device, dtype, ranks, console, stop)
            trainer = make_trainer(job, sections, find_data, objective_class, make)
            with file_errors(f"out_dir={out_dir}"):
                return trainer.train()

    with ranks_on(device) as ranks:
        status = train_on(ranks)
    if status:
        raise SystemExit(status)


def make_trainer(
    job: Job,
    sections: Any,
    find_data: Callable[[], Source],
    objective_class: type[Objective],
    make: Callable[[Job], tuple[GPT, Tokenizer]],
) -> Trainer:
    """Loads what a run needs; see `train`."""
    run, console = job.run, job.console
    torch.manual_seed(run.seed)
    with file_errors("data"):
        source = find_data()
        train_split = load_split(source, "train", console)
        validation_split = load_split(source, "validation", console)
    with file_errors("init_from"), out_of_memory("making the model", job.device, "take a smaller model"):
        model, tokenizer = make(job)
        job.raw["model"] = {key: value for key, value in asdict(model.config).items() if key != "vocab_size"}
        objective = objective_class(model, tokenizer, run, sections)
        objective.to(job.device)
    problems, examples = encode_all(objective, train_split.problems, "train", job)
    validation = encode_all(objective, validation_split.problems[: run.eval_examples], "validation", job)
    held_out = HeldOut(*validation, getattr(source, "tolerance", 0.0))
    with file_errors(f"out_dir={job.out_dir}"):
        return Trainer(job, objective, problems, examples, held_out)


class Trainer:
    """One run: steps, evaluations, checkpoints.

    Args:
        job: what stays the same.
        objective: what is trained, on its device.
        problems: training problems.
        examples: the same in token ids.
        held_out: what it is validated on.
    """

    def __init__(
        self,
        job: Job,
        objective: Objective,
        problems: Sequence[Problem],
        examples: Sequence[Example],
        held_out: HeldOut,
    ) -> None:
        run = self.run = job.run
        self.job, self.ranks, self.console = job, job.ranks, job.console
        self.objective, self.problems, self.examples, self.held_out = objective, problems, examples, held_out
        if len(held_out.examples) < job.ranks.world:
            raise UserError(
                f"eval_examples: {len(held_out.examples)} held-out problems are fewer than the {job.ranks.world} ranks"
            )
        if run.target_examples_per_step < job.ranks.world:
            raise UserError(
                f"target_examples_per_step={run.target_examples_per_step}: must be at least the {job.ranks.world} ranks"
            )
        lengths = Lazily(len(examples), lambda index: examples[index].length)
        self.order = BatchOrder(lengths, run.target_examples_per_step, run.seed)
        steps_of_epochs = math.ceil(run.num_epochs * len(examples) / run.target_examples_per_step)
        self.num_steps = steps_of_epochs if run.num_iterations == -1 else run.num_iterations
        needed = SKIPPED + WARMUP + PROFILED
        if run.profile and self.num_steps < needed:
            raise UserError(f"profile=true: takes {needed} steps, this run has {self.num_steps}; raise num_iterations")
        self.optimizers = make_optimizers(objective, run)
        self.step = 0
        state: dict[str, Any] = {}
        if job.start is not None:
            state = restore(job.start, self.num_steps, objective, self.optimizers, job)
            self.step = state["step"]
        self.nonfinite = NonFinite(job.ranks, (state.get("nonfinite", 0), state.get("nonfinite_in_a_row", 0)))
        self.owes_validation = state.get("owes_validation", False)
        set_block_options(
            objective, run.compile, run.activation_checkpointing, run.compile_thoughts, run.later_attention
        )
        self.module = self.wrap(self.thoughts_now())
        self.reporter = Reporter(job, objective, self.num_steps)

    def wrap(self, thoughts: ThoughtFormat) -> nn.Module:
        """The objective as it is called in a stage: under DDP where there are ranks."""
        if self.ranks.world == 1:
            return self.objective
        # Decoder and projector take no part while there are no thoughts; looking for unused parameters later would only
        # cost.
        idle = thoughts.n_latents == 0 and (
            self.objective.step_decoder is not None or self.objective.model.projector is not None
        )
        return DistributedDataParallel(self.objective, find_unused_parameters=idle)

    def thoughts_now(self) -> ThoughtFormat:
        """How the model was trained to answer in the last step (before the first: in the first)."""
        return self.objective.thoughts_at(max(0, self.step - 1) / self.num_steps)

    def train(self) -> int:
        """Trains to the end, or until it is asked to stop; either way the last thing is a checkpoint.

        Returns:
            The exit status.
        """
        run, job, stop = self.run, self.job, self.job.stop
        if self.step == self.num_steps:
            self.console.print(f"{job.out_dir} is trained to its end, {self.num_steps} steps")
            return 0
        self.ranks.on_main(partial(make_room, job.out_dir, self.objective, run.optimizer))
        log = RunLog(job.out_dir, self.ranks.is_main, self.step, run.run, run.wandb_project, job.raw, self.console)
        stop.listen()
        self.reporter.announce(self.examples, len(self.held_out.examples))
        began, began_step = time.perf_counter(), self.step
        prefetch = Prefetch(self.prepare, self.num_steps)
        profiler = StepProfile(job.out_dir / "profile", self.console) if run.profile and self.ranks.is_main else None
        interval = Interval()
        metrics: dict[str, float] = {}
        with make_progress(self.console) as progress:
            bar = progress.add_task(run.mode, total=self.num_steps, completed=self.step)
            if self.owes_validation:
                self.validate(log, show=True)
                self.owes_validation = False
            while self.step < self.num_steps:
                with part("data"):
                    prepared = prefetch.get(self.step)
                with out_of_memory(
                    partial(self.reporter.sizes, self.step + 1, prepared), job.device, self.reporter.less_memory()
                ):
                    shares, totals, grad_norm, stopping = self.train_step(prepared)
                self.step += 1
                if profiler is not None:
                    profiler.step()
                interval.add(totals, prefetch)
                progress.update(bar, completed=self.step)
                last = self.step == self.num_steps
                validating = last or (run.eval_every != -1 and self.step % run.eval_every == 0)
                saving = not last and run.checkpoint_every != -1 and self.step % run.checkpoint_every == 0
                logging = self.step % run.log_every == 0 or last or self.step == 1
                if logging or validating or saving or stopping or self.nonfinite.is_due:
                    self.look_for_nonfinite()
                if logging:
                    self.reporter.step(
                        log,
                        self.step,
                        shares,
                        totals,
                        grad_norm,
                        interval,
                        self.thoughts_now().n_latents,
                        self.nonfinite.total,
                    )
                    interval = Interval()
                if stopping and not last:
                    self.owes_validation = validating
                    break
                if validating:
                    metrics = self.validate(log, show=not last)
                    interval = Interval()
                if saving:
                    self.save(log)
                    interval = Interval()
        seconds = time.perf_counter() - began
        prefetch.close()
        if profiler is not None:
            profiler.close()
        folder = self.save(log)
        log.close()
        if self.step < self.num_steps:
            why, status = stop.status(self.ranks)
            self.console.print(f"stopped {why} at step {self.step}; go on with resume=true out_dir={job.out_dir}")
            return status
        if self.ranks.is_main:
            self.console.print(f"{self.step - began_step} steps in {seconds:.0f} s; checkpoint {folder}")
            self.reporter.finished(self.as_checkpoint(), metrics, self.held_out)
        self.ranks.barrier()
        return 0

    def prepare(self, step: int) -> PreparedStep:
        """The batches of a step; a function of nothing but its number."""
        run, ranks = self.run, self.ranks
        thoughts = self.objective.thoughts_at(step / self.num_steps)
        indices = micro_batches(self.order.batch(step), run.device_batch_size, ranks.rank, ranks.world)
        batches = [self.objective.collate([self.examples[i] for i in piece], thoughts) for piece in indices]
        totals = add_up([batch.totals for batch in batches])
        return PreparedStep([pin(b) for b in batches] if self.job.device.type == "cuda" else batches, totals)

    def train_step(self, prepared: PreparedStep) -> tuple[dict[str, Tensor], dict[str, Tensor], Tensor, bool]:
        """One optimizer step: its shares and totals, the gradient norm, and whether any rank was told to stop."""
        run, job, ranks = self.run, self.job, self.ranks
        thoughts = self.objective.thoughts_at(self.step / self.num_steps)
        if thoughts != self.thoughts_now():
            self.begin_stage(thoughts)
        totals = ranks.sum(prepared.totals | {"stop": torch.tensor(float(job.stop.asked))})
        stopping = bool(totals.pop("stop") > 0)
        device_totals = {key: value.to(job.device, non_blocking=True) for key, value in totals.items()}
        lrm = lr_multiplier(run, self.step, self.num_steps)
        for group in chain.from_iterable(optimizer.param_groups for optimizer in self.optimizers):
            group["lr"] = group["peak_lr"] * lrm

        pieces: list[dict[str, Tensor]] = []
        for i, batch in enumerate(prepared.batches):
            synchronise = i == len(prepared.batches) - 1 or not isinstance(self.module, DistributedDataParallel)
            with nullcontext() if synchronise else self.module.no_sync():  # type: ignore[union-attr, operator]
                with part("forward"), autocast(job.device, job.dtype):
                    shares = self.module(to_device(batch, job.device), device_totals)
                with part("backward"):
                    # DDP averages gradients over ranks; shares add up.
                    (shares["loss"] * ranks.world).backward()
            pieces.append({key: value.detach() for key, value in shares.items()})
        shares = add_up(pieces)

        def skips(grad_norm: Tensor) -> bool:
            self.nonfinite.add(self.step + 1, shares["loss"], grad_norm)
            return run.on_nonfinite == "skip" and self.look_for_nonfinite()

        with part("update"):
            grad_norm = update(self.objective.parameters(), self.optimizers, run.max_grad_norm or math.inf, skips)
        return shares, totals, grad_norm, stopping

    def look_for_nonfinite(self) -> bool:
        """Whether a step since the last look had a loss or gradient that is no number; its batch is saved.

        Raises:
            UserError: one had, and on_nonfinite=error, or it is one too many in a row.
        """
        run, found = self.run, self.nonfinite.look()
        if not found:
            return False
        step, loss, norm = found[0]
        indices = self.order.batch(step - 1)
        file = self.ranks.on_main(lambda: save_batch(self.job.out_dir, step, loss, norm, indices, self.problems))
        what = f"loss is {loss:g}, gradient norm {norm:g} at step {step}" + (f" (its batch: {file})" if file else "")
        if run.on_nonfinite == "error" or self.nonfinite.in_a_row > run.max_nonfinite:
            skipped = "on_nonfinite=skip skips such steps" if run.on_nonfinite == "error" else (
                f"these are more than max_nonfinite={run.max_nonfinite} steps in a row")  # fmt: skip
            raise UserError(f"{what}: {self.reporter.unstable()}; {skipped}")
        warn(self.console, f"{what}: no update ({self.nonfinite.total} such steps so far)")
        return True

    def begin_stage(self, thoughts: ThoughtFormat) -> None:
        """A step before the first of a stage."""
        self.console.print(f"step {self.step:05d} | stage: {thoughts.n_latents} thoughts")
        self.objective.begin_stage(self.thoughts_now(), thoughts)
        self.module = self.wrap(thoughts)
        if self.objective.resets_optimizer:
            self.optimizers = make_optimizers(self.objective, self.run)

    def validate(self, log: RunLog, show: bool) -> dict[str, float]:
        """Evaluates the stage that training is in; `show` prints it."""
        n = min(self.run.eval_batch_size, len(self.held_out.examples))
        helps = f"lower eval_batch_size (now {self.run.eval_batch_size}) or max_new_tokens"
        with (
            out_of_memory(f"validating {n} problems at a time", self.job.device, helps),
            autocast(self.job.device, self.job.dtype),
        ):
            metrics = validate(self.objective, self.as_checkpoint(), self.held_out, self.run, self.ranks)
        log.write(self.step, metrics)
        if (collapsed := collapse(metrics)) is not None:
            warn(self.console, collapsed)
        if show:
            self.reporter.validated(self.step, metrics)
        return metrics

    def as_checkpoint(self) -> Checkpoint:
        """The run as it stands."""
        objective = self.objective
        return Checkpoint(
            model=objective.model,
            step_decoder=objective.step_decoder,
            tokenizer=objective.tokenizer,
            thoughts=self.thoughts_now(),
            config=self.job.raw,
            step=self.step,
        )

    def save(self, log: RunLog) -> Path:
        """Writes a checkpoint; rank 0's moments and weights are everybody's."""
        log.sync()
        return self.ranks.on_main(self.write_checkpoint)

    def write_checkpoint(self) -> Path:
        """Rank 0's part of `save`.

        Raises:
            UserError: the disk refuses it, or the model is none any more.
        """
        if broken := broken_weights(self.objective.named_parameters()):
            raise UserError(
                f"not saved at step {self.step}: {broken[0]} and {len(broken) - 1} more weights hold numbers that are "
                f"not finite, or over 1e19; checkpoints before it are as they were; {self.reporter.unstable()}"
            )
        total, in_a_row = self.nonfinite.state
        state = trainer_state(
            self.objective,
            self.optimizers,
            step=self.step,
            num_steps=self.num_steps,
            nonfinite=total,
            nonfinite_in_a_row=in_a_row,
            owes_validation=self.owes_validation,
        )
        with file_errors(f"out_dir={self.job.out_dir}"):
            return save_checkpoint(self.as_checkpoint(), self.job.out_dir, state, self.run.keep_checkpoints)


if __name__ == "__main__":
    from simcot_latent import cli

    cli.run(main, "train")
