"""LoRA computes what its formula says, learns by the gradients of that, and leaves what is frozen alone.

Shapes: P tokens, I numbers in, O numbers out, R rank, V rows of a table, N of them trained, D width, M labels.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from simcot_latent.errors import UserError
from simcot_latent.model.cache import KVCache
from simcot_latent.model.gpt import FEW, GPT, Block, GPTConfig, set_block_options
from simcot_latent.model.linear import Embedding, Head, LastRows, Linear, gathered_gradients, keep_weights_in
from simcot_latent.model.lora import (
    TARGETS,
    LoRA,
    LoRALinear,
    add_lora,
    added_weights,
    dropped_out,
    layers_of,
    merge,
    plain_weights,
)
from simcot_latent.model.losses import Labelled, cross_entropy
from simcot_latent.model.packing import Packing
from simcot_latent.terms.step_decoder import StepDecoder
from simcot_latent.training.optimizer import make_optimizers, update

FAMILIES = ["gpt2", "llama", "nanochat"]
RANK, ALPHA = 3, 5.0
LENGTHS, MORE = [5, 30, 38], [2, 1, 3]
"""More tokens than `FEW`, then some that are read through a cache."""

compiler = pytest.mark.skipif(not any(map(shutil.which, ("g++", "clang++", "c++"))), reason="no C++ compiler")
WAYS: dict[str, dict[str, Any]] = {
    "plain": {},
    "checkpointed": {"checkpointing": True},
    "compiled": {"compile": True, "compile_thoughts": True},
    "both": {"compile": True, "checkpointing": True},
}
ways = pytest.mark.parametrize(
    "way", [pytest.param(way, marks=compiler if "compile" in WAYS[way] else ()) for way in WAYS]
)
CASES = [
    pytest.param(
        family,
        split,
        way,
        gathers,
        marks=compiler if "compile" in WAYS[way] else (),
        id=f"{family}-{way}-{split}-{gathers}",
    )
    for family in FAMILIES
    for split in (False, True)
    for way in WAYS
    for gathers in (False, True)
    if "compile" not in WAYS[way] or (gathers and split == (family == "llama"))  # which takes its time
]
families = pytest.mark.parametrize("family", FAMILIES)
splits = pytest.mark.parametrize("split", [False, True], ids=["fused", "split"])
gatherings = pytest.mark.parametrize("gathers", [False, True], ids=["ordinary", "gathered"])


@pytest.fixture(autouse=True)
def nothing_compiled_before() -> None:
    """Programs of all models count against one limit, those of earlier tests among them."""
    torch._dynamo.reset()


@pytest.fixture
def make(make_model: Callable[..., GPT]) -> Callable[..., GPT]:
    """`make(family, dropout=0.0, trained=True, **lora)`: a model with LoRA, whose B is not zero any more if trained."""

    def make(family: str = "gpt2", dropout: float = 0.0, trained: bool = True, **lora: Any) -> GPT:
        model = make_model(family)
        with torch.random.fork_rng():
            torch.manual_seed(1)
            add_lora(model, LoRA(RANK, ALPHA, **lora), dropout)
            for name, factor in model.named_parameters():
                if trained and "lora_B" in name:
                    factor.data = torch.randn_like(factor)
        return model.train()

    return make


def random_ids(count: int, seed: int = 0) -> Tensor:
    return torch.randint(61, (count,), generator=torch.Generator().manual_seed(seed))


def read(model: GPT, gathers: bool = False) -> Tensor:
    """Hidden states of a first pass and one through its cache."""
    assert sum(LENGTHS) > FEW > sum(MORE)
    cache = KVCache(max(LENGTHS) + max(MORE))
    with gathered_gradients(model) if gathers else nullcontext():
        first_MD = model(random_ids(sum(LENGTHS)), Packing.of(LENGTHS), cache)
        return torch.cat((first_MD, model(random_ids(sum(MORE), seed=1), Packing.of(MORE), cache)))


def block_of(model: GPT | StepDecoder) -> Block:
    """The first block."""
    block = model.transformer.blocks[0]
    assert isinstance(block, Block)
    return block


def changed(layer: nn.Module) -> LoRALinear:
    """A layer that is known to have factors."""
    assert isinstance(layer, LoRALinear)
    return layer


def pairs_of(layer: LoRALinear) -> list[tuple[Linear, slice]]:
    """Each B of a layer, and the rows of `lora_A.weight` that are its A."""
    factors = [part for part in layer.lora_B if isinstance(part, Linear)]
    assert len(factors) == len(layer.lora_B)
    return [(b, slice(i * RANK, (i + 1) * RANK)) for i, b in enumerate(factors)]


def grad_of(parameter: Tensor) -> Tensor:
    assert parameter.grad is not None
    return parameter.grad


def rows_of(table: LastRows | None) -> nn.Parameter:
    """The trained rows of a table that has some."""
    assert table is not None
    assert table.rows is not None
    return table.rows


def near(ours: Tensor, theirs: Tensor, tolerance: float) -> None:
    scale = theirs.abs().max().item()
    assert scale > 0, "the comparison would be empty"
    torch.testing.assert_close(ours, theirs, atol=tolerance * scale, rtol=0)


def merged_copy(model: GPT) -> GPT:
    """A plain model of the same function, by the formula: W + alpha / R * B A, part by part of a fused layer."""
    plain = GPT(model.config)
    state = {name: x.clone() for name, x in model.state_dict().items() if ".lora_" not in name and "rows" not in name}
    for name, layer in layers_of(model):
        changes = [b.weight @ layer.lora_A.weight[rows] for b, rows in pairs_of(layer)]
        state[f"{name}.weight"] += ALPHA / RANK * torch.cat(changes).detach()
    plain.load_state_dict(state)
    return plain.train()


# What it computes


@families
@splits
def test_it_starts_as_the_model_was(
    make: Callable[..., GPT], make_model: Callable[..., GPT], family: str, split: bool
) -> None:
    model = make(family, trained=False, split=split)
    assert torch.equal(read(model), read(make_model(family)))
    assert all(factor.abs().min() >= 0 and factor.abs().max() > 0
               for name, factor in model.named_parameters() if "lora_A" in name)  # fmt: skip


@pytest.mark.parametrize(("family", "split", "way", "gathers"), CASES)
def test_gradients_are_those_of_the_formula(
    make: Callable[..., GPT], family: str, split: bool, way: str, gathers: bool
) -> None:
    """dL/dB = alpha / R * dL/dW A^T and dL/dA = alpha / R * B^T dL/dW, for W the merged weight."""
    model = make(family, split=split)
    plain = merged_copy(model)
    set_block_options(model, **WAYS[way])
    ours, theirs = read(model, gathers), read(plain)
    near(ours, theirs, 1e-5)
    ours.sin().sum().backward()
    theirs.sin().sum().backward()
    layers = dict(layers_of(model))
    assert len(layers) == 4 * model.config.n_layer
    for name, layer in layers.items():
        pairs, a = pairs_of(layer), layer.lora_A.weight
        grads = grad_of(plain.get_parameter(f"{name}.weight")).split([b.out_features for b, _ in pairs])
        for grad_OI, (b, rows) in zip(grads, pairs, strict=True):
            near(grad_of(b.weight), ALPHA / RANK * grad_OI @ a[rows].T, 1e-4)
            near(grad_of(a)[rows], ALPHA / RANK * b.weight.T @ grad_OI, 1e-4)


def test_parts_of_a_fused_layer(make: Callable[..., GPT]) -> None:
    """Split: queries, keys, values, gate and up have factors of their own, the others one pair; fused: all have one."""
    config = make("llama").config
    E, D = config.head_width, config.n_embd
    parts = {"qkv": [config.n_head * E, config.kv_heads * E, config.kv_heads * E], "up": [48, 48]}
    for split in (True, False):
        for name, layer in layers_of(make("llama", split=split)):
            whole = [layer.out_features]
            expected = parts.get(name.rpartition(".")[2], whole) if split else whole
            assert [b.out_features for b, _ in pairs_of(layer)] == expected, name
            assert layer.lora_A.weight.shape == (RANK * len(expected), layer.in_features)
            assert layer.lora_A.weight.abs().max() <= layer.in_features**-0.5
    assert [layer.lora_A.in_features for _, layer in layers_of(make("llama", targets=["down"]))] == [48, 48]
    assert D == 32


@pytest.mark.parametrize("targets", [["qkv"], ["out", "down"]])
def test_targets(make: Callable[..., GPT], targets: list[str]) -> None:
    model = make(targets=targets)
    names = [f"transformer.blocks.{i}.{TARGETS[name]}.{name}" for i in range(2) for name in targets]
    assert sorted(name for name, _ in layers_of(model)) == sorted(names)
    learned = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert (
        learned
        == set(added_weights(model))
        == {f"{name}.lora_{part}" for name in names for part in ("A.weight", "B.0.weight")}
    )


@families
@splits
def test_merged_is_unmerged(make: Callable[..., GPT], family: str, split: bool) -> None:
    """In float64, where it is exact: float32 rounds both by up to 5e-6 of these hidden states, each its own way."""
    model = make(family, split=split, rows=2).double().eval()
    with torch.no_grad():
        expected, state = read(model), plain_weights(model)
        left_out = plain_weights(model, merged=False)
    copy = GPT(model.config).double().eval()
    copy.load_state_dict(state)
    with torch.no_grad():
        near(read(copy), expected, 1e-12)
    copy.load_state_dict(left_out)
    with torch.no_grad():
        assert (read(copy) - expected).abs().max() > 0.1
    merge(model)
    assert not list(layers_of(model))
    assert model.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert all(parameter.requires_grad for parameter in model.parameters())
    with torch.no_grad():
        near(read(model), expected, 1e-12)


def test_a_model_that_has_lora_gets_another_on_top(make: Callable[..., GPT]) -> None:
    model = make(rows=2).double()
    before = read(model)
    add_lora(model, LoRA(1, 1.0))
    near(read(model.double()), before, 1e-12)
    assert {layer.lora_A.out_features for _, layer in layers_of(model)} == {1}
    assert all(type(layer.lora_A) is Linear for _, layer in layers_of(model))


def test_weights_kept_in_another_format(make: Callable[..., GPT]) -> None:
    """As passes that CUDA graphs replay multiply by them."""
    model = make().eval()
    with torch.no_grad():
        expected = read(model)
        keep_weights_in(model, torch.bfloat16)
        layer = block_of(model).mlp.up
        assert layer(torch.randn(3, 32)).dtype == torch.bfloat16
        keep_weights_in(model, None)
        assert torch.equal(read(model), expected)


# What is frozen


class Products(TorchDispatchMode):
    """The shapes of all matrices that are made; of sparse ones, of what they hold."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[tuple[int, ...]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor) and out.dim() == 2 and not func.is_view:
            self.shapes.append(tuple(out._values().shape if out.is_sparse else out.shape))
        return out


@gatherings
@pytest.mark.parametrize("rows", [0, 2])
def test_frozen_weights_have_no_gradient_nor_anything_of_its_size(
    make: Callable[..., GPT], make_model: Callable[..., GPT], gathers: bool, rows: int
) -> None:
    """No matrix of a frozen weight's shape is made on the way back, that of the tied table included."""

    def step(model: GPT) -> list[tuple[int, ...]]:
        with gathered_gradients(model) if gathers else nullcontext():
            hidden_MD = read(model)
            label_M = random_ids(len(hidden_MD), seed=2)
            loss = cross_entropy(Labelled(hidden_MD, model.output_table, label_M, torch.ones(len(label_M)))).loss
        with Products() as made:
            loss.backward()
        return made.shapes

    shapes = {(96, 32), (32, 32), (128, 32), (32, 128), (61, 32)}
    assert shapes < set(step(make_model("gpt2").train())), "of the trained model's weights all are made"
    model = make(rows=rows)
    made = step(model)
    assert not shapes & set(made)
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == (".lora_" in name or name.endswith("rows")), name


def kept(model: GPT, gathers: bool) -> list[tuple[int, ...]]:
    """The shapes of what is kept for the way back."""
    shapes: list[tuple[int, ...]] = []

    def note(x: Tensor) -> Tensor:
        shapes.append(tuple(x.shape))
        return x

    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        read(model, gathers)
    return shapes


@gatherings
def test_inputs_of_frozen_layers_are_not_kept(make: Callable[..., GPT], gathers: bool) -> None:
    """Where nothing is beside a layer, its input is kept on nobody's account."""
    P = sum(LENGTHS)
    every, few = kept(make(), gathers), kept(make(targets=["qkv"]), gathers)
    # Of each of two blocks: what `out`, `up` and `down` multiply (the last as what it is the activation of, which the
    # activation keeps anyhow), and that times A.
    assert every.count((P, RANK)) - few.count((P, RANK)) == 2 * 3
    assert every.count((P, 32)) - few.count((P, 32)) == 2 * 2
    frozen = make(targets=["down"])
    for layer in frozen.modules():
        if isinstance(layer, Linear) and not isinstance(layer, LoRALinear):
            layer.requires_grad_(False)
    x_PI = torch.randn(P, 32, requires_grad=True)
    layer = block_of(frozen).attention.out
    saved: list[Tensor] = []
    with (
        gathered_gradients(layer),
        torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x),
    ):
        y_PO = layer(x_PI)
    assert not saved
    near(
        torch.autograd.grad(y_PO.sin().sum(), x_PI)[0],
        torch.autograd.grad(F.linear(x_PI, layer.weight, layer.bias).sin().sum(), x_PI)[0],
        1e-6,
    )


def test_optimizers_have_what_is_trained_and_nothing_else(
    make: Callable[..., GPT], make_run: Callable[..., Any]
) -> None:
    for optimizer in ("adamw", "muon"):
        model = make(rows=2)
        optimizers = make_optimizers(model, make_run(optimizer=optimizer))
        of = {id(p): type(each).__name__ for each in optimizers for group in each.param_groups for p in group["params"]}
        for name, parameter in model.named_parameters():
            # As embeddings, trained rows are not for Muon.
            right = "Muon" if ".lora_" in name and optimizer == "muon" else "AdamW"
            assert of.get(id(parameter)) == (right if parameter.requires_grad else None), name
        before = {name: x.clone() for name, x in model.state_dict().items()}
        read(model).sin().sum().backward()
        update(model.parameters(), optimizers, 1.0)
        after = model.state_dict()
        changed = {name for name in before if not torch.equal(before[name], after[name])}
        assert changed == {name for name in before if ".lora_" in name or name.endswith("rows")}


# Dropout


def test_dropout_is_of_the_factors_input_alone(make: Callable[..., GPT]) -> None:
    """y = W x + alpha / R * B A (mask x / kept): with the masks that the same seed gives."""
    layer = changed(block_of(make(dropout=0.3, split=False)).mlp.up)
    x_PI = torch.randn(50, 32)
    torch.manual_seed(3)
    found = layer(x_PI)
    torch.manual_seed(3)
    dropped_PI, share = dropped_out(x_PI, 0.3)
    assert 0.2 < dropped_PI.float().mean() < 0.4
    masked_PI = torch.where(dropped_PI, 0, x_PI / share)
    expected = F.linear(x_PI, layer.weight, layer.bias)
    expected = expected + ALPHA / RANK * masked_PI @ layer.lora_A.weight.T @ pairs_of(layer)[0][0].weight.T
    near(found, expected, 1e-5)
    layer.eval()
    near(layer(x_PI), F.linear(x_PI, layer.merged(), layer.bias), 1e-5)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_masks_are_of_their_share(share: float) -> None:
    """Four numbers share 64 random bits: all four places, and neighbours, are as if drawn by themselves."""
    torch.manual_seed(0)
    dropped_PI, kept = dropped_out(torch.zeros(501, 1001), share)
    assert kept == pytest.approx(1 - share, abs=1e-5)
    assert dropped_PI.shape == (501, 1001)
    flat = dropped_PI.flatten().float()
    spread = (share * (1 - share)) ** 0.5
    for place in range(4):
        part = flat[place::4]
        assert part.mean().item() == pytest.approx(share, abs=5 * spread / len(part) ** 0.5)
    centred = flat - share
    for lag in (1, 2, 3, 4):
        correlation = (centred[lag:] * centred[:-lag]).mean().item() / spread**2
        assert abs(correlation) < 5 / len(flat) ** 0.5, lag


@ways
def test_dropout_is_the_seeds(make: Callable[..., GPT], way: str) -> None:
    """One seed gives one set of masks in all passes, computed again or not; another seed another; `eval` none."""

    def gradients(seed: int, **options: Any) -> list[Tensor]:
        model = make(dropout=0.4)
        set_block_options(model, **options)
        torch.manual_seed(seed)
        loss = read(model, gathers=True).sin().sum()
        return list(torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad]))

    options = WAYS[way]
    without = {key: value for key, value in options.items() if key != "checkpointing"}
    ours = gradients(0, **options)
    for found, expected, other in zip(ours, gradients(0, **without), gradients(1, **options), strict=True):
        assert torch.equal(found, expected)
        assert (found - other).norm() > 0.1 * other.norm()
    model = make(dropout=0.4).eval()
    set_block_options(model, **options)
    near(read(model), read(make().eval()), 1e-5)


# Rows of a table


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("softcap", [None, 15.0])
@gatherings
def test_rows_have_the_gradient_that_they_have_in_a_trained_table(
    make_model: Callable[..., GPT], tied: bool, softcap: float | None, gathers: bool
) -> None:
    """Of lookups, output head and a product with the table (loop=soft) together; whatever chunks a loss has."""
    N, shape = 3, {"tie_head": tied, "logit_softcap": softcap}
    model, whole = make_model("gpt2", **shape), make_model("gpt2", **shape)
    add_lora(model, LoRA(RANK, ALPHA, rows=N))
    ids = torch.cat((random_ids(30), torch.tensor([58, 60, 59, 60, 3, 58]))).repeat(3)

    def loss(model: GPT) -> Tensor:
        with gathered_gradients(model) if gathers else nullcontext():
            hidden_MD = model(ids, Packing.of([len(ids)]))
            mixed_MD = model.logits(hidden_MD[:5]).softmax(-1) @ model.embedding.table
            hidden_MD = torch.cat((hidden_MD, model.transformer(mixed_MD, Packing.of([5]))))
            label_M = random_ids(len(hidden_MD), seed=1)
            parts = (
                Labelled(hidden_MD[:20], model.output_table, label_M[:20], torch.ones(20)),
                Labelled(hidden_MD[20:], model.output_table, label_M[20:], torch.full((len(label_M) - 20,), 0.5)),
            )
            return cross_entropy(*parts, softcap=softcap).loss

    ours, theirs = loss(model), loss(whole)
    near(ours, theirs, 1e-6)
    ours.backward()
    theirs.backward()
    near(grad_of(rows_of(model.embedding)), grad_of(whole.embedding.weight)[-N:], 1e-5)
    if whole.head is not None:
        near(grad_of(rows_of(model.head)), grad_of(whole.head.weight)[-N:], 1e-5)
    assert model.embedding.weight.grad is None


def test_a_table_is_current(make: Callable[..., GPT]) -> None:
    """After a step whoever asks for the table, or looks up a row, gets the trained ones."""
    model = make("llama", rows=2).eval()
    assert isinstance(model.head, Head)
    with torch.no_grad():
        for table in (model.embedding, model.head):
            rows_of(table).copy_(torch.arange(64.0).view(2, 32) + (table is model.head))
    rows = torch.arange(64.0).view(2, 32)
    assert torch.equal(model.embedding(torch.tensor([59, 60])), rows)
    assert torch.equal(model.embedding.table[-2:], rows)
    assert torch.equal(model.output_table[-2:], rows + 1)
    with torch.no_grad():
        rows_of(model.embedding).zero_()
    assert torch.equal(plain_weights(model)["embedding.weight"][-2:], torch.zeros(2, 32))
    assert torch.equal(plain_weights(model, merged=False)["head.weight"][-2:], rows + 1)
    old = GPT(GPTConfig(**{**vars(model.config)}))
    assert old.state_dict().keys() == plain_weights(model).keys()


def test_a_frozen_table_without_trained_rows() -> None:
    embedding = Embedding(9, 4)
    embedding.train_last_rows(0)
    hidden_MD = torch.randn(5, 4, requires_grad=True)
    with gathered_gradients(embedding):
        assert not embedding(torch.arange(9)).requires_grad
        loss = cross_entropy(Labelled(hidden_MD, embedding.table, torch.arange(5), torch.ones(5))).loss
    loss.backward()
    assert hidden_MD.grad is not None
    assert embedding.weight.grad is None


# Who has the model's weights


def test_a_decoder_that_starts_as_the_base_has_it_merged(make: Callable[..., GPT]) -> None:
    model = make(rows=2)
    decoder = StepDecoder.from_base(model, 1, "base")
    assert not list(layers_of(decoder))
    block, plain = block_of(decoder), block_of(merged_copy(model))
    for name, weight in plain.state_dict().items():
        torch.testing.assert_close(block.state_dict()[name], weight)
    learned = [name for name, parameter in decoder.named_parameters() if not parameter.requires_grad]
    assert learned == ["embedding.weight"]
    up = changed(block_of(model).mlp.up)
    with torch.no_grad():
        pairs_of(up)[0][0].weight.add_(1)
    decoder.copy_base(model)
    assert torch.equal(block.mlp.up.weight, up.merged())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"rank": 0}, "lora.rank=0: must be at least 1"),
        ({"alpha": 0.0}, "lora.alpha=0.0: must be above 0, finite"),
        ({"targets": ["q"]}, "lora.targets=['q']: must be some of qkv, out, up, down, each once"),
        ({"targets": []}, "lora.targets=[]: must be some of"),
        ({"targets": ["up", "up"]}, "lora.targets=['up', 'up']: must be some of"),
        ({"rows": -1}, "lora.rows=-1: must be at least 0"),
    ],
)
def test_what_cannot_be(change: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError) as error:
        LoRA(**({"rank": 1, "alpha": 1.0} | change))
    assert str(error.value).startswith(words)


def hooked(modules: Sequence[nn.Module], seen: list[tuple[int, ...]]) -> None:
    for module in modules:
        module.register_forward_hook(lambda _, __, output: seen.append(tuple(output.shape)))


@gatherings
def test_hooks(make: Callable[..., GPT], gathers: bool) -> None:
    """A layer and its factors are called as any other; a hook on the layer sees the change too."""
    model, seen = make(), list[tuple[int, ...]]()
    layer = changed(block_of(model).attention.qkv)
    hooked([layer, layer.lora_A, layer.lora_B[0]], seen)
    read(model, gathers)
    P, Q = sum(LENGTHS), sum(MORE)
    assert seen == [(P, RANK), (P, 96), (P, 96), (Q, RANK), (Q, 96), (Q, 96)]
    with layer.register_forward_hook(lambda *args: torch.zeros_like(args[2])):
        found = read(model, gathers)
    plain = merged_copy(model)
    with torch.no_grad():
        for parameter in block_of(plain).attention.qkv.parameters():
            parameter.zero_()
    near(found, read(plain), 1e-5)
