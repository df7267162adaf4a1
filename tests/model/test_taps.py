"""Taps show what `transformers` shows of the same model, with the gradients that a plain computation has.

Shapes: see `simcot_latent.model.taps`; B rows, T positions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from simcot_latent.interop.conversion import build
from simcot_latent.model.cache import KVCache, StaticCache
from simcot_latent.model.gpt import GPT, Block, set_block_options
from simcot_latent.model.linear import gathered_gradients
from simcot_latent.model.packing import Packing
from simcot_latent.model.taps import Taps, transformers_layers

B, T, VOCAB = 3, 11, 89
KINDS = ("hidden_LND", "queries_LNHE", "keys_LNGE", "values_LNGE")


def random_ids(*shape: int, seed: int = 0, vocab: int = 61) -> Tensor:
    return torch.randint(vocab, shape, generator=torch.Generator().manual_seed(seed))


def everything(**options: Any) -> Taps:
    return Taps(hidden=True, queries=True, keys=True, values=True, **options)


# Against Hugging Face's


class Published:
    """What `build` takes."""

    def __init__(self, model: Any) -> None:
        self.config, self.path = model.config.to_dict(), Path("model")
        self.tensors = {key: value for key, value in model.state_dict().items() if not key.startswith("lm_head")}


def hugging_face(family: str, randomise: Callable[..., None]) -> tuple[Any, GPT]:
    if family == "gpt2":
        theirs: Any = GPT2LMHeadModel(GPT2Config(vocab_size=VOCAB, n_positions=24, n_embd=48, n_layer=3, n_head=4))
    else:
        theirs = LlamaForCausalLM(LlamaConfig(
            vocab_size=VOCAB, hidden_size=48, intermediate_size=80, num_hidden_layers=3, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=24, tie_word_embeddings=True,
        ))  # fmt: skip
    theirs.eval()
    randomise(theirs)
    theirs.tie_weights()
    return theirs, build(Published(theirs))  # type: ignore[arg-type]


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@torch.no_grad()
def test_equal_to_transformers(family: str, randomise: Callable[..., None]) -> None:
    """`output_hidden_states`, and the keys (rotated) and values of `past_key_values`."""
    theirs, ours = hugging_face(family, randomise)
    ids_BT = random_ids(B, T, vocab=VOCAB)
    expected = theirs(input_ids=ids_BT, output_hidden_states=True, use_cache=True)
    taps = Taps(transformers_layers(3))
    hidden_BTD = ours(ids_BT, taps=taps)
    states = torch.stack(expected.hidden_states)
    torch.testing.assert_close(taps.hidden_LND, states.flatten(1, 2), atol=2e-5, rtol=2e-5)
    assert torch.equal(taps.hidden_LND[-1].view_as(hidden_BTD), hidden_BTD)
    taps = Taps(hidden=False, keys=True, values=True)
    ours(ids_BT, taps=taps)
    for kind, theirs_name in (("keys_LNGE", "keys"), ("values_LNGE", "values")):
        their_LBGTE = torch.stack([getattr(layer, theirs_name) for layer in expected.past_key_values.layers])
        torch.testing.assert_close(getattr(taps, kind), their_LBGTE.transpose(2, 3).flatten(1, 2), atol=2e-5, rtol=2e-5)


# Against the formulas


def recomputed(model: GPT, x_TD: Tensor, rotated: bool = True) -> dict[str, Tensor]:
    """All hidden states, queries, keys and values of one row, from the parts of the model."""
    transformer, config = model.transformer, model.config
    n = len(x_TD)
    if transformer.positions is not None:
        x_TD = x_TD + transformer.positions.weight[:n]
    found: dict[str, list[Tensor]] = {kind: [] for kind in KINDS}
    angle_TE = torch.arange(n).unsqueeze(1) * config.rope_base ** (
        -torch.arange(0, config.head_width, 2) / config.head_width
    )

    def turn(x_THE: Tensor) -> Tensor:
        if config.positions == "learned" or not rotated:
            return x_THE
        left, right = x_THE.chunk(2, dim=-1)
        cos, sin = angle_TE.cos().unsqueeze(1), angle_TE.sin().unsqueeze(1)
        return torch.cat((left * cos - right * sin, right * cos + left * sin), dim=-1)

    for block in transformer.blocks:
        assert isinstance(block, Block)
        found["hidden_LND"].append(x_TD)
        qkv = block.attention.project(block.attention_norm(x_TD))
        q_THE, k_TGE, v_TGE = qkv.split((config.n_head, config.kv_heads, config.kv_heads), dim=1)
        for kind, x in zip(KINDS[1:], (turn(q_THE), turn(k_TGE), v_TGE), strict=True):
            found[kind].append(x)
        x_TD = block(x_TD, _sight(n, model))
    found["hidden_LND"] += [x_TD, transformer.norm(x_TD)]
    return {kind: torch.stack(states) for kind, states in found.items()}


def _sight(length: int, model: GPT) -> Any:
    from simcot_latent.model.gpt import Sight

    return Sight(Packing.grid(1, length), None, model.config)


LENGTHS = [[4, 1, 6], [2, 3, 0], [1, 1, 1]]
"""Rows in pieces."""


def read(model: GPT, **options: Any) -> tuple[list[Taps], list[Tensor]]:
    """Rows that are read in pieces, each with taps of its own; the ids of each row."""
    cache, taps = KVCache(sum(map(max, LENGTHS))), []
    for number, lengths in enumerate(LENGTHS):
        taps.append(everything(layers=range(model.config.n_layer), **options))
        model(random_ids(sum(lengths), seed=number), Packing.of(lengths), cache, taps=taps[-1])
    rows = [list(random_ids(sum(lengths), seed=i).split(lengths)) for i, lengths in enumerate(LENGTHS)]
    return taps, [torch.cat(row) for row in zip(*rows, strict=True)]


def weigh(states: Sequence[Tensor]) -> Tensor:
    """A scalar that depends on every number differently."""
    total = torch.zeros(())
    for seed, x in enumerate(states):
        total = total + (x * torch.randn(x.shape, generator=torch.Generator().manual_seed(seed))).sum()
    return total


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "checkpointed"])
@pytest.mark.parametrize("gathers", [False, True], ids=["ordinary", "gathered"])
@pytest.mark.parametrize("rotated", [True, False], ids=["rotated", "before rotation"])
def test_values_and_gradients(model: GPT, rotated: bool, gathers: bool, checkpointing: bool) -> None:
    """Of rows of different lengths, packed and read in pieces, those of each row alone, written out."""
    set_block_options(model, checkpointing=checkpointing)
    with gathered_gradients(model) if gathers else torch.enable_grad():
        taps, rows = read(model, rotated=rotated)
    set_block_options(model)
    expected = [recomputed(model, model.embedding(ids_T), rotated) for ids_T in rows]
    found_by_row: list[list[Tensor]] = [[] for _ in rows]
    for piece, lengths in zip(taps, LENGTHS, strict=True):
        for kind in KINDS:
            for row, x in enumerate(getattr(piece, kind).split(lengths, dim=1)):
                found_by_row[row].append(x)
    ours, theirs = [], []
    for row, states in enumerate(expected):
        for number, kind in enumerate(KINDS):
            our = torch.cat(found_by_row[row][number :: len(KINDS)], dim=1)
            their = states[kind][: model.config.n_layer]
            torch.testing.assert_close(our, their, atol=3e-5, rtol=3e-5)
            ours.append(our)
            theirs.append(their)
    last = f"transformer.blocks.{model.config.n_layer - 1}."
    unused = ("head", "transformer.norm", f"{last}mlp", f"{last}attention.out")
    wanted = [p for name, p in model.named_parameters() if not name.startswith(unused)]
    for our, their in zip(
        torch.autograd.grad(weigh(ours), wanted), torch.autograd.grad(weigh(theirs), wanted), strict=True
    ):
        torch.testing.assert_close(our, their, atol=1e-4 * their.abs().max().item(), rtol=1e-4)


def test_chosen_layers_at_chosen_tokens(model: GPT, assert_equal_gradients: Callable[..., None]) -> None:
    """In the order that they were asked for, a token twice; the loss may count them and what the pass returns."""
    lengths = [4, 1, 6]
    ids_P, packing = random_ids(sum(lengths)), Packing.of(lengths)
    all_of_it, some = everything(layers=[0, 1]), everything(layers=[1, 0], tokens=[7, 2, 2, 10])
    expected_PD = model(ids_P, packing, taps=all_of_it)
    found_PD = model(ids_P, packing, taps=some)
    assert torch.equal(found_PD, expected_PD)
    picked = [getattr(all_of_it, kind).flip(0)[:, [7, 2, 2, 10]] for kind in KINDS]
    found = [getattr(some, kind) for kind in KINDS]
    for ours, theirs in zip(found, picked, strict=True):
        assert torch.equal(ours, theirs)
    D, H, G, E = model.config.n_embd, model.config.n_head, model.config.kv_heads, model.config.head_width
    assert [x.shape for x in found] == [(2, 4, D), (2, 4, H, E), (2, 4, G, E), (2, 4, G, E)]
    assert_equal_gradients(weigh([*found, found_PD]), weigh([*picked, expected_PD]), model)


@pytest.mark.parametrize("cached", [False, True])
def test_the_last_layer_where_few_tokens_are_read_out(model: GPT, cached: bool) -> None:
    """`read_out` computes the last block's hidden states at the last tokens alone; its keys everywhere."""
    n, lengths = model.config.n_layer, [4, 1, 6]
    ids_P, packing = random_ids(sum(lengths)), Packing.of([3, 0, 5], [1, 1, 1])

    def run(taps: Taps, read_out: int | None) -> Tensor:
        cache = KVCache(14) if cached else None
        if cache is not None:
            model(random_ids(5, seed=1), Packing.of([2, 0, 3]), cache)
        return model(ids_P, packing, cache, read_out, taps=taps)

    tokens = [9, 8, 10]
    plain, found = everything(tokens=tokens), everything(tokens=tokens)
    run(plain, None)
    hidden_MD = run(found, 3)
    for kind in KINDS:
        torch.testing.assert_close(getattr(found, kind), getattr(plain, kind), atol=1e-5, rtol=1e-5)
    final = Taps([n + 1], tokens=tokens)
    assert torch.equal(run(final, 3), hidden_MD)
    assert torch.equal(final.hidden_LND[0], hidden_MD[[1, 0, 2]])
    keys = Taps(hidden=False, keys=True)
    run(keys, 3)
    assert keys.keys_LNGE.shape[:2] == (n, len(ids_P))
    below = Taps(range(n))
    run(below, 3)
    assert below.hidden_LND.shape[:2] == (n, len(ids_P))


def test_without_gradients(model: GPT) -> None:
    """`detach` cuts off what is found, and not the pass; without gradients there are none at all."""
    ids_BT = random_ids(B, T)
    with_graph, cut = everything(), everything(detach=True)
    model(ids_BT, taps=with_graph)
    hidden_BTD = model(ids_BT, taps=cut)
    assert hidden_BTD.requires_grad
    for kind in KINDS:
        assert getattr(with_graph, kind).requires_grad
        assert not getattr(cut, kind).requires_grad
        assert torch.equal(getattr(with_graph, kind), getattr(cut, kind))
    silent = everything()
    with torch.no_grad():
        model(ids_BT, taps=silent)
    assert not silent.keys_LNGE.requires_grad


@torch.no_grad()
def test_a_pass_with_taps_is_not_replayed(model: GPT) -> None:
    """A graph has none: passes over a static cache find what those over an ordinary one do."""
    one_each, found = Packing.grid(3, 1), []
    for cache in (KVCache(20), StaticCache(rows=4, capacity=20, context_length=128)):
        model(random_ids(6), Packing.grid(3, 2), cache)
        model(random_ids(3, seed=1), one_each, cache)
        taps = everything()
        hidden = model(random_ids(3, seed=2), one_each, cache, taps=taps)
        found.append([hidden, model(random_ids(3, seed=3), one_each, cache)] + [getattr(taps, k) for k in KINDS])
    for ordinary, static in zip(*found, strict=True):
        torch.testing.assert_close(static, ordinary, atol=1e-5, rtol=1e-5)


def test_bfloat16_attends_and_shows_what_it_attends_with(make_model: Callable[..., GPT]) -> None:
    """On a CPU attention is in float32 whatever the autocast; see `Sight.attend`."""
    model, exact, rounded = make_model("llama"), everything(), everything()
    model(random_ids(B, T), taps=exact)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model(random_ids(B, T), taps=rounded)
    assert rounded.keys_LNGE.dtype == torch.float32
    for kind in KINDS:
        ours, theirs = getattr(rounded, kind).float().flatten(), getattr(exact, kind).flatten()
        assert not torch.equal(ours, theirs)
        assert F.cosine_similarity(ours, theirs, dim=0) > 0.99


# Errors


@pytest.mark.parametrize(
    ("taps", "read_out", "says"),
    [
        (Taps([4]), None, "taps at hidden of layer 4: there are 0 to 3"),
        (Taps([-1]), None, "taps at hidden of layer -1: there are 0 to 3"),
        (Taps([2], keys=True), None, "taps at keys of layer 2: there are 0 to 1"),
        (Taps(tokens=[3, 6]), None, "taps at tokens 3 to 6: there are 0 to 5"),
        (Taps(tokens=[-1]), None, "taps at tokens -1 to -1: there are 0 to 5"),
        (Taps(tokens=[3, 5]), 2, "taps at tokens 3 to 5: there are 4 to 5"),
        (Taps(), 2, "taps at all tokens of the last layer, where only the last 2 are read out"),
    ],
)
def test_what_is_not_there(make_model: Callable[..., GPT], taps: Taps, read_out: int | None, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        make_model("gpt2")(random_ids(6), Packing.of([4, 2]), None, read_out, taps=taps)


def test_taps_are_for_one_pass(make_model: Callable[..., GPT]) -> None:
    model, taps = make_model("gpt2"), Taps()
    with pytest.raises(ValueError, match="no pass has filled"):
        _ = taps.hidden_LND
    model(random_ids(2, 3), taps=taps)
    with pytest.raises(ValueError, match="not asked for keys"):
        _ = taps.keys_LNGE
    with pytest.raises(ValueError, match="make new ones"):
        model(random_ids(2, 3), taps=taps)


def test_reading_out_needs_a_packing(make_model: Callable[..., GPT]) -> None:
    with pytest.raises(ValueError, match="read_out needs a packing"):
        make_model("gpt2")(random_ids(2, 3), read_out=1)
