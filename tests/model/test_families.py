"""Every family computes what `transformers` computes from the same weights, and writes what it reads."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor

from simcot_latent.checkpoint import Checkpoint
from simcot_latent.curricula.base import Stage
from simcot_latent.data.format import AnswerFormat
from simcot_latent.data.tokenizer import Tokenizer
from simcot_latent.errors import UserError
from simcot_latent.interop.conversion import build, describe
from simcot_latent.interop.exported import export_hf
from simcot_latent.loops.sequential import Sequential, SequentialConfig
from simcot_latent.model.cache import KVCache
from simcot_latent.model.gpt import GPT, GPTConfig
from simcot_latent.model.packing import Packing

ROPE: dict[str, Any] = {"rope_type": "default", "rope_theta": 5000.0}
LLAMA3: dict[str, Any] = ROPE | {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
GPT2_SHAPE: dict[str, Any] = {
    "n_embd": 32,
    "n_layer": 3,
    "n_head": 4,
    "n_positions": 128,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
SHAPE: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 44,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": None,
}
ONE_KEY_HEAD: dict[str, Any] = {**SHAPE, "num_key_value_heads": 1}
CASES: dict[str, Any] = {
    "gpt2": lambda: transformers.GPT2Config(vocab_size=61, **GPT2_SHAPE),
    "gpt2 untied, narrow, erf": lambda: transformers.GPT2Config(
        vocab_size=67, tie_word_embeddings=False, n_inner=48, activation_function="gelu", **GPT2_SHAPE
    ),
    "llama": lambda: transformers.LlamaConfig(vocab_size=61, rope_parameters=ROPE, **SHAPE),
    "llama tied": lambda: transformers.LlamaConfig(
        vocab_size=67, rope_parameters=ROPE, tie_word_embeddings=True, rms_norm_eps=1e-3, **SHAPE
    ),
    "llama scaled": lambda: transformers.LlamaConfig(vocab_size=61, rope_parameters=LLAMA3, **SHAPE),
    "llama one kv head": lambda: transformers.LlamaConfig(vocab_size=61, rope_parameters=ROPE, **ONE_KEY_HEAD),
    "qwen2": lambda: transformers.Qwen2Config(vocab_size=61, rope_parameters=ROPE, **SHAPE),
    "qwen2 tied": lambda: transformers.Qwen2Config(
        vocab_size=67, rope_parameters=ROPE, tie_word_embeddings=True, **SHAPE
    ),
    "nanochat": lambda: transformers.NanoChatConfig(vocab_size=61, rope_parameters=ROPE, **SHAPE),
    "starcoder2": lambda: transformers.Starcoder2Config(
        vocab_size=61, rope_parameters=ROPE, tie_word_embeddings=False, **SHAPE
    ),
    "starcoder2 without biases": lambda: transformers.Starcoder2Config(
        vocab_size=67, rope_parameters=ROPE, use_bias=False, hidden_act="gelu", **SHAPE
    ),
    "nanochat tied, soft": lambda: transformers.NanoChatConfig(
        vocab_size=64, rope_parameters=ROPE, tie_word_embeddings=True, final_logit_softcapping=3.0, **SHAPE
    ),
}
T = 70  # beyond the original context of the scaled ones


@dataclass
class Files:
    """A published model as `read_published` gives it."""

    path: Path
    config: dict[str, Any]
    tensors: dict[str, Tensor]


def random_model(config: Any, seed: int = 0) -> transformers.PreTrainedModel:
    """A model in which every weight matters: biases are not 0, scales not 1."""
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        is_scale = parameter.dim() == 1 and not name.endswith("bias")
        parameter.data = 1 + 0.2 * noise if is_scale else 0.3 * noise
        if name.endswith("norm.bias") and not model.config.use_bias:
            parameter.data.zero_()  # what we can say of norms beside linear layers without biases
    return model


def files_of(model: transformers.PreTrainedModel) -> Files:
    tensors = dict(model.state_dict())
    if model.config.tie_word_embeddings:
        del tensors["lm_head.weight"]  # as save_pretrained does
    return Files(Path("folder"), model.config.to_diff_dict(), tensors)


@pytest.fixture(params=CASES)
def pair(request: pytest.FixtureRequest) -> tuple[transformers.PreTrainedModel, GPT]:
    """The same weights in `transformers` and here."""
    theirs = random_model(CASES[request.param]())
    return theirs, build(files_of(theirs)).eval()


def some_ids(vocab_size: int, rows: int = 2, seed: int = 1) -> Tensor:
    return torch.randint(1, vocab_size, (rows, T), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def test_logits_and_hidden_states(pair: tuple[transformers.PreTrainedModel, GPT]) -> None:
    theirs, ours = pair
    ids = some_ids(ours.config.vocab_size)
    expected = theirs(input_ids=ids, output_hidden_states=True)
    hidden = ours(ids)
    torch.testing.assert_close(hidden, expected.hidden_states[-1], atol=1e-4, rtol=0)
    torch.testing.assert_close(ours.logits(hidden), expected.logits, atol=1e-4, rtol=0)
    assert expected.logits.std() > 0.3, "else nearly anything would be close"


@torch.no_grad()
def test_greedy_continuations_cached(pair: tuple[transformers.PreTrainedModel, GPT]) -> None:
    """Token by token from our cache; `transformers` does the same from its own."""
    theirs, ours = pair
    ids = some_ids(ours.config.vocab_size)[:, :40]
    expected = theirs.generate(  # type: ignore[operator]
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=30, min_new_tokens=30, do_sample=False,
        eos_token_id=None, pad_token_id=0,
    )[:, 40:]  # fmt: skip
    cache = KVCache(T)
    hidden_BD = ours(ids.flatten(), Packing.grid(2, 40), cache).unflatten(0, (2, 40))[:, -1]
    written = []
    for _ in range(30):
        written.append(ours.logits(hidden_BD).argmax(-1))
        hidden_BD = ours(written[-1], Packing.grid(2, 1), cache)
    assert torch.equal(torch.stack(written, dim=1), expected)
    assert len(expected.unique()) > 3


@torch.no_grad()
def test_cached_equals_uncached(pair: tuple[transformers.PreTrainedModel, GPT]) -> None:
    _, ours = pair
    ids = some_ids(ours.config.vocab_size)
    cache = KVCache(T)
    pieces = [
        ours(piece.flatten(), Packing.grid(2, piece.shape[1]), cache).unflatten(0, (2, piece.shape[1]))
        for piece in ids.split([50, 1, 19], dim=1)
    ]
    torch.testing.assert_close(torch.cat(pieces, dim=1), ours(ids), atol=2e-5, rtol=0)


@torch.no_grad()
def test_bfloat16_is_near(pair: tuple[transformers.PreTrainedModel, GPT]) -> None:
    """bfloat16 keeps 8 bits: the mean error of a logit stays under 4% of their spread (1 to 2% as measured)."""
    _, ours = pair
    ids = some_ids(ours.config.vocab_size)
    exact = ours.logits(ours(ids))
    with torch.autocast("cpu", torch.bfloat16):
        rough = ours.logits(ours(ids))
    assert (rough - exact).abs().mean() < 0.04 * exact.std()
    assert not torch.equal(rough, exact)


@torch.no_grad()
def test_written_as_read(pair: tuple[transformers.PreTrainedModel, GPT], tmp_path: Path) -> None:
    """`describe` undoes `build`, to the bit; `transformers` reads its configuration."""
    theirs, ours = pair
    config, tensors = describe(ours)
    for name, tensor in files_of(theirs).tensors.items():
        assert torch.equal(tensors.pop(name), tensor), name
    assert not tensors
    back = type(theirs)(type(theirs.config)(**{k: v for k, v in config.items() if k != "architectures"})).eval()
    back.load_state_dict(theirs.state_dict())
    ids = some_ids(ours.config.vocab_size)
    assert torch.equal(back(input_ids=ids).logits, theirs(input_ids=ids).logits)
    again = build(Files(tmp_path, config, describe(ours)[1]))
    assert again.config == ours.config
    assert all(map(torch.equal, again.state_dict().values(), ours.state_dict().values()))


def test_rope_scaling_in_the_older_keys() -> None:
    theirs = random_model(CASES["llama scaled"]())
    files = files_of(theirs)
    expected = build(files).config
    scaling = dict(files.config.pop("rope_parameters"))
    files.config |= {"rope_theta": scaling.pop("rope_theta"), "rope_scaling": scaling}
    assert build(files).config == expected
    assert expected.rope_scaling is not None
    assert expected.rope_base == 5000.0


def test_the_older_rope_key_counts_where_both_are() -> None:
    files = files_of(random_model(CASES["llama scaled"]()))
    expected = build(files).config
    files.config |= {"rope_scaling": files.config["rope_parameters"], "rope_parameters": ROPE}
    assert (transformers.LlamaConfig(**files.config).rope_parameters or {}).get("rope_type") == "llama3"
    assert build(files).config == expected


@torch.no_grad()
def test_the_epsilon_of_nanochats_query_and_key_norm() -> None:
    """As large as it is here, it changes the logits, unless it is taken from where `transformers` takes it."""
    theirs = random_model(transformers.NanoChatConfig(vocab_size=61, rope_parameters=ROPE, rms_norm_eps=0.5, **SHAPE))
    ours = build(files_of(theirs)).eval()
    ids = some_ids(61)
    torch.testing.assert_close(ours.logits(ours(ids)), theirs(input_ids=ids).logits, atol=1e-4, rtol=0)


@torch.no_grad()
def test_the_default_width_is_written_out() -> None:
    """Only GPT-2's configuration knows a width of null."""
    ours = GPT(GPTConfig(vocab_size=61, n_embd=32, norm="rmsnorm", activation="swiglu")).eval()
    config, tensors = describe(ours)
    theirs = transformers.LlamaForCausalLM(transformers.LlamaConfig(**config)).eval()
    theirs.load_state_dict(tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"]})
    ids = some_ids(61)
    torch.testing.assert_close(theirs(input_ids=ids).logits, ours.logits(ours(ids)), atol=1e-4, rtol=0)


def test_a_bare_gpt2_with_buffers() -> None:
    """The files of the original GPT-2 have no `transformer.` in their names, and hold attention's masks."""
    files = files_of(random_model(CASES["gpt2"]()))
    expected = build(files).state_dict()
    files.tensors = {name.removeprefix("transformer."): tensor for name, tensor in files.tensors.items()}
    files.tensors |= {f"h.{i}.attn.bias": torch.ones(1, 1, 8, 8) for i in range(3)}
    files.tensors |= {f"h.{i}.attn.masked_bias": torch.tensor(-1e4) for i in range(3)}
    assert all(map(torch.equal, build(files).state_dict().values(), expected.values()))


@pytest.mark.parametrize("prefix", ["net.", "foo.", "base_model.model."])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_what_is_wrong_is_named_as_the_file_names_it(family: str, prefix: str) -> None:
    files = files_of(random_model(CASES[family]()))
    files.tensors = {prefix + name: tensor for name, tensor in files.tensors.items()}
    with pytest.raises(UserError) as caught:
        build(files)
    shown = re.search(r"it has (.+?) and [0-9]+ more, which", str(caught.value))
    assert shown is not None
    assert set(shown[1].split(", ")) <= set(files.tensors)


@pytest.mark.parametrize("before", ["", "model.transformer."])
def test_a_wrong_shape_is_named_as_the_file_names_it(before: str) -> None:
    files = files_of(random_model(CASES["gpt2"]()))
    files.tensors = {before + name.removeprefix("transformer."): tensor for name, tensor in files.tensors.items()}
    files.tensors[f"{before}ln_f.bias"] = torch.zeros(3)
    with pytest.raises(UserError, match=rf"it has {re.escape(before)}ln_f\.bias of shape \(3,\)"):
        build(files)


def test_the_frequencies_in_older_llama_files() -> None:
    """They are worked out from the configuration, whatever the file holds: the weights are those of a file without."""
    files = files_of(random_model(CASES["llama"]()))
    expected = build(files)
    files.tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    found = build(files)
    assert found.config == expected.config
    assert found.state_dict().keys() == expected.state_dict().keys()
    assert all(map(torch.equal, found.state_dict().values(), expected.state_dict().values()))


def test_half_precision_becomes_float32() -> None:
    files = files_of(random_model(CASES["llama"]()))
    files.tensors = {name: tensor.bfloat16() for name, tensor in files.tensors.items()}
    found = build(files)
    assert {p.dtype for p in found.parameters()} == {torch.float32}
    assert torch.equal(found.embedding.weight, files.tensors["model.embed_tokens.weight"].float())


BAD_CONFIGS = {
    "unknown family": ({"model_type": "mamba", "architectures": None}, "model_type=mamba: must be one of gpt2, llama"),
    "another activation": ({"hidden_act": "gelu"}, "hidden_act=gelu of a llama is not supported, only silu"),
    "biases": ({"attention_bias": True}, "attention_bias=True of a llama is not supported, only False"),
    "wide heads": ({"head_dim": 16}, "head_dim=16 is not supported"),
    "yarn": ({"rope_parameters": {"rope_type": "yarn"}}, "type yarn are not supported, only default and llama3"),
    "half a scaling": ({"rope_parameters": {"rope_type": "llama3", "factor": 2.0}}, "lack low_freq_factor, high_freq"),
    "odd heads": ({"num_attention_heads": 5}, "folder: model.n_embd=32: must be a multiple of n_head=5"),
    "text for a number": ({"intermediate_size": "44"}, "folder: "),
}


@pytest.mark.parametrize("what", BAD_CONFIGS)
def test_configurations_that_we_do_not_compute(what: str) -> None:
    files = files_of(random_model(CASES["llama"]()))
    changes, message = BAD_CONFIGS[what]
    files.config |= changes
    with pytest.raises(UserError) as error:
        build(files)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("family", "key", "value"),
    [
        ("gpt2", "scale_attn_weights", False),
        ("gpt2", "scale_attn_by_inverse_layer_idx", True),
        ("gpt2", "add_cross_attention", True),
        ("llama", "mlp_bias", True),
        ("qwen2", "use_sliding_window", True),
        ("nanochat", "attention_bias", True),
    ],
)
def test_what_no_gpt_of_ours_computes(family: str, key: str, value: bool) -> None:
    files = files_of(random_model(CASES[family]()))
    files.config[key] = value
    with pytest.raises(UserError, match=f"{key}={value} of a {family} is not supported, only {not value}"):
        build(files)


def test_a_key_that_is_missing() -> None:
    files = files_of(random_model(CASES["llama"]()))
    del files.config["intermediate_size"]
    with pytest.raises(UserError, match="lacks intermediate_size, which a llama has"):
        build(files)


def test_tensors_that_do_not_fit_are_named() -> None:
    files = files_of(random_model(CASES["gpt2"]()))
    del files.tensors["transformer.h.1.ln_1.bias"]
    files.tensors["transformer.h.1.extra.weight"] = torch.ones(1)
    files.tensors["transformer.h.0.mlp.c_fc.weight"] = torch.ones(32, 99)
    with pytest.raises(UserError) as error:
        build(files)
    for part in (
        "lacks transformer.h.1.ln_1.bias",
        "has transformer.h.1.extra.weight, which a gpt2 has not",
        "has transformer.h.0.mlp.c_fc.weight of shape (32, 99), not (32, 128)",
    ):
        assert part in str(error.value)


def test_another_familys_weights() -> None:
    files = files_of(random_model(CASES["llama"]()))
    files.config["model_type"] = "nanochat"
    files.config["architectures"] = None
    files.config["hidden_act"] = "relu2"
    with pytest.raises(UserError, match=r"lacks model.layers.0.mlp.fc1.weight"):
        build(files)


def test_a_head_that_is_not_the_embedding() -> None:
    files = files_of(random_model(CASES["llama tied"]()))
    expected = build(files)
    files.tensors["lm_head.weight"] = files.tensors["model.embed_tokens.weight"].clone()
    found = build(files)
    assert found.head is None
    assert all(map(torch.equal, found.state_dict().values(), expected.state_dict().values()))
    files.tensors["lm_head.weight"] += 1
    with pytest.raises(UserError, match=r"lm_head.weight is not the embedding"):
        build(files)


def test_a_model_like_no_family() -> None:
    config = GPTConfig(vocab_size=61, n_embd=32, norm="rmsnorm", activation="gelu", positions="learned")
    with pytest.raises(UserError, match=r"no published family is like this model: .* has not .*positions=learned"):
        describe(GPT(config))


def test_biases_of_norms_alone_are_not_dropped() -> None:
    files = files_of(random_model(CASES["starcoder2 without biases"]()))
    files.tensors["model.norm.bias"] += 1
    with pytest.raises(UserError, match=r"has model.norm.bias, which a starcoder2 has not"):
        build(files)


def test_a_projector_is_left_out(tmp_path: Path, tokenizer: Tokenizer) -> None:
    """What a loop has learned is no weight of the model that is described: as exported, it is one without."""
    config = transformers.GPT2Config(vocab_size=tokenizer.n_vocab, **GPT2_SHAPE)
    plain = Checkpoint(build(files_of(random_model(config))), None, tokenizer, {})
    loop = Sequential(plain.model.config.n_embd, SequentialConfig(projector_width=8))
    grown = replace(plain, answers=AnswerFormat(thinks=True), loop=loop, stage=Stage(2, first_written=None))
    found = []
    for name, checkpoint in (("plain", plain), ("grown", grown)):
        export_hf(checkpoint, tmp_path / name)
        found.append(load_file(tmp_path / name / "model.safetensors"))
    assert found[0].keys() == found[1].keys() != set()
    assert all(map(torch.equal, found[0].values(), found[1].values()))
