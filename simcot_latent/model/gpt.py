"""One decoder-only transformer. Model families differ by `GPTConfig` alone.

Shapes: B rows, T new positions, S all positions a query may see (cached + new), D width, H query heads,
G key/value heads, E head width, V vocabulary.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from simcot_latent.errors import UserError
from simcot_latent.model.cache import KVCache


@dataclass(frozen=True)
class GPTConfig:
    """What makes one transformer differ from another. `configs/model/*.yaml` are its presets.

    Attributes:
        vocab_size: rows of the embedding table.
        context_length: positions the model may be given.
        n_kv_head: key/value heads, each shared by n_head / n_kv_head query heads (grouped-query attention,
            https://arxiv.org/abs/2305.13245). None: as many as n_head.
        ffn_width: hidden width of the feed-forward part. None: 4 * n_embd.
        positions: a learned table (GPT-2) or rotary (https://arxiv.org/abs/2104.09864, half-split layout).
        activation: `gelu_tanh` is GPT-2's; `swiglu` has a gate of its own (https://arxiv.org/abs/2002.05202);
            `relu2` is the square of relu (https://arxiv.org/abs/2109.08668).
        bias: biases in norms and in all linear layers of the blocks.
        qkv_bias: biases of the query/key/value projection. None: as `bias`.
        norm_scale: whether norms carry a learned scale.
        qk_norm: RMS-normalise queries and keys, without a learned scale, after the rotation.
        logit_softcap: c in c * tanh(logits / c). None: none.
        tie_head: the output head is the embedding table.
    """

    vocab_size: int
    context_length: int = 1024
    n_layer: int = 4
    n_head: int = 4
    n_kv_head: int | None = None
    n_embd: int = 128
    ffn_width: int | None = None
    positions: Literal["learned", "rotary"] = "rotary"
    rope_base: float = 10_000.0
    norm: Literal["layernorm", "rmsnorm"] = "layernorm"
    norm_eps: float = 1e-5
    norm_scale: bool = True
    activation: Literal["gelu", "gelu_tanh", "swiglu", "relu2"] = "gelu"
    bias: bool = False
    qkv_bias: bool | None = None
    qk_norm: bool = False
    logit_softcap: float | None = None
    tie_head: bool = True

    def __post_init__(self) -> None:
        for key in ("vocab_size", "context_length", "n_layer", "n_head", "n_embd"):
            value = getattr(self, key)
            _require(isinstance(value, int) and value >= 1, key, value, "a whole number, at least 1")
        _require(self.n_embd % self.n_head == 0, "n_embd", self.n_embd, f"a multiple of n_head={self.n_head}")
        _require(
            self.kv_heads >= 1 and self.n_head % self.kv_heads == 0,
            "n_kv_head",
            self.n_kv_head,
            f"a divisor of n_head={self.n_head}",
        )
        _require(self.positions in ("learned", "rotary"), "positions", self.positions, "learned or rotary")
        _require(
            self.positions != "rotary" or self.head_width % 2 == 0, "n_embd", self.n_embd, "even per head for rotary"
        )
        _require(self.norm in ("layernorm", "rmsnorm"), "norm", self.norm, "layernorm or rmsnorm")
        _require(self.activation in _ACTIVATIONS, "activation", self.activation, f"one of {', '.join(_ACTIVATIONS)}")
        _require(self.ffn_width is None or self.ffn_width >= 1, "ffn_width", self.ffn_width, "at least 1")
        _require(
            self.logit_softcap is None or self.logit_softcap > 0, "logit_softcap", self.logit_softcap, "above 0 or null"
        )

    @property
    def kv_heads(self) -> int:
        return self.n_head if self.n_kv_head is None else self.n_kv_head

    @property
    def head_width(self) -> int:
        return self.n_embd // self.n_head


def _require(ok: bool, key: str, value: object, right: str) -> None:
    if not ok:
        raise UserError(f"model.{key}={value}: must be {right}")


def _swiglu(x: Tensor) -> Tensor:
    gate, value = x.chunk(2, dim=-1)
    return F.silu(gate) * value


def _gelu_tanh(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


def _relu2(x: Tensor) -> Tensor:
    return F.relu(x).square()


# Name -> (function, width of its input in units of its output's).
_ACTIVATIONS = {"gelu": (F.gelu, 1), "gelu_tanh": (_gelu_tanh, 1), "swiglu": (_swiglu, 2), "relu2": (_relu2, 1)}


def make_norm(config: GPTConfig) -> nn.Module:
    if config.norm == "layernorm":
        return nn.LayerNorm(config.n_embd, config.norm_eps, elementwise_affine=config.norm_scale, bias=config.bias)
    return nn.RMSNorm(config.n_embd, config.norm_eps, elementwise_affine=config.norm_scale)


def rotary_angles(positions_BT: Tensor, head_width: int, base: float) -> tuple[Tensor, Tensor]:
    """Cosine and sine of the rotary angles, (B, 1, T, E) each (https://arxiv.org/abs/2104.09864, equation 34)."""
    exponents_E = torch.arange(0, head_width, 2, device=positions_BT.device, dtype=torch.float32) / head_width
    angles_BTE = positions_BT.float().unsqueeze(-1) * base**-exponents_E
    angles_B1TE = torch.cat((angles_BTE, angles_BTE), dim=-1).unsqueeze(1)
    return angles_B1TE.cos(), angles_B1TE.sin()


def rotate(x_BHTE: Tensor, cos_B1TE: Tensor, sin_B1TE: Tensor) -> Tensor:
    """Applies rotary angles to queries or keys."""
    left, right = x_BHTE.chunk(2, dim=-1)
    return x_BHTE * cos_B1TE + torch.cat((-right, left), dim=-1) * sin_B1TE


def attend(q_BHTE: Tensor, k_BGSE: Tensor, v_BGSE: Tensor, mask_B1TS: Tensor | None) -> Tensor:
    """Scaled dot-product attention; `mask_B1TS` is True where a query may look, None: plain causal (T equals S)."""
    # Attention on a CPU stays in float32: its fused kernel's bfloat16 backward is 4x slower.
    with torch.autocast("cpu", enabled=False):
        return F.scaled_dot_product_attention(
            q_BHTE,
            k_BGSE,
            v_BGSE,
            attn_mask=mask_B1TS,
            is_causal=mask_B1TS is None,
            enable_gqa=q_BHTE.shape[1] != k_BGSE.shape[1],
        )


class Attention(nn.Module):
    """Grouped-query causal self-attention."""

    def __init__(self, config: GPTConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.n_head, self.kv_heads = config.n_head, config.kv_heads
        self.qk_norm = config.qk_norm
        qkv_bias = config.bias if config.qkv_bias is None else config.qkv_bias
        qkv_width = (config.n_head + 2 * config.kv_heads) * config.head_width
        self.qkv = nn.Linear(config.n_embd, qkv_width, bias=qkv_bias)
        self.out = nn.Linear(config.n_head * config.head_width, config.n_embd, bias=config.bias)

    def forward(
        self, x_BTD: Tensor, rotary: tuple[Tensor, Tensor] | None, mask_B1TS: Tensor | None, cache: KVCache | None
    ) -> Tensor:
        H, G = self.n_head, self.kv_heads
        qkv = self.qkv(x_BTD)
        if qkv.device.type == "cpu":
            qkv = qkv.float()  # see `attend`
        qkv = rearrange(qkv, "b t (h e) -> b h t e", h=H + 2 * G)
        qk, v = qkv.split((H + G, G), dim=1)
        if rotary is not None:
            qk = rotate(qk, *rotary).to(v.dtype)
        if self.qk_norm:
            qk = F.rms_norm(qk, (qk.shape[-1],))
        q, k = qk.split((H, G), dim=1)
        if cache is not None:
            k, v = cache.append(self.layer, k, v)
        return self.out(rearrange(attend(q, k, v, mask_B1TS), "b h t e -> b t (h e)"))


class MLP(nn.Module):
    """Feed-forward part of a block."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.activation, fan = _ACTIVATIONS[config.activation]
        width = config.ffn_width or 4 * config.n_embd
        self.up = nn.Linear(config.n_embd, fan * width, bias=config.bias)
        self.down = nn.Linear(width, config.n_embd, bias=config.bias)

    def forward(self, x_BTD: Tensor) -> Tensor:
        return self.down(self.activation(self.up(x_BTD)))


class Block(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, config: GPTConfig, layer: int) -> None:
        super().__init__()
        self.attention_norm = make_norm(config)
        self.attention = Attention(config, layer)
        self.mlp_norm = make_norm(config)
        self.mlp = MLP(config)

    def forward(
        self, x_BTD: Tensor, rotary: tuple[Tensor, Tensor] | None, mask_B1TS: Tensor | None, cache: KVCache | None
    ) -> Tensor:
        x_BTD = x_BTD + self.attention(self.attention_norm(x_BTD), rotary, mask_B1TS, cache)
        return x_BTD + self.mlp(self.mlp_norm(x_BTD))


class Transformer(nn.Module):
    """Positions, blocks and final norm: input embeddings to hidden states."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        self.positions = nn.Embedding(config.context_length, config.n_embd) if config.positions == "learned" else None
        blocks = [Block(config, layer) for layer in range(config.n_layer)]
        self.blocks = nn.ModuleList(blocks)
        self.norm = make_norm(config)
        self.apply(_init)
        for block in blocks:
            # GPT-2's scaling: the residual stream's variance stays the same at any depth.
            for residual in (block.attention.out, block.mlp.down):
                residual.weight.data.div_(math.sqrt(2 * config.n_layer))

    def forward(self, x_BTD: Tensor, mask_BT: Tensor | None = None, cache: KVCache | None = None) -> Tensor:
        """Hidden states after the final norm.

        Args:
            x_BTD: input embeddings (B, T, D).
            mask_BT: True where a position is real, False where it is padding (anywhere in the row). Padding is seen
                by nobody and takes no position number. None: all real.
            cache: what the rows have read before; the new positions are appended.

        Returns:
            (B, T, D); at padding, finite numbers without meaning.
        """
        B, T, _ = x_BTD.shape
        if cache is None and mask_BT is None:
            mask_B1TS = None
            positions_BT = torch.arange(T, device=x_BTD.device).unsqueeze(0)
        else:
            new_BT = torch.ones(B, T, dtype=torch.bool, device=x_BTD.device) if mask_BT is None else mask_BT
            seen_BS = new_BT if cache is None else cache.extend_mask(new_BT)
            positions_BT = (seen_BS.cumsum(1)[:, -T:] - 1).clamp(min=0)
            mask_B1TS = causal_mask(seen_BS, T)
        rotary = None
        if self.positions is None:
            rotary = rotary_angles(positions_BT, self.config.head_width, self.config.rope_base)
        else:
            x_BTD = x_BTD + self.positions(positions_BT)
        for block in self.blocks:
            x_BTD = block(x_BTD, rotary, mask_B1TS, cache)
        return self.norm(x_BTD)


def causal_mask(seen_BS: Tensor, T: int) -> Tensor:
    """Which of S keys each of the last T positions may see: real ones at or before it, and itself (B, 1, T, S).

    A padding position sees itself alone, so that its softmax is defined.
    """
    S = seen_BS.shape[1]
    query_T1 = torch.arange(S - T, S, device=seen_BS.device).unsqueeze(1)
    key_S = torch.arange(S, device=seen_BS.device)
    mask_BTS = (key_S <= query_T1) & seen_BS.unsqueeze(1) | (key_S == query_T1)
    return mask_BTS.unsqueeze(1)


class GPT(nn.Module):
    """Embedding, transformer and output head.

    Logits are not computed by `forward`: a caller asks for them with `logits`, at the positions it needs.
    """

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.n_embd)
        self.transformer = Transformer(config)
        self.head = None if config.tie_head else nn.Linear(config.n_embd, config.vocab_size, bias=False)
        _init(self.embedding)
        if self.head is not None:
            _init(self.head)

    def forward(
        self,
        ids_BT: Tensor | None = None,
        *,
        embeddings_BTD: Tensor | None = None,
        mask_BT: Tensor | None = None,
        cache: KVCache | None = None,
    ) -> Tensor:
        """Hidden states after the final norm, (B, T, D), for token ids *or* input embeddings.

        Args:
            ids_BT: token ids (B, T).
            embeddings_BTD: input embeddings (B, T, D), such as thoughts.
            mask_BT: see `Transformer.forward`.
            cache: see `Transformer.forward`.
        """
        if (ids_BT is None) == (embeddings_BTD is None):
            raise ValueError("give either ids_BT or embeddings_BTD")
        x_BTD = self.embedding(ids_BT) if embeddings_BTD is None else embeddings_BTD
        return self.transformer(x_BTD, mask_BT, cache)

    def logits(self, hidden: Tensor) -> Tensor:
        """Next-token logits (..., V) of hidden states (..., D)."""
        return output_logits(hidden, self.embedding if self.head is None else self.head, self.config.logit_softcap)


def output_logits(hidden: Tensor, table: nn.Embedding | nn.Linear, softcap: float | None) -> Tensor:
    """Logits (..., V) from hidden states (..., D) and a (V, D) table, in float32."""
    logits = F.linear(hidden, table.weight).float()
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def _init(module: nn.Module) -> None:
    """Embeddings N(0, 0.02) as in GPT-2; linear weights N(0, 1 / fan_in), which keeps narrow models moving too."""
    if isinstance(module, nn.Embedding):
        nn.init.normal_(module.weight, std=0.02)
    elif isinstance(module, nn.Linear):
        nn.init.normal_(module.weight, std=module.in_features**-0.5)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
