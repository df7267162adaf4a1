"""With every method LoRA has the gradients that follow from those of the merged model, and frozen weights have none.

Shapes: I numbers in, O numbers out.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir
from torch import Tensor

from simcot_latent.config import config_dir, parse
from simcot_latent.data.batch import Seeds
from simcot_latent.data.problem import Problem
from simcot_latent.data.tokenizer import Tokenizer
from simcot_latent.method import Method
from simcot_latent.model.gpt import GPT, set_block_options
from simcot_latent.model.linear import Linear
from simcot_latent.model.lora import LoRALinear, layers_of, plain_weights

RANK, ALPHA = 3, 5.0
LORA = (f"lora.rank={RANK}", f"lora.alpha={ALPHA}")

# What makes each of them small.
METHODS: dict[str, tuple[str, ...]] = {
    "cot": (),
    "weighted": (),
    "icot": (),
    "coconut": ("latent.n_latents=4",),
    "codi": ("latent.projector_width=16", "latent.n_latents=3"),
    "simcot_coconut": ("latent.n_latents=4", "decoder.n_layer=1"),
    "simcot_codi": ("latent.projector_width=16", "latent.n_latents=3", "decoder.init=base"),
    "pccot": ("latent.n_latents=4",),
    "kava": ("latent.n_latents=4",),
    "lotus": ("latent.n_latents=6", "latent.latents_per_step=2"),
    "colar": ("latent.n_latents=16",),
    "soft": ("latent.n_latents=3",),
    "pause": ("latent.n_latents=3",),
    "pause_multipass": ("latent.n_latents=3",),
}


def make(name: str, model: GPT, tokenizer: Tokenizer, *more: str) -> Method:
    with initialize_config_dir(str(config_dir().resolve()), version_base=None):
        raw = compose("train", [f"method={name}", *METHODS[name], *more])
    raw = {key: value for key, value in raw.items() if key != "use"}
    run, config = parse(raw)  # type: ignore[arg-type]
    torch.manual_seed(0)
    return Method(model, tokenizer, run, config).train()


def loss(method: Method, problems: list[Problem]) -> Tensor:
    """That of the last stage, whatever it draws drawn alike."""
    examples = [method.encode(problem) for problem in problems]
    batch = method.collate(examples, method.last_stage, Seeds.of(0, 0, range(len(examples))))
    return method(batch, batch.totals)["loss"]


def near(ours: Tensor | None, theirs: Tensor | None, name: str) -> None:
    assert ours is not None, name
    assert theirs is not None, name
    scale = theirs.abs().max().item()
    assert scale > 0, f"{name}: the comparison would be empty"
    torch.testing.assert_close(ours, theirs, atol=1e-4 * scale, rtol=0, msg=lambda text: f"{name}: {text}")


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "checkpointed"])
@pytest.mark.parametrize("name", METHODS)
def test_gradients_are_those_of_the_merged_model(
    name: str, checkpointing: bool, make_model: Callable[..., GPT], tokenizer: Tokenizer, problems: list[Problem]
) -> None:
    """dL/dB = alpha / R * dL/dW A^T and dL/dA = alpha / R * B^T dL/dW; all else that learns learns as it did."""
    shape: dict[str, Any] = {"vocab_size": tokenizer.n_vocab, "context_length": 256}
    method = make(name, make_model("gpt2", **shape), tokenizer, *LORA)
    for key, factor in method.model.named_parameters():
        if "lora_B" in key:
            factor.data = 0.1 * torch.randn_like(factor)
    whole = make(name, make_model("gpt2", **shape), tokenizer)
    whole.model.load_state_dict(plain_weights(method.model))
    for key, part in method.named_children():
        if key != "model":
            state = {name: x for name, x in part.state_dict().items() if not name.endswith("rows")}
            whole.get_submodule(key).load_state_dict(state)
    set_block_options(method, checkpointing=checkpointing)
    ours, theirs = loss(method, problems), loss(whole, problems)
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-5)
    ours.backward()
    theirs.backward()
    layers = dict(layers_of(method.model))
    assert len(layers) == 8
    for key, layer in layers.items():
        check_factors(layer, whole.model.get_parameter(f"{key}.weight").grad, key)
    for key, parameter in method.named_parameters():
        if not parameter.requires_grad:
            assert parameter.grad is None, key
        elif key.endswith("embedding.rows"):
            near(parameter.grad, grad(whole.model.embedding.weight)[-len(parameter) :], key)
        elif ".lora_" not in key and (expected := whole.get_parameter(key).grad) is not None:
            near(parameter.grad, expected, key)


def grad(parameter: Tensor) -> Tensor:
    assert parameter.grad is not None
    return parameter.grad


def check_factors(layer: LoRALinear, grad_OI: Tensor | None, name: str) -> None:
    (b,) = layer.lora_B
    assert isinstance(b, Linear)
    assert grad_OI is not None, name
    near(b.weight.grad, ALPHA / RANK * grad_OI @ layer.lora_A.weight.T, name)
    near(layer.lora_A.weight.grad, ALPHA / RANK * b.weight.T @ grad_OI, name)


def test_each_step_and_rank_draws_its_own(make_model: Callable[..., GPT], tokenizer: Tokenizer) -> None:
    """Masks of a step are the same whatever was drawn before it; without dropout nobody's generator is touched."""

    def drawn(method: Method, step: int, rank: int) -> float:
        torch.rand(3)
        method.begin_step(step, rank)
        return torch.rand(()).item()

    method = make("cot", make_model(vocab_size=tokenizer.n_vocab), tokenizer, *LORA, "lora.dropout=0.1")
    found = {(step, rank): drawn(method, step, rank) for step in range(3) for rank in range(3)}
    assert len(set(found.values())) == 9
    assert all(drawn(method, *key) == value for key, value in found.items())
    without = make("cot", make_model(vocab_size=tokenizer.n_vocab), tokenizer, *LORA)
    before = torch.get_rng_state()
    without.begin_step(0, 0)
    assert torch.equal(torch.get_rng_state(), before)


def test_all_presets_are_there() -> None:
    presets = {file.stem for file in (config_dir() / "method").glob("*.yaml")}
    assert presets - {"no_cot"} == METHODS.keys()
