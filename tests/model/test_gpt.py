"""The transformer against Hugging Face's, with the same random weights, and against formulas written out by hand."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from omegaconf import OmegaConf
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from simcot_latent.config import config_dir
from simcot_latent.errors import UserError
from simcot_latent.model.cache import KVCache
from simcot_latent.model.gpt import GPT, MLP, Block, GPTConfig, make_norm
from simcot_latent.model.linear import gathered_gradients

BATCH, LENGTH = 3, 17


def random_ids(vocab_size: int, seed: int = 0) -> Tensor:
    return torch.randint(vocab_size, (BATCH, LENGTH), generator=torch.Generator().manual_seed(seed))


def randomise(module: torch.nn.Module) -> None:
    """Random numbers everywhere, so that no bias is 0 and no scale 1 by default."""
    generator = torch.Generator().manual_seed(0)
    for name, parameter in module.named_parameters():
        is_scale = parameter.dim() == 1 and name.endswith("weight")
        parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator) + float(is_scale)


def from_hf_llama(weights: dict[str, Tensor], n_layer: int) -> dict[str, Tensor]:
    """Llama's separate matrices, put one below the other."""
    renamed = {
        "embedding.weight": weights["model.embed_tokens.weight"],
        "transformer.norm.weight": weights["model.norm.weight"],
        "head.weight": weights["lm_head.weight"],
    }
    parts = {
        "attention_norm": ["input_layernorm"],
        "mlp_norm": ["post_attention_layernorm"],
        "attention.qkv": ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
        "attention.out": ["self_attn.o_proj"],
        "mlp.up": ["mlp.gate_proj", "mlp.up_proj"],
        "mlp.down": ["mlp.down_proj"],
    }
    for layer in range(n_layer):
        for ours, theirs in parts.items():
            renamed[f"transformer.blocks.{layer}.{ours}.weight"] = torch.cat(
                [weights[f"model.layers.{layer}.{name}.weight"] for name in theirs]
            )
    return renamed


def test_equals_hugging_face_gpt2(from_hf_gpt2: Callable[..., dict[str, Tensor]]) -> None:
    """Learned positions, LayerNorm with biases, tanh-GELU, tied head: the same logits and the same hidden states."""
    theirs = GPT2LMHeadModel(GPT2Config(vocab_size=89, n_positions=24, n_embd=48, n_layer=3, n_head=4)).eval()
    randomise(theirs)
    ours = GPT(GPTConfig(vocab_size=89, context_length=24, n_embd=48, n_layer=3, n_head=4, positions="learned",
                         activation="gelu_tanh", bias=True))  # fmt: skip
    ours.load_state_dict(from_hf_gpt2(theirs.state_dict()))
    ids_BT = random_ids(89)
    with torch.no_grad():
        expected = theirs(input_ids=ids_BT, output_hidden_states=True)
        hidden_BTD = ours(ids_BT)
        torch.testing.assert_close(hidden_BTD, expected.hidden_states[-1], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(ours.logits(hidden_BTD), expected.logits, atol=3e-5, rtol=3e-5)


def test_equals_hugging_face_llama() -> None:
    """Rotary positions, RMSNorm, SwiGLU, four query heads on two key/value heads, a head of its own."""
    theirs = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=89,
            hidden_size=48,
            intermediate_size=80,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=24,
            rms_norm_eps=1e-5,
            tie_word_embeddings=False,
        )
    ).eval()
    randomise(theirs)
    ours = GPT(GPTConfig(vocab_size=89, context_length=24, n_embd=48, n_layer=3, n_head=4, n_kv_head=2, ffn_width=80,
                         norm="rmsnorm", activation="swiglu", tie_head=False))  # fmt: skip
    ours.load_state_dict(from_hf_llama(theirs.state_dict(), n_layer=3))
    ids_BT = random_ids(89)
    with torch.no_grad():
        expected = theirs(input_ids=ids_BT, output_hidden_states=True)
        hidden_BTD = ours(ids_BT)
        torch.testing.assert_close(hidden_BTD, expected.hidden_states[-1], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(ours.logits(hidden_BTD), expected.logits, atol=3e-5, rtol=3e-5)


# What Hugging Face's two do not have: formulas written out


def rms(x: Tensor, eps: float) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt()


def naive_nanochat(model: GPT, ids: list[int]) -> Tensor:
    """Logits of one row in float64, a position and a head at a time: rotary as complex numbers, RMS norms without
    scale, normalised queries and keys, one key/value head for all, squared ReLU, soft-capped logits."""
    config = model.config
    weights = {name: value.double() for name, value in model.state_dict().items()}
    E, H = config.head_width, config.n_head
    frequencies = torch.tensor([config.rope_base ** (-2 * i / E) for i in range(E // 2)], dtype=torch.float64)

    def turn(vector_E: Tensor, position: int) -> Tensor:
        pairs = torch.complex(vector_E[: E // 2], vector_E[E // 2 :]) * torch.exp(1j * position * frequencies)
        return torch.cat((pairs.real, pairs.imag))

    x_TD = weights["embedding.weight"][torch.tensor(ids)]
    for layer in range(config.n_layer):
        block = f"transformer.blocks.{layer}."
        qkv_TF = rms(x_TD, config.norm_eps) @ weights[block + "attention.qkv.weight"].T
        keys = [rms(turn(row[H * E : (H + 1) * E], t), 1e-7) for t, row in enumerate(qkv_TF)]
        rows = []
        for t, row in enumerate(qkv_TF):
            heads = []
            for head in range(H):
                query_E = rms(turn(row[head * E : (head + 1) * E], t), 1e-7)
                scores = torch.stack([query_E @ key_E for key_E in keys[: t + 1]]) / math.sqrt(E)
                heads.append(scores.softmax(0) @ qkv_TF[: t + 1, (H + 1) * E :])
            rows.append(torch.cat(heads))
        x_TD = x_TD + torch.stack(rows) @ weights[block + "attention.out.weight"].T
        up_TF = rms(x_TD, config.norm_eps) @ weights[block + "mlp.up.weight"].T
        x_TD = x_TD + (up_TF * (up_TF > 0)) ** 2 @ weights[block + "mlp.down.weight"].T
    logits_TV = rms(x_TD, config.norm_eps) @ weights["embedding.weight"].T
    assert config.logit_softcap is not None
    return config.logit_softcap * torch.tanh(logits_TV / config.logit_softcap)


def test_equals_a_naive_nanochat(make_model: Callable[..., GPT]) -> None:
    model = make_model("nanochat", rope_base=500.0, logit_softcap=5.0)
    ids_BT = random_ids(model.config.vocab_size)
    with torch.no_grad():
        logits_BTV = model.logits(model(ids_BT))
        expected = torch.stack([naive_nanochat(model, ids) for ids in ids_BT.tolist()])
    assert logits_BTV.abs().max() > 4, "the soft-cap must be at work for this to prove it"
    torch.testing.assert_close(logits_BTV, expected.float(), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("norm", ["layernorm", "rmsnorm"])
@pytest.mark.parametrize("bias", [False, True])
def test_norms_without_scale(norm: Any, bias: bool) -> None:
    """(x - mean) / sqrt(var + eps) and x / sqrt(mean(x^2) + eps), with nothing to learn."""
    layer = make_norm(GPTConfig(1, n_embd=8, norm=norm, norm_scale=False, norm_eps=1e-3, bias=bias))
    assert not list(layer.parameters())
    x = 3 * torch.randn(5, 8, generator=torch.Generator().manual_seed(0)) + 1
    centred = x - x.mean(-1, keepdim=True) if norm == "layernorm" else x
    torch.testing.assert_close(layer(x), rms(centred, 1e-3))


def test_plain_gelu() -> None:
    """`gelu` is the exact one: x times the normal distribution's share below x."""
    mlp = MLP(GPTConfig(1, n_embd=32, activation="gelu"))
    x = torch.randn(4, 32, generator=torch.Generator().manual_seed(0))
    up = mlp.up(x)
    expected = mlp.down(up * 0.5 * (1 + torch.erf(up / math.sqrt(2))))
    torch.testing.assert_close(mlp(x), expected, atol=1e-5, rtol=1e-5)


def test_future_tokens_are_not_seen(model: GPT) -> None:
    ids_BT = random_ids(61)
    changed_BT = ids_BT.clone()
    changed_BT[:, 9:] = (changed_BT[:, 9:] + 1) % 61
    with torch.no_grad():
        before, after = model(ids_BT), model(changed_BT)
    torch.testing.assert_close(before[:, :9], after[:, :9], atol=1e-5, rtol=1e-5)
    assert not torch.allclose(before[:, 9:], after[:, 9:], atol=1e-2)


def test_the_transformer_takes_embeddings_in_place_of_ids(model: GPT) -> None:
    """What has no id, a thought, goes in beside what has one."""
    ids_BT = random_ids(61)
    with torch.no_grad():
        assert torch.equal(model(ids_BT), model.transformer(model.embedding(ids_BT)))


def read_twice(model: GPT, ids_BT: Tensor) -> tuple[Tensor, KVCache]:
    """Logits, with and without cache at work, and the cache."""
    cache = KVCache(LENGTH)
    hidden = [model(ids_BT[:, :9], cache=cache), model(ids_BT[:, 9:], cache=cache)]
    return model.logits(torch.cat(hidden, dim=1)), cache


@pytest.mark.parametrize("gathers", [False, True], ids=["ordinary", "gathered"])
def test_bfloat16_autocast_is_near_float32(model: GPT, gathers: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention runs in float32 on a CPU whatever the autocast, and the rest loses no more than bfloat16 must."""
    seen = set()
    attend = F.scaled_dot_product_attention

    def spy(q_BHTE: Tensor, k_BGTE: Tensor, v_BGTE: Tensor, **options: Any) -> Tensor:
        seen.update((q_BHTE.dtype, k_BGTE.dtype, v_BGTE.dtype))
        return attend(q_BHTE, k_BGTE, v_BGTE, **options)

    ids_BT = random_ids(61)
    parameters = list(model.parameters())
    exact, _ = read_twice(model, ids_BT)
    exact_gradients = torch.autograd.grad(exact.log_softmax(-1)[..., 0].mean(), parameters)
    monkeypatch.setattr(F, "scaled_dot_product_attention", spy)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        with gathered_gradients(model) if gathers else nullcontext():
            rounded, cache = read_twice(model, ids_BT)
        with torch.no_grad():
            silent, _ = read_twice(model, ids_BT)
    gradients = torch.autograd.grad(rounded.log_softmax(-1)[..., 0].mean(), parameters)
    assert seen | {layer.kv.dtype for layer in cache._layers} == {torch.float32}
    assert rounded.dtype == torch.float32
    assert not torch.equal(rounded, exact), "autocast was not at work"
    assert F.cosine_similarity(exact.flatten(), rounded.flatten(), dim=0) > 0.995
    assert F.cosine_similarity(exact.flatten(), silent.flatten(), dim=0) > 0.995
    for exact_gradient, gradient in zip(exact_gradients, gradients, strict=True):
        assert gradient.dtype == torch.float32
        assert F.cosine_similarity(exact_gradient.flatten(), gradient.flatten(), dim=0) > 0.98


def test_initial_residual_branches_shrink_with_depth() -> None:
    """Linear weights start at 1/sqrt(fan-in); what is added to the residual stream at 1/sqrt(2 * layers) of that."""
    torch.manual_seed(0)
    for block in GPT(GPTConfig(64, n_layer=8, n_embd=128)).transformer.blocks:
        assert isinstance(block, Block)
        for layer, scale in ((block.attention.qkv, 1.0), (block.attention.out, 0.25), (block.mlp.down, 0.25)):
            assert layer.weight.std().item() == pytest.approx(scale * layer.in_features**-0.5, rel=0.05)


def test_the_gpt2_preset_has_the_published_number_of_parameters() -> None:
    """124,439,808: https://github.com/openai/gpt-2 calls it 124M."""
    preset: Any = OmegaConf.to_container(OmegaConf.load(Path(config_dir()) / "model" / "gpt2.yaml"))
    with torch.device("meta"):
        model = GPT(GPTConfig(vocab_size=50257, **preset))
    assert sum(parameter.numel() for parameter in model.parameters()) == 124_439_808


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"vocab_size": 0}, "model.vocab_size=0: must be a whole number, at least 1"),
        ({"n_layer": 0}, "model.n_layer=0: must be a whole number, at least 1"),
        ({"context_length": -1}, "model.context_length=-1: must be a whole number, at least 1"),
        ({"n_embd": 30}, "model.n_embd=30: must be a multiple of n_head=4"),
        ({"n_embd": 12}, "model.n_embd=12: must be even per head for rotary"),
        ({"n_kv_head": 3}, "model.n_kv_head=3: must be a divisor of n_head=4"),
        ({"n_kv_head": 0}, "model.n_kv_head=0: must be a divisor of n_head=4"),
        ({"positions": "sinusoidal"}, "model.positions=sinusoidal: must be one of learned, rotary"),
        ({"norm": "batchnorm"}, "model.norm=batchnorm: must be one of layernorm, rmsnorm"),
        ({"activation": "tanh"}, "model.activation=tanh: must be one of gelu, gelu_tanh, swiglu, relu2"),
        ({"ffn_width": 0}, "model.ffn_width=0: must be at least 1"),
        ({"logit_softcap": 0.0}, "model.logit_softcap=0.0: must be above 0 or null"),
    ],
)
def test_an_impossible_shape_names_its_key(changes: dict[str, Any], says: str) -> None:
    shape: dict[str, Any] = {"vocab_size": 61, "n_embd": 32}
    with pytest.raises(UserError) as error:
        GPTConfig(**(shape | changes))
    assert str(error.value) == says


def test_embeddings_start_as_gpt2s() -> None:
    """N(0, 0.02), the table of positions too."""
    model = GPT(GPTConfig(vocab_size=500, n_embd=64, n_head=4, context_length=300, positions="learned"))
    assert model.transformer.positions is not None
    for table in (model.embedding, model.transformer.positions):
        assert table.weight.std().item() == pytest.approx(0.02, rel=0.05)
        assert abs(table.weight.mean().item()) < 0.001
