"""python -m simcot_latent.train: the training loop and its command line."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from simcot_latent.checkpoint import Checkpoint
from simcot_latent.config import MethodConfig, RunConfig, as_plain, instantiate, parse
from simcot_latent.curricula.base import Stage
from simcot_latent.data.batch import Prefetch, to_device
from simcot_latent.data.sources import Source
from simcot_latent.distributed import Ranks, autocast, pick_device, ranks_on
from simcot_latent.errors import UserError, file_errors
from simcot_latent.logs import RunLog, make_console, make_progress, warn
from simcot_latent.model.gpt import set_block_options
from simcot_latent.model.losses import add_up
from simcot_latent.profiling import StepProfile, part
from simcot_latent.training.batches import Batches, PreparedStep
from simcot_latent.training.memory import out_of_memory
from simcot_latent.training.nonfinite import NonFinite, save_batch
from simcot_latent.training.optimizer import lr_multiplier, make_optimizers, update
from simcot_latent.training.reporting import Interval, Reporter
from simcot_latent.training.resume import restore, trainer_state
from simcot_latent.training.run_folder import RunFolder
from simcot_latent.training.saving import as_checkpoint, make_room, save_checkpoint
from simcot_latent.training.setup import Job, Material, Start, make_model, prepare
from simcot_latent.training.stopping import StopSignal
from simcot_latent.training.validation import collapse, validate
from simcot_latent.weights import broken_weights

if TYPE_CHECKING:
    from omegaconf import DictConfig


def main(raw: DictConfig) -> None:
    """Trains as the composed configuration says."""
    run, method = parse(raw)
    find_data = partial(instantiate, raw.data, "data")
    train(run, method, as_plain(raw), find_data, lambda job: make_model(job, raw))


def train(
    run: RunConfig,
    method: MethodConfig,
    options: dict[str, Any],
    find_data: Callable[[], Source],
    make: Callable[[Job], Start],
) -> None:
    """One run from its start to its report.

    Args:
        run, method: the configuration.
        options: the same as plain values, for checkpoints.
        find_data: gives the data.
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
            job = Job(run, options, out_dir, start, device, ranks, console, stop)
            material = prepare(job, method, find_data, make)
            with file_errors(f"out_dir={out_dir}"):
                return Trainer(job, material).train()

    with ranks_on(device) as ranks:
        status = train_on(ranks)
    if status:
        raise SystemExit(status)


class Trainer:
    """One run: steps, evaluations, checkpoints.

    Args:
        job: what stays the same.
        material: what is trained, on what.
    """

    def __init__(self, job: Job, material: Material) -> None:
        run = self.run = job.run
        self.job, self.ranks, self.console = job, job.ranks, job.console
        method, examples, held_out = material.method, material.examples, material.held_out
        self.method, self.problems, self.examples, self.held_out = method, material.problems, examples, held_out
        if len(held_out.examples) < job.ranks.world:
            raise UserError(
                f"eval_examples: {len(held_out.examples)} held-out problems are fewer than the {job.ranks.world} ranks"
            )
        self.batches = Batches(method, examples, job)
        self.num_steps = self.batches.num_steps
        self.optimizers = make_optimizers(method, run)
        self.step = 0
        state: dict[str, Any] = {}
        if job.start is not None:
            state = restore(job.start, self.num_steps, method, self.optimizers, job)
            self.step = state["step"]
        self.nonfinite = NonFinite(job.ranks, (state.get("nonfinite", 0), state.get("nonfinite_in_a_row", 0)))
        self.owes_validation = state.get("owes_validation", False)
        set_block_options(method, run.compile, run.activation_checkpointing, run.compile_thoughts, run.later_attention)
        self.module = self.wrap(self.stage_now())
        self.dtype = job.dtype(method.model)
        self.reporter = Reporter(job, method, self.num_steps)

    def wrap(self, stage: Stage) -> nn.Module:
        """The method as it is called in a stage: under DDP where there are ranks."""
        if self.ranks.world == 1:
            return self.method
        # Looking for unused parameters where there always are thoughts would only cost.
        idle = stage.thoughts == 0 or self.method.curriculum.mixes_stages
        idle = idle and self.method.parts_idle_without_thoughts
        return DistributedDataParallel(self.method, find_unused_parameters=idle)

    def stage_now(self) -> Stage:
        """The stage of the last step (before the first: of the first)."""
        return self.batches.stage(max(0, self.step - 1))

    def train(self) -> int:
        """Trains to the end, or until it is asked to stop; either way the last thing is a checkpoint.

        Returns:
            The exit status.
        """
        run, job, stop = self.run, self.job, self.job.stop
        if self.step == self.num_steps:
            self.console.print(f"{job.out_dir} is trained to its end, {self.num_steps} steps")
            return 0
        self.ranks.on_main(partial(make_room, job.out_dir, self.method, run.optimizer))
        log = RunLog(job.out_dir, self.ranks.is_main, self.step, run.run, run.wandb_project, job.raw, self.console)
        stop.listen()
        self.reporter.announce(self.examples, len(self.held_out.examples))
        began, began_step = time.perf_counter(), self.step
        prefetch = Prefetch(self.batches.prepare, self.num_steps)
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
                        self.stage_now(),
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

    def train_step(self, prepared: PreparedStep) -> tuple[dict[str, Tensor], dict[str, Tensor], Tensor, bool]:
        """One optimizer step: its shares and totals, the gradient norm, and whether any rank was told to stop."""
        run, job, ranks = self.run, self.job, self.ranks
        stage = self.batches.stage(self.step)
        if stage != self.stage_now():
            self.begin_stage(stage)
        totals = ranks.sum(prepared.totals | {"stop": torch.tensor(float(job.stop.asked))})
        stopping = bool(totals.pop("stop") > 0)
        device_totals = {key: value.to(job.device, non_blocking=True) for key, value in totals.items()}
        self.method.begin_step(self.step, ranks.rank)
        lrm = lr_multiplier(run, self.step, self.num_steps)
        for group in chain.from_iterable(optimizer.param_groups for optimizer in self.optimizers):
            group["lr"] = group["peak_lr"] * lrm

        pieces: list[dict[str, Tensor]] = []
        for i, batch in enumerate(prepared.batches):
            synchronise = i == len(prepared.batches) - 1 or not isinstance(self.module, DistributedDataParallel)
            with nullcontext() if synchronise else self.module.no_sync():  # type: ignore[union-attr, operator]
                with part("forward"), autocast(job.device, self.dtype):
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
            grad_norm = update(self.method.parameters(), self.optimizers, run.max_grad_norm or math.inf, skips)
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
        indices = self.batches.order.batch(step - 1)
        file = self.ranks.on_main(lambda: save_batch(self.job.out_dir, step, loss, norm, indices, self.problems))
        what = f"loss is {loss:g}, gradient norm {norm:g} at step {step}" + (f" (its batch: {file})" if file else "")
        if run.on_nonfinite == "error" or self.nonfinite.in_a_row > run.max_nonfinite:
            skipped = "on_nonfinite=skip skips such steps" if run.on_nonfinite == "error" else (
                f"these are more than max_nonfinite={run.max_nonfinite} steps in a row")  # fmt: skip
            raise UserError(f"{what}: {self.reporter.unstable()}; {skipped}")
        warn(self.console, f"{what}: no update ({self.nonfinite.total} such steps so far)")
        return True

    def begin_stage(self, stage: Stage) -> None:
        """A step before the first of a stage."""
        self.console.print(f"step {self.step:05d} | stage: {stage.in_words}")
        self.method.begin_stage(self.stage_now(), stage)
        self.module = self.wrap(stage)
        if self.method.curriculum.resets_optimizer:
            self.optimizers = make_optimizers(self.method, self.run)

    def validate(self, log: RunLog, show: bool) -> dict[str, float]:
        """Evaluates the stage that training is in; `show` prints it."""
        n = min(self.run.eval_batch_size, len(self.held_out.examples))
        helps = f"lower eval_batch_size (now {self.run.eval_batch_size}) or max_new_tokens"
        with (
            out_of_memory(f"validating {n} problems at a time", self.job.device, helps),
            autocast(self.job.device, self.dtype),
        ):
            metrics = validate(self.method, self.as_checkpoint(), self.held_out, self.run, self.ranks)
        log.write(self.step, metrics)
        if (collapsed := collapse(metrics)) is not None:
            warn(self.console, collapsed)
        if show:
            self.reporter.validated(self.step, metrics)
        return metrics

    def as_checkpoint(self) -> Checkpoint:
        """The run as it stands."""
        return as_checkpoint(self.method, self.stage_now(), self.job.raw, self.step)

    def save(self, log: RunLog) -> Path:
        """Writes a checkpoint; rank 0's moments and weights are everybody's."""
        log.sync()
        return self.ranks.on_main(self.write_checkpoint)

    def write_checkpoint(self) -> Path:
        """Rank 0's part of `save`.

        Raises:
            UserError: the disk refuses it, or the model is none any more.
        """
        if broken := broken_weights(self.method.named_parameters()):
            raise UserError(
                f"not saved at step {self.step}: {broken[0]} and {len(broken) - 1} more weights hold numbers that are "
                f"not finite, or over 1e19; checkpoints before it are as they were; {self.reporter.unstable()}"
            )
        total, in_a_row = self.nonfinite.state
        state = trainer_state(
            self.method,
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
