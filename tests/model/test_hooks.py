"""What forward hooks see is what docs/hooks.md says, whichever way the model runs.

Shapes: see docs/hooks.md.
"""

from __future__ import annotations

import re
import runpy
import shutil
from collections import defaultdict
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from simcot_latent.loops.sequential import Projector
from simcot_latent.model.cache import KVCache, StaticCache
from simcot_latent.model.gpt import FEW, GPT, Block, set_block_options
from simcot_latent.model.linear import gathered_gradients
from simcot_latent.model.packing import Packing

DOCS = (Path(__file__).parents[2] / "docs" / "hooks.md").read_text(encoding="utf-8")
FAMILIES = ["gpt2", "llama", "nanochat"]
LENGTHS, MORE, READ_OUT = [5, 30, 38], [2, 1, 3], 2
"""More tokens than `FEW`, then some that are read through a cache."""

compiler = pytest.mark.skipif(not any(map(shutil.which, ("g++", "clang++", "c++"))), reason="no C++ compiler")
WAYS: dict[str, Callable[[GPT], object]] = {
    "plain": lambda model: None,
    "checkpointed": lambda model: set_block_options(model, checkpointing=True),
    "compiled": lambda model: set_block_options(model, compile=True, compile_thoughts=True),
}
ways = pytest.mark.parametrize("way", [pytest.param(way, marks=compiler if way == "compiled" else ()) for way in WAYS])
gatherings = pytest.mark.parametrize("gathers", [False, True], ids=["ordinary", "gathered"])


@pytest.fixture(autouse=True)
def nothing_compiled_before() -> None:
    """Programs of all models count against one limit, those of earlier tests among them."""
    torch._dynamo.reset()


def random_ids(count: int, seed: int = 0) -> Tensor:
    return torch.randint(61, (count,), generator=torch.Generator().manual_seed(seed))


def read(model: GPT, read_out: int | None = None, gathers: bool = False) -> Tensor:
    """Hidden states of a first pass and one through its cache."""
    assert sum(LENGTHS) > FEW > sum(MORE)
    cache = KVCache(max(LENGTHS) + max(MORE))
    with gathered_gradients(model) if gathers else nullcontext():
        first_MD = model(random_ids(sum(LENGTHS)), Packing.of(LENGTHS), cache, read_out)
        return torch.cat((first_MD, model(random_ids(sum(MORE), seed=1), Packing.of(MORE), cache, read_out)))


# The table


def table() -> list[list[str]]:
    """Name, what it receives, what it gives."""
    rows = re.findall(r"^\| `([\w.{}]+)` \| (\(.*?\)) \| (\(.*?\)) \|", DOCS, re.MULTILINE)
    assert len(rows) == 14, "each row is read"
    return [list(row) for row in rows]


def shape_of(written: str, **sizes: int) -> tuple[int, ...]:
    """`(P, (H + 2 * G) * E)` in numbers."""
    assert re.fullmatch(r"[PMDHGEFU()+*2, ]+", written), written
    found = eval(written, {}, sizes)
    return found if isinstance(found, tuple) else (found,)


@pytest.mark.parametrize("read_out", [None, READ_OUT], ids=["all", "read out"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_table_of_names(make_model: Callable[..., GPT], family: str, read_out: int | None) -> None:
    """Each module of a model is in it, and each name is a module that is called with that shape."""
    model = make_model(family, embedding_norm=family == "nanochat")
    config = model.config
    calls: dict[str, list[tuple[tuple[int, ...], tuple[int, ...]]]] = defaultdict(list)

    def keep(name: str) -> Callable[..., None]:
        return lambda _, inputs, output: calls[name].append((tuple(inputs[0].shape), tuple(output.shape)))

    for name, module in model.named_modules():
        module.register_forward_hook(keep(name))
    read(model, read_out)

    expected: dict[str, list[tuple[tuple[int, ...], tuple[int, ...]]]] = {}
    optional = {"transformer.positions": family == "gpt2", "transformer.embedding_norm": family == "nanochat"}
    for name, receives, gives in table():
        if not optional.get(name, True):
            continue
        for layer in range(config.n_layer) if "{i}" in name else [config.n_layer - 1]:
            expected[name.format(i=layer)] = []
            for tokens in (sum(LENGTHS), sum(MORE)):
                M = tokens if read_out is None or layer < config.n_layer - 1 else read_out
                sizes = {"P": tokens, "M": M, "D": config.n_embd, "H": config.n_head, "G": config.kv_heads}
                F = config.ffn_width or 4 * config.n_embd
                sizes |= {"E": config.head_width, "F": F, "U": F * (2 if config.activation == "swiglu" else 1)}
                expected[name.format(i=layer)].append((shape_of(receives, **sizes), shape_of(gives, **sizes)))
    calls.pop("")  # the model itself
    assert calls == expected
    never = {name for name, _ in model.named_modules()} - calls.keys()
    assert never <= {"", "head", "transformer.blocks"}


def test_the_examples_of_the_documentation(tmp_path: Path) -> None:
    """As printed, in a file: nnsight reads its body from there."""
    blocks = re.findall(r"```python\n(.*?)```", DOCS, re.DOTALL)
    assert len(blocks) == 3
    (tmp_path / "plain.py").write_text(blocks[0] + blocks[2])
    runpy.run_path(str(tmp_path / "plain.py"))


def test_the_example_with_nnsight(tmp_path: Path) -> None:
    pytest.importorskip("nnsight")
    blocks = re.findall(r"```python\n(.*?)```", DOCS, re.DOTALL)
    assert "from nnsight" in blocks[1]
    (tmp_path / "traced.py").write_text(blocks[0] + blocks[1])
    runpy.run_path(str(tmp_path / "traced.py"))


# What hooks see and do, whichever way the model runs


@ways
@gatherings
def test_what_goes_into_linear_layers_is_what_they_multiply(
    make_model: Callable[..., GPT], family: str, way: str, gathers: bool
) -> None:
    model = make_model(family)
    projector = Projector(model.config.n_embd, 24)
    WAYS[way](model)
    called: list[str] = []

    def check(name: str) -> Callable[..., None]:
        def hook(layer: Any, inputs: tuple[Tensor], output: Tensor) -> None:
            called.append(name)
            torch.testing.assert_close(F.linear(inputs[0], layer.weight, layer.bias), output)

        return hook

    both = nn.ModuleDict({"model": model, "projector": projector})
    layers = {name: part for name, part in both.named_modules() if isinstance(part, nn.Linear) and name != "model.head"}
    for name, layer in layers.items():
        layer.register_forward_hook(check(name))
    with gathered_gradients(model, projector) if gathers else nullcontext():
        thought = projector(read(model, gathers=False))
    thought.sin().sum().backward()
    passes = 2 * [name for name in layers if "projector" not in name] + [name for name in layers if "projector" in name]
    assert sorted(called) == sorted(passes), "each once per pass, and not again on the way back"


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@ways
@pytest.mark.parametrize("part", ["attention", "mlp", "attention.out", "mlp.down", "attention.qkv"])
def test_a_hook_that_puts_nothing_in_place_of_an_output(make_model: Callable[..., GPT], part: str, way: str) -> None:
    """Is a model whose weights there are zero; it comes after the model has run without."""
    model, without = make_model("gpt2"), make_model("gpt2")
    WAYS[way](model)
    read(model)
    with model.transformer.blocks[1].get_submodule(part).register_forward_hook(lambda *args: torch.zeros_like(args[2])):
        found = read(model)
        gradients = torch.autograd.grad(found.sin().sum(), model.embedding.weight)
    name = {"attention": "attention.out", "mlp": "mlp.down"}.get(part, part)
    with torch.no_grad():
        for parameter in without.transformer.blocks[1].get_submodule(name).parameters():
            parameter.zero_()
    expected = read(without)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    theirs = torch.autograd.grad(expected.sin().sum(), without.embedding.weight)
    torch.testing.assert_close(gradients, theirs, atol=1e-4, rtol=1e-4)


@gatherings
@pytest.mark.parametrize("how", ["anew", "in place", "in place, unseen by autograd"])
def test_a_hook_that_changes_an_input(
    make_model: Callable[..., GPT], family: str, how: str, gathers: bool, assert_equal_gradients: Callable[..., None]
) -> None:
    """Neuron 3 of a feed-forward part is held at a value: all gradients are those of that."""
    model, plain = make_model(family), make_model(family)
    plain.load_state_dict(model.state_dict())

    def hold(_: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor]:
        (x_PF,) = inputs
        with torch.no_grad() if "unseen" in how else nullcontext():
            x_PF = x_PF.clone() if how == "anew" else x_PF
            x_PF[:, 3] = 0.7
        return (x_PF,)

    def hold_whole(_: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor]:
        x_PF = inputs[0]
        kept = torch.arange(x_PF.shape[1]) != 3
        return (torch.where(kept, x_PF, x_PF.detach() * 0 + 0.7),)

    model.transformer.blocks[0].get_submodule("mlp.down").register_forward_pre_hook(hold)
    found = read(model, gathers=gathers).sin().sum()
    model.transformer.blocks[0].get_submodule("mlp.down")._forward_pre_hooks.clear()
    model.transformer.blocks[0].get_submodule("mlp.down").register_forward_pre_hook(hold_whole)
    expected = read(model).sin().sum()
    torch.testing.assert_close(found, expected)
    if "unseen" in how and not gathers:
        return  # autograd goes on through what it did not see being changed, as it does in any module
    if "unseen" in how:
        weight = model.transformer.blocks[0].get_parameter("mlp.down.weight")
        torch.testing.assert_close(torch.autograd.grad(found, weight), torch.autograd.grad(expected, weight))
        return
    assert_equal_gradients(found, expected, model)


class LoRA(nn.Module):
    """base(x) + B A x (https://arxiv.org/abs/2106.09685), in place of a layer."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(base.in_features)
        self.base = base.requires_grad_(False)
        self.A = nn.Parameter(torch.randn(2, base.in_features, generator=generator) * base.in_features**-0.5)
        self.B = nn.Parameter(torch.randn(base.out_features, 2, generator=generator))

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + x @ self.A.T @ self.B.T


@ways
@gatherings
def test_lora_is_the_merged_weight(make_model: Callable[..., GPT], family: str, way: str, gathers: bool) -> None:
    """Values, and gradients of A and B, of all four layers of all blocks."""
    model, merged = make_model(family), make_model(family)
    adapters: dict[str, LoRA] = {}
    for block_name, block in model.named_modules():
        if not isinstance(block, Block):
            continue
        for parent, child in (
            (block.attention, "qkv"),
            (block.attention, "out"),
            (block.mlp, "up"),
            (block.mlp, "down"),
        ):
            adapter = LoRA(getattr(parent, child))
            setattr(parent, child, adapter)
            adapters[f"{block_name}.{'mlp' if parent is block.mlp else 'attention'}.{child}.weight"] = adapter
    assert len(adapters) == 4 * model.config.n_layer
    with torch.no_grad():
        for name, adapter in adapters.items():
            merged.get_parameter(name).add_(adapter.B @ adapter.A)
    WAYS[way](model)
    found, expected = read(model, gathers=gathers), read(merged)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    found.sin().sum().backward()
    expected.sin().sum().backward()
    for name, adapter in adapters.items():
        grad = merged.get_parameter(name).grad
        assert grad is not None
        for ours, theirs in ((adapter.A.grad, adapter.B.T @ grad), (adapter.B.grad, grad @ adapter.A.T)):
            torch.testing.assert_close(ours, theirs, atol=1e-3 * theirs.abs().max().item(), rtol=1e-3)


# Passes that a graph replays


@torch.no_grad()
def test_a_hooked_model_is_not_replayed(model: GPT) -> None:
    """A hook that is there when a batch begins is called at every pass, for a graph would run no Python."""
    static, calls = StaticCache(rows=4, capacity=20, context_length=128), list[int]()

    def batch(cache: KVCache) -> Tensor:
        found = [model(random_ids(6), Packing.grid(3, 2), cache)]
        found += [model(random_ids(3, seed), Packing.grid(3, 1), cache) for seed in range(3)]
        return torch.cat(found)

    def ablate(_: nn.Module, __: Any, output: Tensor) -> Tensor:
        calls.append(len(output))
        return 0 * output

    plain = batch(static)
    torch.testing.assert_close(plain, batch(KVCache(20)), atol=1e-5, rtol=1e-5)
    with model.transformer.blocks[0].get_submodule("attention").register_forward_hook(ablate):
        expected = batch(KVCache(20))
        calls.clear()
        static.begin()
        assert not static.replays or static.is_empty
        torch.testing.assert_close(batch(static), expected, atol=1e-5, rtol=1e-5)
        assert calls == [6, 3, 3, 3], "three rows, not the four of a graph"
    static.begin()
    torch.testing.assert_close(batch(static), plain, atol=1e-5, rtol=1e-5)
