"""compile=true and activation_checkpointing=true: the same numbers; few compilations; less memory."""

from __future__ import annotations

import shutil
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo import utils as dynamo
from torch.overrides import TorchFunctionMode

from simcot_latent.loops.base import go_on
from simcot_latent.loops.sequential import Sequential, SequentialConfig
from simcot_latent.model.gpt import FEW, GPT, Block, set_block_options
from simcot_latent.model.linear import gathered_gradients
from simcot_latent.model.packing import Packing

LENGTHS = [[40, 50, 21], [33, 60, 60], [70, 41], [64, 1, 7, 30, 25], [30, 31, 32, 33]]


def losses_and_gradients(model: GPT) -> list[torch.Tensor]:
    """Of a written pass and of a thought loop for several batches, each of another size and length."""
    found: list[torch.Tensor] = []
    generator = torch.Generator().manual_seed(0)
    loop = Sequential(model.config.n_embd, SequentialConfig())
    for lengths in LENGTHS:
        B = len(lengths)
        questions, texts = Packing.of([n - 1 for n in lengths], [1] * B), Packing.of([1] * B, lengths)
        ids_P = torch.randint(61, (sum(lengths),), generator=generator)
        model.zero_grad()
        written = model(ids_P, questions, read_out=B).sin().sum()
        with gathered_gradients(model):
            thoughts = loop.think(model, model.embedding(ids_P), questions, [3] * B, room=max(lengths))
            thought = go_on(model, thoughts, model.embedding(ids_P), texts).sin().sum()
        (written + thought).backward()
        found += [written.detach(), thought.detach()]
        found += [p.grad.clone() for p in model.parameters() if p.grad is not None]
    return found


def blocks_of(model: GPT) -> list[Block]:
    return [module for module in model.modules() if isinstance(module, Block)]


def bytes_kept(model: GPT, gathered: bool) -> tuple[int, list[torch.Tensor]]:
    """What autograd keeps of a written pass for the way back, beside weights, and the gradients."""
    kept = dict[int, int]()
    weights = {p.data_ptr() for p in model.parameters()}

    def keep(x: torch.Tensor) -> torch.Tensor:
        if x.untyped_storage().data_ptr() not in weights:
            kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    model.zero_grad()
    ids_BT = torch.arange(4 * 25).reshape(4, 25) % 61
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        if gathered:
            with gathered_gradients(model):
                loss = model(ids_BT).sin().sum()
        else:
            loss = model(ids_BT).sin().sum()
    loss.backward()
    return sum(kept.values()), [p.grad for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize("family", ["gpt2", "llama", "nanochat"])
def test_checkpointing_changes_no_number(make_model: Callable[..., GPT], family: str) -> None:
    model = make_model(family, context_length=256)
    kept = losses_and_gradients(model)
    for block in blocks_of(model):
        block.checkpointing = True
    for ours, expected in zip(losses_and_gradients(model), kept, strict=True):
        assert torch.equal(ours, expected)


@pytest.mark.parametrize("gathered", [False, True], ids=["ordinary", "gathered"])
def test_checkpointing_keeps_less(make_model: Callable[..., GPT], gathered: bool) -> None:
    model = make_model("llama", context_length=256)
    before, expected = bytes_kept(model, gathered)
    for block in blocks_of(model):
        block.checkpointing = True
    after, gradients = bytes_kept(model, gathered)
    assert after < 0.7 * before
    assert all(map(torch.equal, gradients, expected))


@pytest.mark.skipif(not any(map(shutil.which, ("g++", "clang++", "c++"))), reason="no C++ compiler to compile with")
@pytest.mark.parametrize("family", ["gpt2", "llama", "nanochat"])
def test_two_graphs_whatever_the_lengths(make_model: Callable[..., GPT], family: str) -> None:
    model = make_model(family, context_length=256)
    eager = losses_and_gradients(model)
    torch._dynamo.reset()
    dynamo.counters.clear()
    for block in blocks_of(model):
        block.compile_parts()
    compiled = losses_and_gradients(model)
    assert all(sum(lengths) > FEW for lengths in LENGTHS), "else nothing would be compiled"
    assert dynamo.counters["stats"]["unique_graphs"] == 2, "one before attention, one after, for all blocks and lengths"
    for ours, expected in zip(compiled, eager, strict=True):
        torch.testing.assert_close(ours, expected, atol=1e-4 * expected.abs().max().item(), rtol=1e-4)


@pytest.mark.parametrize("family", ["gpt2", "llama", "nanochat"])
def test_fused_attention_gives_the_same_numbers(make_model: Callable[..., GPT], family: str) -> None:
    """Of passes after the first, forward and back."""
    model = make_model(family, context_length=256)
    expected = losses_and_gradients(model)
    set_block_options(model, later_attention="sdpa")
    with CountedCalls(F.scaled_dot_product_attention) as calls:
        found = losses_and_gradients(model)
    passes = len(LENGTHS) * (1 + 1 + 3)  # a written pass, a question's, two more thoughts and what follows
    assert calls.count == passes * model.config.n_layer
    for ours, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, wanted, atol=1e-4 * wanted.abs().max().item(), rtol=1e-4)


@pytest.mark.skipif(not any(map(shutil.which, ("g++", "clang++", "c++"))), reason="no C++ compiler to compile with")
def test_compiled_thoughts_give_the_same_numbers(make_model: Callable[..., GPT]) -> None:
    model = make_model("llama", context_length=256)
    eager = losses_and_gradients(model)
    torch._dynamo.reset()
    dynamo.counters.clear()
    set_block_options(model, compile_thoughts=True)
    compiled = losses_and_gradients(model)
    sizes = {len(lengths) for lengths in LENGTHS} | {sum(n) for n in LENGTHS if sum(n) <= FEW}
    assert dynamo.counters["stats"]["unique_graphs"] == 2 * len(sizes), "one before and one after, for every size"
    for ours, wanted in zip(compiled, eager, strict=True):
        torch.testing.assert_close(ours, wanted, atol=1e-4 * wanted.abs().max().item(), rtol=1e-4)


class CountedCalls(TorchFunctionMode):
    """Counts the calls of a function of torch."""

    def __init__(self, function: Callable[..., object]) -> None:
        super().__init__()
        self.function, self.count = function, 0

    def __torch_function__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def, override]
        self.count += func is self.function
        return func(*args, **(kwargs or {}))
