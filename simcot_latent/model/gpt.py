"""One decoder-only transformer. Model families differ by `GPTConfig` alone.

Shapes: P tokens of all rows (see `packing`), B rows, T positions of the longest, M tokens that are read out, D width,
H query heads, G key/value heads, E head width, V vocabulary.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from simcot_latent.errors import UserError, require, require_choice
from simcot_latent.model.cache import CacheView, KVCache, StaticCache
from simcot_latent.model.linear import Embedding, Head, Linear, activated, gathered_again
from simcot_latent.model.packing import Packing
from simcot_latent.model.rotary import RopeScaling, Rotary
from simcot_latent.model.taps import Taps

# Passes over no more tokens than this are not worth compiling.
FEW = 64


@dataclass(frozen=True)
class GPTConfig:
    """What makes one transformer differ from another. `configs/model/*.yaml` are its presets.

    Attributes:
        vocab_size: rows of the embedding table.
        context_length: positions the model may be given, thoughts included.
        n_layer: blocks.
        n_head: query heads.
        n_kv_head: key/value heads, each shared by n_head / n_kv_head query heads (grouped-query attention,
            https://arxiv.org/abs/2305.13245). None: as many as n_head.
        n_embd: width.
        ffn_width: hidden width of the feed-forward part. None: 4 * n_embd.
        positions: `learned`, a table (GPT-2), or `rotary` (https://arxiv.org/abs/2104.09864, half-split layout).
        rope_base: base of the rotary frequencies.
        rope_scaling: Llama 3's scaling of rotary frequencies, such as `{factor: 32, low_freq_factor: 1,
            high_freq_factor: 4, original_context: 8192}`; see `RopeScaling`. None: none.
        embedding_norm: whether input embeddings are normalised before the first block (nanochat).
        norm: `layernorm` or `rmsnorm`.
        norm_eps: what a norm adds to the variance.
        activation: `gelu`, `gelu_tanh` (GPT-2's), `swiglu` (which has a gate of its own,
            https://arxiv.org/abs/2002.05202) or `relu2` (the square of relu, https://arxiv.org/abs/2109.08668).
        bias: biases in norms and in all linear layers of the blocks.
        qkv_bias: biases of the query/key/value projection. None: as `bias`.
        norm_scale: whether norms carry a learned scale.
        qk_norm: RMS-normalise queries and keys, without a learned scale.
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
    rope_scaling: RopeScaling | None = None
    embedding_norm: bool = False
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
        if isinstance(self.rope_scaling, Mapping):  # as configurations hold it
            try:
                object.__setattr__(self, "rope_scaling", RopeScaling(**self.rope_scaling))
            except TypeError as error:
                raise UserError(f"model.rope_scaling: {error}") from error
        for key in ("vocab_size", "context_length", "n_layer", "n_head", "n_embd"):
            value = getattr(self, key)
            require(isinstance(value, int) and value >= 1, f"model.{key}", value, "a whole number, at least 1")
        width, heads = self.n_embd, self.n_head
        require(width % heads == 0, "model.n_embd", width, f"a multiple of n_head={heads}")
        shared = self.kv_heads >= 1 and heads % self.kv_heads == 0
        require(shared, "model.n_kv_head", self.n_kv_head, f"a divisor of n_head={heads}")
        require_choice("model.positions", self.positions, ("learned", "rotary"))
        halves = self.positions != "rotary" or self.head_width % 2 == 0
        require(halves, "model.n_embd", width, "even per head for rotary")
        require_choice("model.norm", self.norm, ("layernorm", "rmsnorm"))
        require_choice("model.activation", self.activation, tuple(_ACTIVATIONS))
        require(self.ffn_width is None or self.ffn_width >= 1, "model.ffn_width", self.ffn_width, "at least 1")
        require(0 < self.rope_base < math.inf, "model.rope_base", self.rope_base, "above 0, finite")
        require(0 <= self.norm_eps < math.inf, "model.norm_eps", self.norm_eps, "at least 0, finite")
        softcap = self.logit_softcap
        require(softcap is None or softcap > 0, "model.logit_softcap", softcap, "above 0 or null")

    @property
    def kv_heads(self) -> int:
        return self.n_head if self.n_kv_head is None else self.n_kv_head

    @property
    def head_width(self) -> int:
        return self.n_embd // self.n_head


def _swiglu(x: Tensor) -> Tensor:
    gate, value = x.chunk(2, dim=-1)
    return F.silu(gate) * value


def _gelu_tanh(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


def _relu2(x: Tensor) -> Tensor:
    return F.relu(x).square()


# Name -> (function, width of its input in units of its output's, whether autograd keeps its input alone).
_ACTIVATIONS = {
    "gelu": (F.gelu, 1, True),
    "gelu_tanh": (_gelu_tanh, 1, True),
    "swiglu": (_swiglu, 2, False),
    "relu2": (_relu2, 1, False),
}


def make_norm(config: GPTConfig) -> nn.Module:
    if config.norm == "layernorm":
        return nn.LayerNorm(config.n_embd, config.norm_eps, elementwise_affine=config.norm_scale, bias=config.bias)
    return nn.RMSNorm(config.n_embd, config.norm_eps, elementwise_affine=config.norm_scale)


class Sight:
    """What the tokens of one pass see, worked out once for all layers: their own row, up to themselves.

    Args:
        packing: how the tokens lie.
        cache: what the rows have read before; None: nothing, and this pass is not to be remembered.
        config: for the shapes of its heads, and its positions.
        fused: whether a fused kernel attends in passes after the first.
        taps: who wants to see queries, keys and values.
    """

    def __init__(
        self,
        packing: Packing,
        cache: KVCache | None,
        config: GPTConfig,
        fused: bool = False,
        taps: Taps | None = None,
    ) -> None:
        self.packing, self.cache, self.taps = packing, cache, taps
        self.heads = H, G = config.n_head, config.kv_heads
        self.position_P = packing.offset_P if cache is None else cache.place(packing)
        self.rotary = None
        if config.positions == "rotary":
            self.rotary = Rotary.at(self.position_P, config.head_width, config.rope_base, config.rope_scaling)
        self.layer = 0  # layers attend one after the other
        self.view = self.slot_N = None
        if cache is not None and cache.is_empty:
            self.slot_N = cache.slots(packing, self.position_P, G)
        elif cache is not None:
            self.view = CacheView(cache, packing, self.position_P, self.rotary, (H, G), fused)
        self.device = packing.row_P.device.type
        self.in_autocast = torch.is_autocast_enabled(self.device)

    def attend(self, qkv_PXE: Tensor) -> Tensor:
        """Scaled dot-product attention of the next layer, (P, H * E).

        The only place where rows are padded to rectangles. Attention on a CPU stays in float32: its fused kernel's
        bfloat16 backward is 4x slower.

        Args:
            qkv_PXE: queries, keys and values, not rotated yet; X = H + 2G.
        """
        if not self.in_autocast:
            return self._attend(qkv_PXE)
        with torch.autocast(self.device, enabled=False):
            return self._attend(qkv_PXE.float() if self.device == "cpu" else qkv_PXE)

    def _attend(self, qkv_PXE: Tensor) -> Tensor:
        layer, self.layer = self.layer, self.layer + 1
        if self.taps is not None:
            self.taps.add_attention(layer, qkv_PXE, self.heads, self.rotary)
        if self.cache is not None and self.view is not None:
            return self.cache.attend(layer, qkv_PXE, self.view)
        H, G = self.heads
        qk_PXE, v_PGE = qkv_PXE.split((H + G, G), dim=1)
        q_PHE, k_PGE = (qk_PXE if self.rotary is None else self.rotary(qk_PXE)).split((H, G), dim=1)
        if self.cache is not None and self.slot_N is not None:
            self.cache.fill(k_PGE, v_PGE, self.packing.rows, self.slot_N)
        rectangles = zip(*(self.packing.lay_out(x) for x in (q_PHE, k_PGE, v_PGE)), strict=True)
        return self.packing.unpad(*(self._attend_within(*rectangle) for rectangle in rectangles))

    def _attend_within(self, q_BTHE: Tensor, k_BTGE: Tensor, v_BTGE: Tensor) -> Tensor:
        """Attention of a first pass in one rectangle, (B, T, H * E)."""
        # Padding is on the right, where causality alone keeps it from being seen.
        q_BHTE, k_BGTE, v_BGTE = (rearrange(x, "b t h e -> b h t e") for x in (q_BTHE, k_BTGE, v_BTGE))
        gqa = q_BHTE.shape[1] != k_BGTE.shape[1]
        out_BHTE = F.scaled_dot_product_attention(q_BHTE, k_BGTE, v_BGTE, is_causal=True, enable_gqa=gqa)
        return rearrange(out_BHTE, "b h t e -> b t (h e)")


def last(x_PD: Tensor, count: int | None) -> Tensor:
    """The last tokens; None: all."""
    return x_PD if count is None else x_PD[len(x_PD) - count :]


class Attention(nn.Module):
    """Grouped-query causal self-attention."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.n_head, self.kv_heads = config.n_head, config.kv_heads
        self.qk_norm_eps = config.norm_eps if config.qk_norm else None
        qkv_bias = config.bias if config.qkv_bias is None else config.qkv_bias
        qkv_width = (config.n_head + 2 * config.kv_heads) * config.head_width
        self.qkv = Linear(config.n_embd, qkv_width, bias=qkv_bias)
        self.out = Linear(config.n_head * config.head_width, config.n_embd, bias=config.bias)

    def forward(self, x_PD: Tensor, sight: Sight, read_out: int | None = None) -> Tensor:
        """What tokens (P, D) see of their rows, (M, D): of the last tokens alone, where only they are read out."""
        return self.out(last(sight.attend(self.project(x_PD)), read_out))

    def project(self, x_PD: Tensor) -> Tensor:
        """Queries, keys and values (P, H + 2G, E), not rotated yet."""
        H, G = self.n_head, self.kv_heads
        qkv_PXE = rearrange(self.qkv(x_PD), "p (x e) -> p x e", x=H + 2 * G)
        if self.qk_norm_eps is None:
            return qkv_PXE
        qk_PXE, v_PGE = qkv_PXE.split((H + G, G), dim=1)
        # Before the rotation rather than after it, as published: rotating changes no length.
        return torch.cat((F.rms_norm(qk_PXE, (qk_PXE.shape[-1],), eps=self.qk_norm_eps), v_PGE), dim=1)


class MLP(nn.Module):
    """Feed-forward part of a block."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.activation: Callable[[Tensor], Tensor]
        self.keeps_input_alone: bool
        self.activation, fan, self.keeps_input_alone = _ACTIVATIONS[config.activation]
        width = config.ffn_width or 4 * config.n_embd
        self.up = Linear(config.n_embd, fan * width, bias=config.bias)
        self.down = Linear(width, config.n_embd, bias=config.bias)

    def forward(self, x_PD: Tensor) -> Tensor:
        return self.down(activated(self.up(x_PD), self.activation, self.down, self.keeps_input_alone))


def is_hooked(module: nn.Module) -> bool:
    """Whether anybody has registered a hook on the module or on a part of it.

    A block that is runs part by part, neither compiled nor checkpointed: compilers would not see hooks that come later,
    and what is computed again would call them again.
    """
    if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
        return True
    # Not `modules()`, which takes twice as long: this is asked at every pass.
    return any(is_hooked(part) for part in module._modules.values() if part is not None)


_checkpoint = partial(checkpoint, use_reentrant=False)


class Block(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.attention_norm = make_norm(config)
        self.attention = Attention(config)
        self.mlp_norm = make_norm(config)
        self.mlp = MLP(config)
        self.compiled: tuple[Callable[..., Tensor], ...] | None = None
        self.compiled_few: tuple[Callable[..., Tensor], ...] | None = None
        self.checkpointing = False
        """Whether activations are computed again in the backward pass instead of kept, but for what attention keeps."""
        self.draws = False
        """Whether a pass in training draws random numbers (dropout), which must be the same when computed again."""

    def forward(self, x_PD: Tensor, sight: Sight, read_out: int | None = None) -> Tensor:
        """(M, D): only what is to be read out is computed beyond keys and values."""
        compiled = self.compiled_few if len(x_PD) <= FEW else self.compiled
        checkpointing = self.checkpointing and torch.is_grad_enabled()
        if (compiled is None and not checkpointing) or is_hooked(self):
            change_MD = self.attention(self.attention_norm(x_PD), sight, read_out)
            return self.feed_forward(last(x_PD, read_out) + change_MD)
        before, after = (self.before, self.after) if compiled is None else compiled
        if checkpointing:
            options = {"context_fn": partial(gathered_again, self), "preserve_rng_state": self.draws and self.training}
            before, after = (partial(_checkpoint, part, **options) for part in (before, after))
        seen_PD = sight.attend(before(x_PD))
        return after(last(x_PD, read_out), last(seen_PD, read_out))

    def before(self, x_PD: Tensor) -> Tensor:
        """From the residual stream to queries, keys and values."""
        return self.attention.project(self.attention_norm(x_PD))

    def after(self, x_MD: Tensor, seen_MD: Tensor) -> Tensor:
        """From what attention saw to the residual stream."""
        return self.feed_forward(x_MD + self.attention.out(seen_MD))

    def feed_forward(self, x_MD: Tensor) -> Tensor:
        """From the residual stream after attention to the one that the next block reads."""
        return x_MD + self.mlp(self.mlp_norm(x_MD))

    def compile_parts(self) -> None:
        """Compiles what lies before and after attention, for passes over many tokens and any number of them.

        Passes over few, such as a thought's, spend their time on reading weights; their gradients are gathered, which
        compilers do not see.
        """
        self.compiled = tuple(torch.compile(f, dynamic=True, fullgraph=True) for f in (self.before, self.after))

    def compile_few(self) -> None:
        """Compiles the same for passes over few tokens, for every number of them anew, on a GPU as CUDA graphs.

        For GPUs, where such a pass spends its time on starting kernels. The gradients of weights are not gathered then.
        """
        self.compiled_few = tuple(
            torch.compile(f, dynamic=False, fullgraph=True, mode="reduce-overhead") for f in (self.before, self.after)
        )


def set_block_options(
    module: nn.Module,
    compile: bool = False,
    checkpointing: bool = False,
    compile_thoughts: bool = False,
    later_attention: str = "products",
) -> None:
    """Sets how the transformers within a module compute; the numbers stay the same, to rounding.

    Args:
        compile, compile_thoughts: see `Block.compile_parts` and `Block.compile_few`.
        checkpointing: whether blocks compute activations again in the backward pass.
        later_attention: how passes after the first attend, `products` or `sdpa`; see `Transformer.later_attention`.
    """
    for part in module.modules():
        if isinstance(part, Transformer):
            part.later_attention = later_attention
        if isinstance(part, Block):
            part.checkpointing = checkpointing
            if compile:
                part.compile_parts()
            if compile_thoughts:
                part.compile_few()


class Transformer(nn.Module):
    """Positions, blocks and final norm: input embeddings to hidden states."""

    later_attention: str = "products"
    """How passes after the first attend: `products` of our own, or `sdpa`, PyTorch's fused kernel, whose weights are
    worked out again in the backward pass."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        self.positions = Embedding(config.context_length, config.n_embd) if config.positions == "learned" else None
        self.embedding_norm = make_norm(config) if config.embedding_norm else None
        blocks = [Block(config) for _ in range(config.n_layer)]
        self.blocks = nn.ModuleList(blocks)
        self.norm = make_norm(config)
        self.apply(init_weights)
        for block in blocks:
            # GPT-2's scaling: the residual stream's variance stays the same at any depth.
            for residual in (block.attention.out, block.mlp.down):
                residual.weight.data.div_(math.sqrt(2 * config.n_layer))

    def forward(
        self,
        x: Tensor,
        packing: Packing | None = None,
        cache: KVCache | None = None,
        read_out: int | None = None,
        taps: Taps | None = None,
    ) -> Tensor:
        """Hidden states after the final norm.

        Args:
            x: input embeddings (P, D) with a packing, or (B, T, D) without: rows of equal length.
            packing: how P tokens of ragged rows lie.
            cache: what the rows have read before; the new tokens are added to it.
            read_out: M, how many of the last tokens' hidden states are wanted: the last block computes no others. Only
                with a packing. None: all.
            taps: to be filled with hidden states, keys and values on the way.

        Raises:
            ValueError: the cache has no room, `read_out` comes without a packing, or as `Taps` say.

        Returns:
            (M, D), or (B, T, D) for rows of equal length.
        """
        if packing is None:
            B, T, _ = x.shape
            grid = Packing.grid(B, T, x.device)
            if read_out is not None:
                raise ValueError("read_out needs a packing: of rows of equal length all tokens are read out")
            x_PD = self.forward(rearrange(x, "b t d -> (b t) d"), grid, cache, None, taps)
            return rearrange(x_PD, "(b t) d -> b t d", b=B, t=T)
        if isinstance(cache, StaticCache):
            if cache.is_empty:
                cache.replays = not is_hooked(self)  # a graph runs no Python
            if taps is None and cache.can_replay(packing):
                return cache.replay(lambda x_SD, every_row: self(x_SD, every_row, cache), x)
        if taps is not None:
            taps.begin(len(self.blocks), len(packing), read_out, x.device)
        sight = Sight(packing, cache, self.config, self.later_attention == "sdpa", taps)
        x_PD = x if self.positions is None else x + self.positions(sight.position_P)
        if self.embedding_norm is not None:
            x_PD = self.embedding_norm(x_PD)
        for layer, block in enumerate(self.blocks):
            if taps is not None:
                taps.add_hidden(layer, x_PD)
            x_PD = block(x_PD, sight, read_out if layer == len(self.blocks) - 1 else None)
        if cache is not None:
            cache.advance(packing)
        hidden_MD = self.norm(x_PD)
        if taps is not None:
            for state, x_MD in enumerate((x_PD, hidden_MD), start=len(self.blocks)):
                taps.add_hidden(state, x_MD, left_out=True)
        return hidden_MD


class GPT(nn.Module):
    """Embedding, transformer and output head.

    Logits are not computed by `forward`: a caller asks for them with `logits`, at the tokens it needs them for.
    """

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = Embedding(config.vocab_size, config.n_embd)
        self.transformer = Transformer(config)
        self.head = None if config.tie_head else Head(config.n_embd, config.vocab_size)
        init_weights(self.embedding)
        if self.head is not None:
            init_weights(self.head)

    def forward(
        self,
        ids: Tensor,
        packing: Packing | None = None,
        cache: KVCache | None = None,
        read_out: int | None = None,
        taps: Taps | None = None,
    ) -> Tensor:
        """Hidden states after the final norm for token ids, (P,) with a packing or (B, T); see `Transformer.forward`.

        What are no tokens, such as thoughts, goes into `transformer` as input embeddings.
        """
        return self.transformer(self.embedding(ids), packing, cache, read_out, taps)

    @property
    def output_table(self) -> Tensor:
        """The weight (V, D) of the output head."""
        return self.embedding.table if self.head is None else self.head.table

    def logits(self, hidden: Tensor) -> Tensor:
        """Next-token logits (..., V) of hidden states (..., D)."""
        if self.head is None:
            return softcapped(self.embedding.scores(hidden), self.config.logit_softcap)
        return output_logits(hidden, self.head.table, self.config.logit_softcap)


def output_logits(hidden: Tensor, table_VD: Tensor, softcap: float | None) -> Tensor:
    """Logits (..., V) of hidden states (..., D), in float32."""
    return softcapped(F.linear(hidden, table_VD), softcap)


def softcapped(logits: Tensor, softcap: float | None) -> Tensor:
    """Logits in float32, none beyond the cap."""
    logits = logits.float()
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def init_weights(module: nn.Module) -> None:
    """Embeddings N(0, 0.02) as in GPT-2; linear weights N(0, 1 / fan_in), which keeps narrow models moving too."""
    if isinstance(module, nn.Embedding):
        nn.init.normal_(module.weight, std=0.02)
    elif isinstance(module, nn.Linear):
        nn.init.normal_(module.weight, std=module.in_features**-0.5)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
