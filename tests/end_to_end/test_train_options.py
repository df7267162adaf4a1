"""Every option of a run does what its description tells, seen from outside: by what optimizers are given, what
is read in a pass, and what is left in the folder. An option that nobody reads fails here.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import ARITHMETIC, TINY, TRAIN, Trained, read_lines, report_in, run, strict_json, write_jsonl
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.optim.optimizer import register_optimizer_step_pre_hook

import simcot_latent as sl
from simcot_latent.batches import ThoughtBatch, WrittenBatch
from simcot_latent.config import RunConfig
from simcot_latent.data.tokenizer import Tokenizer
from simcot_latent.method import Method
from simcot_latent.model.gpt import Block, Transformer
from simcot_latent.training.optimizer import lr_multiplier

# --- the schedule in closed form -------------------------------------------------------------------------------------


def by_the_formula(schedule: str, warmup: int, steps: int, final: float, step: int) -> float:
    """Rises by equal steps to 1, then falls to `final` along a line or half a cosine wave, or stays."""
    if step < warmup:
        return (step + 1) / warmup
    done = (step - warmup) / (steps - warmup)
    shape = {"linear": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2, "constant": 1.0}[schedule]
    return final + (1 - final) * shape


def make_run(**changes: Any) -> RunConfig:
    return RunConfig(mode="", model={}, data={}, tokenizer={}, **changes)


@pytest.mark.parametrize("final", [0.0, 0.1, 1.0])
@pytest.mark.parametrize(("warmup_ratio", "warmup"), [(0.0, 0), (0.05, 5), (0.25, 25), (0.999, 100), (1.0, 100)])
@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant"])
def test_the_learning_rate_in_closed_form(schedule: str, warmup_ratio: float, warmup: int, final: float) -> None:
    """Of a run of 100 steps, every step."""
    config = make_run(lr_schedule=schedule, warmup_ratio=warmup_ratio, final_lr_ratio=final)
    found = [lr_multiplier(config, step, 100) for step in range(100)]
    assert found == pytest.approx([by_the_formula(schedule, warmup, 100, final, step) for step in range(100)])
    assert max(found) == 1.0


@pytest.mark.parametrize("final", [0.0, 0.3])
def test_where_schedules_begin_bend_and_end(final: float) -> None:
    """Numbers that one can check in one's head: quarter, middle and end of the way down."""

    def at(schedule: str, step: int) -> float:
        return lr_multiplier(make_run(lr_schedule=schedule, warmup_ratio=0.2, final_lr_ratio=final), step, 50)

    rest = 1 - final
    for schedule in ("linear", "cosine", "constant"):
        assert [at(schedule, step) for step in (0, 4, 9, 10)] == pytest.approx([0.1, 0.5, 1.0, 1.0])
    assert [at("linear", step) for step in (20, 30, 40, 50)] == pytest.approx(
        [final + rest * share for share in (0.75, 0.5, 0.25, 0.0)]
    )
    assert [at("cosine", step) for step in (20, 30, 40, 50)] == pytest.approx(
        [final + rest * share for share in ((1 + 0.5**0.5) / 2, 0.5, (1 - 0.5**0.5) / 2, 0.0)]
    )
    assert [at("constant", step) for step in (20, 30, 40, 50)] == [1.0] * 4


# --- a run, watched --------------------------------------------------------------------------------------------------


@dataclass
class Update:
    """One call of an optimizer's `step`, as it is about to be made."""

    optimizer: str
    groups: list[dict[str, Any]]
    """Its groups' options; in place of the parameters their sizes."""
    gradient: float
    """Squared norm of all gradients that it is given."""
    moments: int
    """Parameters that it has moments of."""
    counts: set[float]
    """Steps that AdamW has counted."""


@dataclass
class Pass:
    """One call of the method."""

    batch: WrittenBatch | ThoughtBatch
    trains: bool
    dtype: torch.dtype
    method: Method

    @property
    def rows(self) -> int:
        return (self.batch.packing if isinstance(self.batch, WrittenBatch) else self.batch.questions).rows

    @property
    def ids(self) -> Tensor:
        return self.batch.ids_P if isinstance(self.batch, WrittenBatch) else self.batch.question_ids_P


@dataclass
class Watched:
    """What happened in a run, and what it left."""

    folder: Path
    updates: list[Update] = field(default_factory=list)
    passes: list[Pass] = field(default_factory=list)
    out: str = ""

    @property
    def training(self) -> list[Pass]:
        return [each for each in self.passes if each.trains]

    @property
    def evaluating(self) -> list[Pass]:
        return [each for each in self.passes if not each.trains]

    @property
    def lines(self) -> list[dict[str, Any]]:
        return read_lines(self.folder / "metrics.jsonl")

    def of(self, optimizer: str) -> list[Update]:
        return [update for update in self.updates if update.optimizer == optimizer]


@contextmanager
def watching(seen: Watched) -> Iterator[None]:
    """While this lasts, PyTorch's own hooks tell of every optimizer's every step and of every pass."""

    def before_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        groups = [
            {key: value for key, value in group.items() if key != "params"}
            | {"sizes": [tuple(parameter.shape) for parameter in group["params"]]}
            for group in optimizer.param_groups
        ]
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        squared = sum(gradient.double().square().sum().item() for gradient in gradients)
        state = list(optimizer.state.values())
        counts = {float(moments["step"]) for moments in state if "step" in moments}
        seen.updates.append(Update(type(optimizer).__name__, groups, squared, len(state), counts))

    def before_pass(module: nn.Module, args: tuple[Any, ...]) -> None:
        if isinstance(module, Method):
            dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else torch.float32
            seen.passes.append(Pass(args[0], torch.is_grad_enabled(), dtype, module))

    with ExitStack() as stack:
        stack.callback(register_optimizer_step_pre_hook(before_step).remove)
        stack.callback(register_module_forward_pre_hook(before_pass).remove)
        yield


def watch(folder: Path, *arguments: str, data: Sequence[str] = ARITHMETIC) -> Watched:
    """A small run, watched."""
    seen = Watched(folder / "run")
    with watching(seen):
        seen.out = run(TRAIN, *TINY, *data, "out_dir=run", *arguments, folder=folder).ok().out
    return seen


# --- what optimizers are given ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant"])
def test_every_group_follows_the_schedule_from_its_own_peak(schedule: str, tmp_path: Path) -> None:
    arguments = ("mode=weighted", "num_iterations=8", "warmup_ratio=0.25", f"lr_schedule={schedule}")
    rates = ("final_lr_ratio=0.2", "learning_rate=0.004", "matrix_lr=0.03", "eval_every=-1")
    seen = watch(tmp_path, *arguments, *rates)
    expected = [by_the_formula(schedule, 2, 8, 0.2, step) for step in range(8)]
    for optimizer, peak in (("AdamW", 0.004), ("Muon", 0.03)):
        updates = seen.of(optimizer)
        assert len(updates) == 8
        for group in zip(*(update.groups for update in updates), strict=True):
            assert [options["lr"] for options in group] == pytest.approx([peak * share for share in expected])
    steps = [line for line in seen.lines if "loss" in line]
    assert [line["lrm"] for line in steps] == pytest.approx(expected)
    assert [line["lr"] for line in steps] == pytest.approx([0.004 * share for share in expected])


def test_betas_and_decay_are_the_runs(tmp_path: Path) -> None:
    options = ("betas=[0.7,0.8]", "weight_decay=0.25", "mode=latent", "num_iterations=1", "eval_every=-1")
    seen = watch(tmp_path, *options)
    (adamw,), (muon,) = seen.of("AdamW"), seen.of("Muon")
    assert [group["betas"] for group in adamw.groups] == [(0.7, 0.8)] * 2
    for group in (*adamw.groups, *muon.groups):
        assert group["sizes"]
        vectors = [len(size) < 2 for size in group["sizes"]]
        assert group["weight_decay"] == (0.0 if all(vectors) else 0.25)
        assert all(vectors) or not any(vectors), "scales and matrices are apart"


def test_adamw_for_everything(tmp_path: Path) -> None:
    seen = watch(tmp_path, "optimizer=adamw", "mode=latent", "num_iterations=2", "eval_every=-1")
    assert [update.optimizer for update in seen.updates] == ["AdamW"] * 2
    trained = sum(math.prod(size) for group in seen.updates[0].groups for size in group["sizes"])
    assert trained == sum(parameter.numel() for parameter in seen.passes[0].method.parameters())


@pytest.mark.parametrize("max_norm", ["null", "0.05", "1e6"])
def test_gradients_are_clipped_to_the_norm(max_norm: str, tmp_path: Path) -> None:
    """What the optimizers get, all of them together; what is logged is the norm before."""
    seen = watch(tmp_path, f"max_grad_norm={max_norm}", "mode=weighted", "num_iterations=3", "eval_every=-1")
    given = [
        math.sqrt(sum(update.gradient for update in step))
        for step in zip(seen.of("AdamW"), seen.of("Muon"), strict=True)
    ]
    before = [line["grad_norm"] for line in seen.lines if "loss" in line]
    assert min(before) > 0.1
    limit = 0.05 if max_norm == "0.05" else math.inf
    assert given == pytest.approx([min(norm, limit) for norm in before], rel=1e-4)


@pytest.mark.parametrize("resets", [True, False])
def test_the_optimizer_is_reset_when_a_stage_begins_if_asked(resets: bool, tmp_path: Path) -> None:
    """Stages begin at steps 2 and 4 of 6: a fresh optimizer has no moments there and counts from one, a kept one goes
    on counting. The rate goes on either way."""
    stages = ("latent.warmup=0.33", "latent.stages=[{steps:1,share:0.33}]", "latent.n_latents=2")
    arguments = ("mode=latent", "num_iterations=6", "warmup_ratio=0", f"latent.reset_optimizer={str(resets).lower()}")
    seen = watch(tmp_path, *arguments, *stages, "eval_every=-1", "learning_rate=0.004")
    assert [line["n_latents"] for line in seen.lines if "loss" in line] == [0, 0, 1, 1, 2, 2]
    thoughts = [max(each.batch.counts) if isinstance(each.batch, ThoughtBatch) else 0 for each in seen.training]
    assert thoughts == [0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2], "two passes per step, as the log says"
    expected = [0, 1, 0, 1, 0, 1] if resets else [0, 1, 2, 3, 4, 5]
    for step, (adamw, muon, before) in enumerate(zip(seen.of("AdamW"), seen.of("Muon"), expected, strict=True)):
        assert (adamw.moments == 0) == (muon.moments == 0) == (before == 0)
        assert max(adamw.counts, default=0) == before
        assert adamw.groups[0]["lr"] == pytest.approx(0.004 * (1 - step / 6))


def test_a_decoder_of_the_base_begins_with_what_the_warm_up_has_taught_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """decoder.init=base: it is a copy of the base's blocks before the first step, and again before the first thought,
    in step 3 of 4."""
    forward, is_copy = Method.forward, []

    def watched(method: Method, batch: WrittenBatch | ThoughtBatch, totals: dict[str, Tensor]) -> dict[str, Tensor]:
        assert method.step_decoder is not None
        base = method.model.transformer.state_dict()
        is_copy.append(all(torch.equal(x, base[n]) for n, x in method.step_decoder.transformer.state_dict().items()))
        return forward(method, batch, totals)

    monkeypatch.setattr(Method, "forward", watched)
    arguments = ("mode=latent", "num_iterations=4", "latent.warmup=0.5", "latent.stages=0", "decoder.init=base")
    watch(tmp_path, *arguments, "device_batch_size=8", "eval_every=-1")
    assert is_copy[:4] == [True, False, True, False]


# --- what is read in a pass ------------------------------------------------------------------------------------------


def test_examples_per_step_and_per_pass(tmp_path: Path) -> None:
    """Seven per optimizer step, at most three at once."""
    sizes = ("target_examples_per_step=7", "device_batch_size=3")
    seen = watch(tmp_path, "mode=latent", "num_iterations=4", "eval_every=-1", *sizes)
    assert [each.rows for each in seen.training] == [3, 3, 1] * 4
    assert len(seen.of("AdamW")) == 4


@pytest.mark.parametrize(("epochs", "steps"), [(1, 3), (2, 5), (3, 8)])
def test_epochs_are_counted_in_problems(epochs: int, steps: int, tmp_path: Path) -> None:
    """20 problems, 8 per step: 2.5 steps an epoch, rounded up at the end."""
    data = ("data.train_size=20", "data.validation_size=4", "data.test_size=4")
    seen = watch(tmp_path, "mode=weighted", f"num_epochs={epochs}", "eval_every=-1", data=data)
    assert len(seen.of("AdamW")) == steps
    assert sum(each.rows for each in seen.training) == 8 * steps


def test_the_seed_orders_the_data(weighted_run: Trained, sums: Path, tmp_path: Path) -> None:
    """From the same weights: the same seed reads the same batches, another one others."""
    data = ("data=gsm8k", f"data.path={sums}")
    start = (f"init_from={weighted_run.out_dir}", "mode=weighted", "num_iterations=2", "eval_every=-1")
    read: list[list[list[int]]] = []
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        (tmp_path / name).mkdir()
        seen = watch(tmp_path / name, *start, f"seed={seed}", data=data)
        read.append([each.ids.tolist() for each in seen.training])
    assert read[0] == read[1] != read[2]


def test_the_seed_sets_the_weights(tmp_path: Path) -> None:
    """Of base and decoder, before any step: the same run twice is the same to the bit, another seed is another run."""
    found: list[Tensor] = []
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        run(TRAIN, *TINY, *ARITHMETIC, "mode=latent", "num_iterations=1", "learning_rate=1e-30", "matrix_lr=1e-30",
            "weight_decay=0", f"seed={seed}", f"out_dir={name}", folder=tmp_path).ok()  # fmt: skip
        checkpoint = sl.load_checkpoint(tmp_path / name)
        assert checkpoint.step_decoder is not None
        parts = (checkpoint.model, checkpoint.step_decoder.transformer)
        found.append(torch.cat([p.flatten() for part in parts for p in part.parameters() if p.dim() == 2]))
    assert torch.equal(found[0], found[1])
    assert (found[0] != found[2]).float().mean() > 0.99


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_number_format_of_training_and_validation(dtype: str, tmp_path: Path) -> None:
    seen = watch(tmp_path, "mode=weighted", "num_iterations=1", f"dtype={dtype}")
    assert {each.dtype for each in seen.training} == {getattr(torch, dtype)}
    assert {each.dtype for each in seen.evaluating} == {getattr(torch, dtype)}
    assert f"cpu, {dtype}" in seen.out


@pytest.mark.parametrize("asked", [True, False])
def test_compiling_and_checkpointing_reach_every_block(
    asked: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a compiled block computes is shown in tests/model; here only that all blocks, the decoder's too, are asked
    to be: compiling takes longer than everything else in this file."""
    compiled: list[Block] = []
    for_few: list[Block] = []
    monkeypatch.setattr(Block, "compile_parts", lambda block: compiled.append(block))
    monkeypatch.setattr(Block, "compile_few", lambda block: for_few.append(block))
    keys = ("compile", "compile_thoughts", "activation_checkpointing")
    attention = "sdpa" if asked else "products"
    options = (*(f"{key}={str(asked).lower()}" for key in keys), f"later_attention={attention}")
    seen = watch(tmp_path, "mode=latent", "num_iterations=1", "eval_every=-1", *options)
    blocks = [block for block in seen.passes[0].method.modules() if isinstance(block, Block)]
    assert len(blocks) == 2
    assert [block.checkpointing for block in blocks] == [asked] * 2
    assert compiled == for_few == (blocks if asked else [])
    transformers = [part for part in seen.passes[0].method.modules() if isinstance(part, Transformer)]
    assert [transformer.later_attention for transformer in transformers] == [attention] * 2


def test_step_accuracy_is_left_out_on_request(tmp_path: Path) -> None:
    """In the warm-up and with thoughts; the losses are the same."""
    lines: list[list[dict[str, Any]]] = []
    for tracked in ("true", "false"):
        (tmp_path / tracked).mkdir()
        arguments = ("mode=latent", "num_iterations=4", "latent.warmup=0.5", f"track_step_accuracy={tracked}")
        lines.append([line for line in watch(tmp_path / tracked, *arguments).lines if "loss" in line])
    with_it, without = lines
    assert all("step_accuracy" in line for line in with_it)
    assert not any("step_accuracy" in line for line in without)
    assert [line["loss"] for line in with_it] == [line["loss"] for line in without]


# --- when something is measured, and what is left ---------------------------------------------------------------------


def test_when_lines_are_logged_evaluations_made_and_checkpoints_kept(tmp_path: Path) -> None:
    """Of ten steps: a line for the first, every fourth and the last; an evaluation every third and at the end, on six
    problems, at most four at once; a checkpoint every second, of which the three newest stay."""
    often = ("log_every=4", "eval_every=3", "eval_examples=6", "eval_batch_size=4", "checkpoint_every=2")
    seen = watch(tmp_path, "mode=weighted", "num_iterations=10", "keep_checkpoints=3", *often)
    lines = seen.lines
    assert [line["step"] for line in lines if "loss" in line] == [1, 4, 8, 10]
    assert [line["step"] for line in lines if "val_loss" in line] == [3, 6, 9, 10]
    assert [each.rows for each in seen.evaluating] == [4, 2] * 4
    steps = sorted(path.name for path in seen.folder.iterdir() if path.name.startswith("step_"))
    assert steps == ["step_0000006", "step_0000008", "step_0000010"]


def test_only_at_the_end(tmp_path: Path) -> None:
    never = ("eval_every=-1", "checkpoint_every=-1")
    seen = watch(tmp_path, "mode=weighted", "num_iterations=4", "keep_checkpoints=9", *never)
    assert [line["step"] for line in seen.lines if "val_loss" in line] == [4]
    assert [path.name for path in seen.folder.glob("step_*")] == ["step_0000004"]


def test_the_length_of_answers_while_training_and_later(tmp_path: Path) -> None:
    """A model that never ends writes as much as it may: its answers take thoughts and `max_new_tokens`, in evals too,
    which take the run's limit."""
    arguments = ("mode=latent", "num_iterations=1", "latent.warmup=0", "latent.stages=0", "max_new_tokens=9")
    seen = watch(tmp_path, *arguments, "learning_rate=1e-30", "matrix_lr=1e-30")
    latest = seen.folder / "latest"
    run("evals.arithmetic", f"ckpt={latest}", "limit=4", "device=cpu", folder=tmp_path).ok()
    report = strict_json(report_in(seen.folder / "evals", "arithmetic.test").read_text())
    assert (report["max_new_tokens"], report["unfinished"], report["tokens_per_answer"]) == (9, 4, 5 + 9)


def test_problems_beyond_the_context(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """The longest problem fits a context of just its length. In one of a token less on_too_long=error ends the run with
    the problem's number and length; drop leaves it out, of training and validation, and says how many of how many."""
    rows = [{"question": f"What is {i} and 1?", "answer": f"<<{i}+1={i + 1}>>\n#### {i + 1}"} for i in range(19)]
    rows.append({"question": "What is " + "1 and " * 60 + "1?", "answer": "<<60+1=61>>\n#### 61"})
    write_jsonl(tmp_path / "data" / "train.jsonl", rows)
    length = len(tokenizer.encode(f"{rows[-1]['question']}\n{rows[-1]['answer']}")) + 1
    data = ("data=gsm8k", "data.path=data", "mode=weighted", "num_iterations=3")
    seen = watch(tmp_path, f"model.context_length={length}", "out_dir=whole", data=data)
    assert "dropped" not in seen.out

    refused = run(TRAIN, *TINY, *data, f"model.context_length={length - 1}", "out_dir=refused", folder=tmp_path).error
    for part in ("'What is 1 and 1 and", f"has {length} tokens: at most {length - 1} fit", "on_too_long=drop"):
        assert part in refused
    assert not (tmp_path / "refused").exists()
    seen = watch(tmp_path, f"model.context_length={length - 1}", "on_too_long=drop", data=data)
    (warned,) = [line for line in seen.out.splitlines() if line.startswith("warning:") and "dropped" in line]
    assert f"dropped 1 of 18 problems of more than {length - 1} tokens" in warned
    assert "| 17 problems, 2 held out |" in seen.out


def test_a_profile_names_the_parts_of_a_step(tmp_path: Path) -> None:
    seen = watch(tmp_path, "mode=latent", "num_iterations=9", "latent.warmup=0", "profile=true", "eval_every=-1")
    table = (seen.folder / "profile" / "table.txt").read_text()
    for part in ("data", "forward", "think", "go on", "decode steps", "head and loss", "backward", "update"):
        assert part in table
    assert strict_json((seen.folder / "profile" / "trace.json").read_text())["traceEvents"]


def test_no_profile_unless_asked(tmp_path: Path) -> None:
    seen = watch(tmp_path, "mode=weighted", "num_iterations=9", "eval_every=-1")
    assert not (seen.folder / "profile").exists()


@pytest.mark.parametrize("rationale", ["natural", "equations", "none"])
def test_what_the_baseline_writes(rationale: str, sums: Path, tmp_path: Path) -> None:
    """Whole sentences, steps only, or nothing but the answer."""
    data = ("data=gsm8k", f"data.path={sums}")
    seen = watch(tmp_path, "mode=weighted", "num_iterations=1", f"rationale={rationale}", "eval_every=-1", data=data)
    first = seen.training[0]
    assert isinstance(first.batch, WrittenBatch)
    rows = first.batch.packing.row_P[-len(first.batch.targets) :]
    text = first.method.tokenizer.decode(first.batch.targets.label_M[rows == 0].tolist())
    steps = "<<3+4=7>>\n<<7*2=14>>\n"
    if rationale == "natural":
        assert text.startswith("First ")
        assert text.endswith("Then there are 7*2=<<7*2=14>>14.\n#### 14")
    else:
        assert text == (steps if rationale == "equations" else "") + "#### 14"
