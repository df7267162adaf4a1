"""The updates against closed forms in float64 and against PyTorch's optimizers; which optimizer has which parameter;
clipping by what it does to gradients."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from simcot_latent.config import LatentConfig, MethodConfig, RunConfig
from simcot_latent.data.tokenizer import Tokenizer
from simcot_latent.method import Method
from simcot_latent.model.gpt import GPT
from simcot_latent.training.optimizer import Muon, make_optimizers, orthogonalise, update

# --- Muon ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(3, 16, 16), (2, 8, 40), (2, 40, 8)], ids=["square", "wide", "tall"])
def test_orthogonalise_keeps_directions_and_levels_singular_values(shape: tuple[int, int, int]) -> None:
    """Against the singular value decomposition: x = U S V becomes U S' V with all of S' near 1."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    u, _, vh = torch.linalg.svd(x, full_matrices=False)
    values = u.mT @ orthogonalise(x) @ vh.mT
    levelled = values.diagonal(dim1=1, dim2=2)
    assert levelled.max() < 1.3
    assert levelled.min() > 0.3
    assert (values - torch.diag_embed(levelled)).abs().max() < 1e-4


def test_a_zero_matrix_stays_zero() -> None:
    assert orthogonalise(torch.zeros(1, 4, 6)).abs().max() == 0


def test_matrices_are_updated_as_if_alone() -> None:
    """Batching matrices of one shape changes nothing, to float tolerance; a matrix without a gradient stays."""
    generator = torch.Generator().manual_seed(1)
    start = [torch.randn(6, 4, generator=generator) for _ in range(3)]
    gradients = [[torch.randn(6, 4, generator=generator) for _ in range(2)] for _ in range(3)]

    def trained(groups: list[list[int]]) -> list[Tensor]:
        parameters = [nn.Parameter(x.clone()) for x in start]
        idle = nn.Parameter(torch.ones(6, 4))
        for group in groups:
            optimizer = Muon([*(parameters[i] for i in group), idle], lr=0.1, weight_decay=0.1)
            for step in range(3):
                for i in group:
                    parameters[i].grad = gradients[step][i % 2].clone()
                optimizer.step()
        assert torch.equal(idle, torch.ones(6, 4))
        return [p.detach() for p in parameters]

    for together, alone in zip(trained([[0, 1, 2]]), trained([[0], [1], [2]]), strict=True):
        torch.testing.assert_close(together, alone)


def levelled_by_svd(x: Tensor) -> Tensor:
    """Newton-Schulz in float64 by way of the singular values: each goes five times through 3.4445 s - 4.775 s^3 +
    2.0315 s^5, after division by the Frobenius norm (https://kellerjordan.github.io/posts/muon/)."""
    u, s, vh = torch.linalg.svd(x / x.norm(), full_matrices=False)
    for _ in range(5):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    return u @ torch.diag(s) @ vh


def muon_by_the_formula(
    weight: Tensor, gradients: Sequence[Tensor], lr: float, momentum: float, weight_decay: float
) -> Tensor:
    """Steps of Muon in float64, written out: w <- (1 - lr wd) w - lr sqrt(max(1, rows / columns)) level(nesterov)."""
    w, average = weight.double(), torch.zeros_like(weight, dtype=torch.float64)
    for gradient in gradients:
        g = gradient.double()
        average = momentum * average + (1 - momentum) * g
        ahead = momentum * average + (1 - momentum) * g
        w = (1 - lr * weight_decay) * w - lr * math.sqrt(max(1.0, w.shape[0] / w.shape[1])) * levelled_by_svd(ahead)
    return w


SHAPES = [(6, 6), (4, 10), (12, 3)]


def weight_and_gradients(shape: tuple[int, int], steps: int) -> tuple[Tensor, list[Tensor]]:
    """Gradients of very different sizes and directions, so that it matters how they are averaged."""
    generator = torch.Generator().manual_seed(shape[0])
    weight = torch.randn(shape, generator=generator)
    return weight, [10.0 ** (i % 3 - 1) * torch.randn(shape, generator=generator) for i in range(steps)]


def after_muon(optimizer_class: Callable[..., torch.optim.Optimizer], weight: Tensor, gradients: Sequence[Tensor],
               **options: Any) -> Tensor:  # fmt: skip
    parameter = nn.Parameter(weight.clone())
    optimizer = optimizer_class([parameter], **options)
    for gradient in gradients:
        parameter.grad = gradient.clone()
        optimizer.step()
    return parameter.detach()


@pytest.mark.parametrize("steps", [1, 2, 5])
@pytest.mark.parametrize("shape", SHAPES, ids=["square", "wide", "tall"])
@pytest.mark.parametrize(
    "options",
    [
        {"lr": 0.1, "momentum": 0.95, "weight_decay": 0.0},
        {"lr": 0.1, "momentum": 0.95, "weight_decay": 0.5},
        {"lr": 0.02, "momentum": 0.5, "weight_decay": 0.1},
    ],
    ids=["no decay", "decay", "less momentum"],
)
def test_muon_in_closed_form(shape: tuple[int, int], steps: int, options: dict[str, float]) -> None:
    """Weights after one and several steps, to float32 rounding: momentum, Nesterov's step ahead, decay, scale."""
    weight, gradients = weight_and_gradients(shape, steps)
    ours = after_muon(Muon, weight, gradients, **options)
    expected = muon_by_the_formula(weight, gradients, **options)
    torch.testing.assert_close(ours.double(), expected, atol=2e-5, rtol=2e-5)


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="this torch has no Muon; the closed form holds anyway")
@pytest.mark.parametrize("shape", SHAPES, ids=["square", "wide", "tall"])
def test_muon_is_pytorchs(shape: tuple[int, int]) -> None:
    """PyTorch's levels in bfloat16, which keeps 8 bits: our five updates are within 2% of its (about 1%), those
    without momentum, without Nesterov's step ahead, decay or scale more than 4% off."""
    weight, gradients = weight_and_gradients(shape, 5)
    options = {"lr": 0.1, "momentum": 0.95, "weight_decay": 0.1}
    theirs = after_muon(torch.optim.Muon, weight, gradients, **options)
    ours = after_muon(Muon, weight, gradients, **options)

    def error(other: Tensor) -> float:
        return ((other - theirs).norm() / (theirs - weight).norm()).item()

    assert error(ours) < 0.02
    for wrong in ({"momentum": 0.0}, {"nesterov": False}, {"weight_decay": 0.0}, {"adjust_lr_fn": "match_rms_adamw"}):
        assert error(after_muon(torch.optim.Muon, weight, gradients, **(options | wrong))) > 0.04, wrong


def test_muons_defaults() -> None:
    """As published: lr 0.02, momentum 0.95, no decay (https://kellerjordan.github.io/posts/muon/)."""
    weight, gradients = weight_and_gradients((4, 10), 3)
    options = {"lr": 0.02, "momentum": 0.95, "weight_decay": 0.0}
    torch.testing.assert_close(after_muon(Muon, weight, gradients), after_muon(Muon, weight, gradients, **options))
    found = Muon([nn.Parameter(weight)]).param_groups[0]
    assert {key: found[key] for key in options} == options


def test_muon_runs_its_closure() -> None:
    parameter = nn.Parameter(torch.ones(2, 2))

    def closure() -> float:
        parameter.square().sum().backward()
        return 7.0

    assert Muon([parameter], lr=0.1).step(closure) == 7.0
    assert not torch.equal(parameter.detach(), torch.ones(2, 2)), "the closure's gradient is the one that counts"


# --- which optimizer has which parameter -----------------------------------------------------------------------------

# By name, written out: the matrices of hidden layers, in the base's blocks, the loop's projector and the decoder's
# blocks.
IN_BLOCK = ("attention.qkv", "attention.out", "mlp.up", "mlp.down")
MATRICES = {
    *(f"model.transformer.blocks.{i}.{part}.weight" for i in range(2) for part in IN_BLOCK),
    *(f"step_decoder.transformer.blocks.0.{part}.weight" for part in IN_BLOCK),
}
PROJECTOR = {"loop.projector.up.weight", "loop.projector.down.weight"}
# Tables with a row per token or position: AdamW's whatever `optimizer` is, and they decay.
POSITIONS = "transformer.positions.weight"
TABLES = {
    "gpt2": {"model.embedding.weight", f"model.{POSITIONS}", f"step_decoder.{POSITIONS}"},
    "llama": {"model.embedding.weight", "model.head.weight"},
    "nanochat": {"model.embedding.weight"},
}


@pytest.fixture(params=TABLES)
def family(request: pytest.FixtureRequest) -> str:
    return request.param


MakeMethod = Callable[..., Method]


@pytest.fixture
def make_method(
    family: str, make_model: Callable[..., GPT], make_run: Callable[..., RunConfig], tokenizer: Tokenizer
) -> MakeMethod:
    """`make_method(loop="sequential", **run)`: all that can be trained, of one family: a base, a loop, a decoder."""

    def make(loop: str = "sequential", **run: object) -> Method:
        model = make_model(family, vocab_size=tokenizer.n_vocab)
        config = MethodConfig.simcot(LatentConfig(projector_width=24), loop=loop)
        return Method(model, tokenizer, make_run(rationale="equations", **run), config)

    return make


def names_of(method: Method, parameters: Sequence[Tensor]) -> set[str]:
    names = {id(parameter): name for name, parameter in method.named_parameters()}
    found = [names[id(parameter)] for parameter in parameters]
    assert len(set(found)) == len(found), "a parameter is there twice"
    return set(found)


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_which_optimizer_has_which_parameter(make_method: MakeMethod, family: str, optimizer: str) -> None:
    """Every parameter is in one group of one optimizer: matrices of hidden layers are Muon's; tables decay, scales and
    biases do not."""
    method = make_method(optimizer=optimizer, weight_decay=0.3, learning_rate=0.01, matrix_lr=0.04,
                               betas=[0.8, 0.9])  # fmt: skip
    matrices, tables = MATRICES | PROJECTOR, TABLES[family]
    everything = {name for name, _ in method.named_parameters()}
    vectors = everything - matrices - tables
    assert matrices | tables <= everything
    assert all(name.endswith(("norm.weight", ".bias")) for name in vectors)
    assert vectors, "the projector has biases and a norm in every family"

    made = make_optimizers(method, method.run)
    wanted: list[tuple[str, set[str], dict[str, Any]]]
    if optimizer == "muon":
        assert [type(each) for each in made] == [torch.optim.AdamW, Muon]
        decaying, hidden = tables, [matrices]
    else:
        assert [type(each) for each in made] == [torch.optim.AdamW]
        decaying, hidden = tables | matrices, []
    groups = [group for each in made for group in each.param_groups]
    adamw: dict[str, Any] = {"lr": 0.01, "peak_lr": 0.01, "betas": (0.8, 0.9), "eps": 1e-8, "amsgrad": False}
    muon: dict[str, Any] = {"lr": 0.04, "peak_lr": 0.04, "momentum": 0.95, "weight_decay": 0.3}
    wanted = [
        ("tables", decaying, adamw | {"weight_decay": 0.3}),
        ("vectors", vectors, adamw | {"weight_decay": 0.0}),
        *(("matrices", names, muon) for names in hidden),
    ]
    assert len(groups) == len(wanted)
    for group, (what, names, options) in zip(groups, wanted, strict=True):
        assert names_of(method, group["params"]) == names, what
        assert {key: group[key] for key in options} == options, what


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_a_pause_vector_is_adamws_and_does_not_decay(make_method: MakeMethod, optimizer: str) -> None:
    method = make_method(loop="pause", optimizer=optimizer, weight_decay=0.3)
    made = make_optimizers(method, method.run)
    (found,) = [
        (type(each), group["weight_decay"])
        for each in made
        for group in each.param_groups
        if "loop.pause_D" in names_of(method, group["params"])
    ]
    assert found == (torch.optim.AdamW, 0.0)


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_updates_are_pytorchs_adamw_and_the_closed_form_of_muon(
    make_method: MakeMethod, family: str, optimizer: str
) -> None:
    """Four steps of `update` on random gradients: every parameter ends where a plain AdamW of a hand-made group, or
    Muon's formula, leaves it."""
    method = make_method(optimizer=optimizer, weight_decay=0.3, learning_rate=0.01, matrix_lr=0.04,
                               betas=[0.8, 0.9])  # fmt: skip
    matrices = MATRICES | PROJECTOR if optimizer == "muon" else set()
    decays = TABLES[family] | MATRICES | PROJECTOR
    parameters = dict(method.named_parameters())
    start = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    generator = torch.Generator().manual_seed(3)
    gradients = [
        {name: 10.0 ** (i % 2) * torch.randn(p.shape, generator=generator) for name, p in parameters.items()}
        for i in range(4)
    ]
    optimizers = make_optimizers(method, method.run)
    for step in gradients:
        for name, parameter in parameters.items():
            parameter.grad = step[name].clone()
        update(method.parameters(), optimizers, math.inf)
        assert all(parameter.grad is None for parameter in parameters.values()), "gradients are dropped"

    for name, parameter in parameters.items():
        its_gradients = [step[name] for step in gradients]
        if name in matrices:
            expected = muon_by_the_formula(start[name], its_gradients, lr=0.04, momentum=0.95, weight_decay=0.3)
        else:
            twin = nn.Parameter(start[name].double())
            plain = torch.optim.AdamW([twin], lr=0.01, betas=(0.8, 0.9), weight_decay=0.3 if name in decays else 0.0)
            for gradient in its_gradients:
                twin.grad = gradient.double()
                plain.step()
            expected = twin.detach()
        moved = (expected - start[name].double()).abs().max().item()
        assert moved > 1e-3
        torch.testing.assert_close(
            parameter.detach().double(), expected, atol=1e-4, rtol=1e-4, msg=lambda text, name=name: f"{name}: {text}"
        )


# --- clipping --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("max_norm", [0.5, 5.0, 13.0, 20.0, math.inf])
def test_clipping_shortens_the_step_and_turns_it_nowhere(max_norm: float) -> None:
    """Of two parameters with gradients (3, 4) and (0, 12), whose common norm is 13: by gradient descent with rate 1,
    what each moves by is its gradient, shortened to the norm where it is longer."""
    start = [torch.tensor([1.0, 2.0]), torch.tensor([[3.0], [4.0]])]
    gradients = [torch.tensor([3.0, 4.0]), torch.tensor([[0.0], [12.0]])]
    parameters = [nn.Parameter(x.clone()) for x in start]
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient.clone()
    optimizers = [torch.optim.SGD([parameter], lr=1.0) for parameter in parameters]
    norm = update(parameters, optimizers, max_norm)
    assert norm.item() == pytest.approx(13.0), "the norm before clipping is what is reported"
    shortened = min(1.0, max_norm / 13.0)
    for parameter, before, gradient in zip(parameters, start, gradients, strict=True):
        torch.testing.assert_close(parameter.detach(), before - shortened * gradient, atol=1e-5, rtol=1e-5)
        assert parameter.grad is None
