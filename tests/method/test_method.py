"""Parts make a method together, or are refused in a line that says why; terms are found by name."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from simcot_latent.batches import ThoughtBatch
from simcot_latent.config import LatentConfig, LossConfig, MethodConfig, RunConfig
from simcot_latent.curricula.base import Stage
from simcot_latent.data.problem import Problem
from simcot_latent.data.tokenizer import Tokenizer
from simcot_latent.errors import UserError
from simcot_latent.loops.base import NoSettings
from simcot_latent.loops.pause import Pause
from simcot_latent.loops.sequential import Sequential, SequentialConfig
from simcot_latent.method import Method
from simcot_latent.model.gpt import GPT
from simcot_latent.model.linear import Linear
from simcot_latent.model.losses import Labelled, add_up
from simcot_latent.model.packing import Packing
from simcot_latent.parts import PARTS
from simcot_latent.terms.base import Collated, Rows, Term, TermLoss, Trace

MakeMethod = Callable[..., Method]


@pytest.fixture
def make_method(make_model: Callable[..., GPT], make_run: Callable[..., RunConfig], tokenizer: Tokenizer) -> MakeMethod:
    """`make_method(config, loop=None, **run)`: the same random model each time."""

    def make(config: MethodConfig, loop: Pause | Sequential | None = None, **run: Any) -> Method:
        model = make_model("llama", vocab_size=tokenizer.n_vocab, context_length=256)
        return Method(model, tokenizer, make_run(**({"rationale": "equations"} | run)), config, loop)

    return make


def simcot(**parts: Any) -> MethodConfig:
    """Three thoughts of a step each, no other stage than the last."""
    latent = LatentConfig(n_latents=3, warmup=0.0, stages=0, **parts.pop("latent", {}))
    return MethodConfig.simcot(latent, loss=parts.pop("loss", None), **parts)


def collate(method: Method, problems: Sequence[Problem]) -> ThoughtBatch:
    batch = method.collate([method.encode(problem) for problem in problems], method.last_stage)
    assert isinstance(batch, ThoughtBatch)
    return batch


def run_step(method: Method, problems: Sequence[Problem]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Shares and gradients of an optimizer step; no gradient counts as zero."""
    batch = collate(method, problems)
    method.zero_grad()
    shares = method(batch, batch.totals)
    shares["loss"].backward()
    gradients = {n: torch.zeros_like(p) if p.grad is None else p.grad.clone() for n, p in method.named_parameters()}
    return {key: value.detach() for key, value in shares.items()}, gradients


# Parts that do not go together


REFUSED: dict[str, tuple[MethodConfig, dict[str, str], str]] = {
    "a decoder without a loop": (
        MethodConfig(steps="decoder"),
        {},
        "steps=decoder: needs thoughts, which loop=none has not; take a loop, or steps=none",
    ),
    "stages without a loop": (
        MethodConfig(curriculum="replace"),
        {},
        "curriculum=replace: needs thoughts, which loop=none has not; take a loop, or none",
    ),
    "thoughts for natural text": (
        simcot(),
        {"rationale": "natural", "mode": "latent"},
        "rationale=natural: must be equations with curriculum=replace, which writes single steps behind the thoughts",
    ),
    "thoughts for answers alone": (
        simcot(loop="pause", steps="none"),
        {"rationale": "none", "mode": "mine"},
        "rationale=none: must be equations with curriculum=replace, which writes single steps behind the thoughts",
    ),
    "nothing to minimise": (
        simcot(steps="none", loss=LossConfig(answer_weight=0.0)),
        {},
        "loss.answer_weight=0: must be above 0 where no other term of the loss is left",
    ),
    "a projector that is not there": (
        simcot(loop="pause", latent={"projector_width": 16}),
        {},
        "latent.projector_width=16: must be null with loop=pause, which has none",
    ),
    "single steps after natural text": (
        simcot(curriculum="none", latent={"surplus": "write"}),
        {"rationale": "natural"},
        "rationale=natural: must be equations with latent.surplus=write, which writes single steps behind the thoughts",
    ),
    "keys that a loop does not know": (
        simcot(distill=["kv"]),
        {},
        "distill=kv: needs the keys of thoughts, which loop=sequential lacks; take loop=jacobi, looped or pause",
    ),
    "a pull without a loop": (
        MethodConfig(distill=["hidden"]),
        {},
        "distill=hidden: needs thoughts, which loop=none has not; take a loop, or distill=none",
    ),
    "pauses of which the last is not read": (
        simcot(loop="pause", latent={"feeds_last": False}),
        {},
        "latent.feeds_last=false: must be true with loop=pause, whose thoughts are all read",
    ),
}


@pytest.mark.parametrize(("config", "run", "message"), REFUSED.values(), ids=REFUSED)
def test_parts_that_do_not_go_together(
    make_method: MakeMethod, config: MethodConfig, run: dict[str, str], message: str
) -> None:
    with pytest.raises(UserError) as caught:
        make_method(config, **run)
    assert str(caught.value) == message


@pytest.mark.parametrize("curriculum", ["none", "replace"])
@pytest.mark.parametrize("loop", ["sequential", "pause"])
@pytest.mark.parametrize("steps", ["none", "decoder"])
def test_all_others_do(
    make_method: MakeMethod, problems: list[Problem], curriculum: str, loop: str, steps: str
) -> None:
    """Each is trained, and what is trained besides the model is among its parameters."""
    method = make_method(simcot(curriculum=curriculum, loop=loop, steps=steps))
    assert method.last_stage == Stage(3, first_written=None)
    shares, gradients = run_step(method, problems)
    assert ("step_loss" in shares) == (method.step_decoder is not None) == (steps == "decoder")
    assert shares["loss"].isfinite()
    own = {name.split(".")[0] for name in gradients} - {"model"}
    learns = {"loop": loop == "pause", "step_decoder": steps == "decoder"}
    assert own == {name for name, is_there in learns.items() if is_there}
    assert method.parts_idle_without_thoughts == bool(own)
    assert all(gradients[name].abs().max() > 0 for name in gradients if not name.startswith("model."))


def test_without_a_curriculum_thoughts_stand_for_all_steps_from_the_start(make_method: MakeMethod) -> None:
    """And stages are not asked for."""
    latent = LatentConfig(n_latents=3, warmup=0.3, stages=0.3, reset_optimizer=True)
    method = make_method(MethodConfig.simcot(latent, curriculum="none"))
    assert {method.stage_at(progress) for progress in (0.0, 0.5, 1.0)} == {Stage(3, first_written=None)}
    assert not method.curriculum.resets_optimizer
    assert make_method(MethodConfig.simcot(latent)).curriculum.resets_optimizer


class Noisy(Sequential):
    """As somebody may register it."""


def test_a_trained_loop_is_taken_if_it_is_of_the_kind(make_method: MakeMethod) -> None:
    """A loop of another kind, or of other settings, says nothing about this one."""
    settings = SequentialConfig(projector_width=8)
    alike, other, narrow = Sequential(32, settings), Sequential(32, SequentialConfig()), Sequential(16, settings)
    config = simcot(latent={"projector_width": 8})
    assert make_method(config, alike).loop is alike
    for loop in (other, narrow, Noisy(32, settings), Pause(32, NoSettings()), None):
        found = make_method(config, loop).loop
        assert found is not loop
        assert type(found) is Sequential
        assert (found.width, found.config) == (32, settings)
    assert make_method(MethodConfig(), alike).loop is None


def test_everything_that_is_trained_gathers_its_gradients(
    make_method: MakeMethod, problems: list[Problem], terms: None
) -> None:
    """Model, loop, decoder, and what a term has of its own: each layer while thoughts are thought, and none after."""
    method = make_method(simcot(terms=["linear"], latent={"projector_width": 8}))
    gathers: dict[str, bool] = {}

    def note(name: str) -> Callable[..., None]:
        def hook(layer: Linear, *_: Any) -> None:
            gathers[name] = layer.gathering is not None

        return hook

    layers = {name: part for name, part in method.named_modules() if isinstance(part, Linear)}
    for name, layer in layers.items():
        layer.register_forward_hook(note(name))
    run_step(method, problems)
    assert {name.split(".")[0] for name in layers} == {"model", "loop", "step_decoder", "readout"}
    assert gathers == dict.fromkeys(layers, True)
    assert all(layer.gathering is None for layer in layers.values())


# Terms


class Small(Term):
    """A number of its own: the mean square of all thoughts."""

    name = "small"

    def loss(self, trace: Trace, batch: Any, read_LD: Tensor | None, totals: dict[str, Tensor]) -> TermLoss:
        assert batch is read_LD is None
        latents_BKD = trace.thoughts.latents
        rows = totals["problems"]
        value = latents_BKD.square().mean(dim=(1, 2)).sum() / rows

        def metrics(nll_M: Tensor, correct_M: Tensor) -> dict[str, Tensor]:
            return {"rows_share": len(latents_BKD) / rows}

        return TermLoss(value=value, metrics=metrics)


class Heavy(Small):
    """Counts thrice, and is logged under its key."""

    name = ""

    @property
    def weight(self) -> float:
        return 3.0


class Nothing(Small):
    """Counts nothing: whatever it were asked would fail."""

    @property
    def weight(self) -> float:
        return 0.0

    def __init__(self, model: GPT, tokenizer: Tokenizer, method: MethodConfig) -> None:
        super().__init__(model, tokenizer, method)
        self.modules = {"idle": nn.Linear(2, 2)}

    def collate(self, rows: Rows) -> Collated:
        raise AssertionError("a term of weight 0 has no batch")

    def reads(self, batch: Any) -> Tensor | None:
        raise AssertionError("a term of weight 0 reads nothing")

    def loss(self, trace: Trace, batch: Any, read_LD: Tensor | None, totals: dict[str, Tensor]) -> TermLoss:
        raise AssertionError("a term of weight 0 is not computed")


class ReadOut(Small):
    """With a layer of the kind that the model is made of."""

    def __init__(self, model: GPT, tokenizer: Tokenizer, method: MethodConfig) -> None:
        super().__init__(model, tokenizer, method)
        self.modules = {"readout": Linear(32, 1)}

    def loss(self, trace: Trace, batch: Any, read_LD: Tensor | None, totals: dict[str, Tensor]) -> TermLoss:
        value = self.modules["readout"](trace.thoughts.latents.flatten(0, 1)).square().sum() / totals["problems"]
        return TermLoss(value=value)


@dataclass
class FirstTokens:
    """What each row's last thought is to say."""

    label_B: Tensor
    ids_L: Tensor


class Says(Term):
    """Labels: a module of its own must find the first token of the question in the last thought and in an embedding
    that it reads. And a number on top."""

    def __init__(self, model: GPT, tokenizer: Tokenizer, method: MethodConfig) -> None:
        super().__init__(model, tokenizer, method)
        self.guess = nn.Linear(32, 32)
        self.modules = {"guess": self.guess}
        self.began: list[tuple[Stage, Stage]] = []

    def collate(self, rows: Rows) -> Collated:
        first = torch.tensor([example.question[0] for example in rows.examples])
        packing = Packing.of([2] * len(first))
        return Collated(FirstTokens(first, first + 1), {"first_tokens": torch.tensor(float(len(first)))}, [packing])

    def reads(self, batch: FirstTokens) -> Tensor:
        return batch.ids_L

    def loss(self, trace: Trace, batch: Any, read_LD: Tensor | None, totals: dict[str, Tensor]) -> TermLoss:
        assert isinstance(batch, FirstTokens)
        assert read_LD is not None
        hidden_MD = self.guess(trace.thoughts.latents[:, -1]) + read_LD
        scale_M = torch.ones(len(hidden_MD)) / totals["first_tokens"]
        labelled = Labelled(hidden_MD, self.model.output_table, batch.label_B, scale_M)
        value = 0.1 * self.guess.weight.square().sum() * len(hidden_MD) / totals["first_tokens"]

        def metrics(nll_M: Tensor, correct_M: Tensor) -> dict[str, Tensor]:
            assert correct_M.dtype == torch.bool
            return {"first_nll": (nll_M * scale_M).sum()}

        return TermLoss(labelled, value, metrics)

    def begin_stage(self, before: Stage, stage: Stage) -> None:
        self.began.append((before, stage))


@pytest.fixture
def terms(monkeypatch: pytest.MonkeyPatch) -> None:
    """These in the table of parts."""
    for key, cls in {"small": Small, "heavy": Heavy, "nothing": Nothing, "linear": ReadOut, "says": Says}.items():
        monkeypatch.setitem(PARTS["term"], key, cls)


def naive_thoughts(method: Method, problem: Problem) -> Tensor:
    """The three thoughts (K, D) about a problem, one after the other, without cache or batch."""
    vectors = list(method.model.embedding(torch.tensor(method.encode(problem).question)))
    for _ in range(3):
        vectors.append(method.model.transformer(torch.stack(vectors).unsqueeze(0))[0, -1])
    return torch.stack(vectors[-3:])


@pytest.mark.parametrize(("key", "name", "weight"), [("small", "small", 1.0), ("heavy", "heavy", 3.0)])
def test_a_term_of_a_number(
    make_method: MakeMethod, problems: list[Problem], terms: None, key: str, name: str, weight: float
) -> None:
    """It is added to the loss by its weight, with its gradient, and logged without it, by its name."""
    plain_shares, plain = run_step(make_method(simcot(steps="none")), problems)
    method = make_method(simcot(steps="none", terms=[key]))
    shares, gradients = run_step(method, problems)
    assert shares.keys() == {"loss", "answer_loss", f"{name}_loss", "rows_share"}
    value = torch.stack([naive_thoughts(method, problem) for problem in problems]).square().mean()
    torch.testing.assert_close(shares[f"{name}_loss"], value.detach(), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(shares["loss"], plain_shares["loss"] + weight * value.detach(), atol=1e-5, rtol=1e-5)
    assert shares["answer_loss"] == plain_shares["answer_loss"]
    assert shares["rows_share"] == 1
    method.zero_grad()
    (weight * value).backward()
    for parameter_name, parameter in method.named_parameters():
        if parameter.grad is None:  # an output head of its own
            assert torch.equal(gradients[parameter_name], plain[parameter_name])
            continue
        added = gradients[parameter_name] - plain[parameter_name]
        scale = max(parameter.grad.abs().max().item(), 0.1 * plain[parameter_name].abs().max().item())
        torch.testing.assert_close(added, parameter.grad, atol=1e-4 * scale, rtol=1e-4)


def test_a_term_with_labels_and_a_module(make_method: MakeMethod, problems: list[Problem], terms: None) -> None:
    """Its labels go through the common cross-entropy, what it reads is looked up with the rest, and its module is
    trained and kept."""
    method = make_method(simcot(steps="none", terms=["says"], loss=LossConfig(answer_weight=0.7)))
    guess = method.get_submodule("guess")
    assert isinstance(guess, nn.Linear)
    shares, gradients = run_step(method, problems)
    assert shares.keys() == {"loss", "answer_loss", "says_loss", "first_nll"}
    first = torch.tensor([method.encode(problem).question[0] for problem in problems])
    vectors = [naive_thoughts(method, problem)[-1] for problem in problems]
    logits_BV = method.model.logits(guess(torch.stack(vectors)) + method.model.embedding(first + 1))
    nll = nn.functional.cross_entropy(logits_BV, first)
    value = nll + 0.1 * guess.weight.square().sum()
    torch.testing.assert_close(shares["first_nll"], nll.detach(), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(shares["says_loss"], value.detach(), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(shares["loss"], 0.7 * shares["answer_loss"] + value.detach(), atol=1e-5, rtol=1e-5)
    for name, gradient in zip(
        ("guess.weight", "guess.bias"), torch.autograd.grad(value, list(guess.parameters())), strict=True
    ):
        torch.testing.assert_close(gradients[name], gradient, atol=1e-5, rtol=1e-4)
    assert method.further_parts().keys() == {"guess"}
    assert method.further_parts()["guess"].keys() == {"weight", "bias"}
    assert method.parts_idle_without_thoughts
    plain = collate(make_method(simcot(steps="none")), problems).totals["positions"]
    assert collate(method, problems).totals["positions"] == plain + 2 * len(problems), "its packing is counted"


def test_terms_beside_one_another(make_method: MakeMethod, problems: list[Problem], terms: None) -> None:
    """A step that is cut into micro-batches is the same step, whatever terms there are; each is told of the stages."""
    method = make_method(simcot(terms=["says", "heavy"]))
    assert list(method.terms) == ["step", "says", "heavy"]
    whole, gradients = run_step(method, problems)
    assert whole.keys() == {
        "loss", "answer_loss", "step_loss", "step_accuracy", "says_loss", "first_nll", "heavy_loss", "rows_share"
    }  # fmt: skip
    expected = whole["answer_loss"] + 2 * whole["step_loss"] + whole["says_loss"] + 3 * whole["heavy_loss"]
    torch.testing.assert_close(whole["loss"], expected, atol=1e-5, rtol=1e-5)
    batches = [collate(method, piece) for piece in (problems[:1], problems[1:])]
    totals = add_up([batch.totals for batch in batches])
    method.zero_grad()
    shares: list[dict[str, Tensor]] = []
    for batch in batches:
        shares.append(method(batch, totals))
        shares[-1]["loss"].backward()
    for key, value in add_up(shares).items():
        torch.testing.assert_close(value.detach(), whole[key], atol=1e-5, rtol=1e-5)
    for name, parameter in method.named_parameters():
        assert parameter.grad is not None
        scale = gradients[name].abs().max().item()
        torch.testing.assert_close(parameter.grad, gradients[name], atol=1e-4 * scale, rtol=1e-4)
    before, after = Stage(), Stage(3, first_written=None)
    method.begin_stage(before, after)
    says = method.terms["says"]
    assert isinstance(says, Says)
    assert says.began == [(before, after)]


def test_a_term_of_weight_0_is_not_computed(make_method: MakeMethod, problems: list[Problem], terms: None) -> None:
    """It is asked for nothing, its module is not trained, and the numbers are those of a method without it."""
    method = make_method(simcot(steps="none", terms=["nothing"]))
    assert method.terms == {}
    assert not any(name.startswith("idle") for name, _ in method.named_modules())
    shares, gradients = run_step(method, problems)
    plain_shares, plain = run_step(make_method(simcot(steps="none")), problems)
    assert shares == plain_shares
    assert gradients.keys() == plain.keys()
    assert all(torch.equal(gradients[name], plain[name]) for name in plain)


class Step(Small):
    name = "step"


class Answer(Small):
    name = "answer"


class SaysAgain(Says):
    name = "again"


class HasModel(Small):
    def __init__(self, model: GPT, tokenizer: Tokenizer, method: MethodConfig) -> None:
        super().__init__(model, tokenizer, method)
        self.modules = {"model": nn.Linear(2, 2)}


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (["small", "small"], "terms: there are two of the name small"),
        (["step"], "terms: there are two of the name step"),
        (["answer"], "terms: there are two of the name answer"),
        (["says", "again"], "terms: again has a module of the name guess, which there is already"),
        (["has model"], "terms: small has a module of the name model, which there is already"),
    ],
)
def test_two_of_one_name_are_refused(
    make_method: MakeMethod, terms: None, monkeypatch: pytest.MonkeyPatch, keys: list[str], message: str
) -> None:
    """One would overwrite the other's loss in the log, or its weights."""
    for key, cls in {"step": Step, "answer": Answer, "again": SaysAgain, "has model": HasModel}.items():
        monkeypatch.setitem(PARTS["term"], key, cls)
    with pytest.raises(UserError) as caught:
        make_method(simcot(terms=keys))
    assert str(caught.value) == message


def test_a_term_needs_thoughts(make_method: MakeMethod, terms: None) -> None:
    with pytest.raises(UserError, match=r"^terms=\[small\]: needs thoughts, which loop=none has not; take a loop, or"):
        make_method(MethodConfig(terms=["small"]))


def test_a_term_is_not_asked_about_what_is_written(
    make_method: MakeMethod, problems: list[Problem], terms: None
) -> None:
    method = make_method(simcot(terms=["says"]))
    batch = method.collate([method.encode(problem) for problem in problems], Stage())
    assert method(batch, batch.totals).keys() == {"loss", "answer_loss", "step_accuracy"}
