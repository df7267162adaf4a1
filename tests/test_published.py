"""Published files: every layout reads as the same model, and what is broken is named."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from simcot_latent.checkpoint import Checkpoint, write_checkpoint
from simcot_latent.curricula.base import Stage
from simcot_latent.data.format import AnswerFormat
from simcot_latent.data.tokenizer import Tokenizer
from simcot_latent.errors import UserError
from simcot_latent.interop.conversion import build
from simcot_latent.interop.pretrained import load_pretrained
from simcot_latent.interop.published import read_published
from simcot_latent.loops.sequential import Sequential, SequentialConfig
from simcot_latent.model.gpt import GPT
from simcot_latent.terms.steps import StepGroups

TEXT = "Mia has 14 shells. She finds 9 more: <<14+9=23>>\n#### 23\n"


def write_tokenizer(folder: Path) -> tokenizers.Tokenizer:
    """A small GPT-2-like tokenizer."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
    tokenizer.decoder = tokenizers.decoders.ByteLevel()  # type: ignore[assignment]
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([TEXT] * 3, trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|endoftext|>"}))
    return tokenizer


def write_folder(folder: Path, max_shard_size: str = "5GB", **changes: Any) -> transformers.PreTrainedModel:
    """A small random Llama as `transformers` writes it, its tokenizer beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    n_vocab = write_tokenizer(folder).get_vocab_size()
    config = transformers.LlamaConfig(
        vocab_size=n_vocab + 7,  # as published models often have, rows that no token has
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        eos_token_id=0,
        **changes,
    )
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config).eval()
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    return model


@torch.no_grad()
def assert_same(source: str | Path, theirs: transformers.PreTrainedModel, folder: Path) -> None:
    """What is read from `source` gives the logits of `theirs` and the token ids of the tokenizer in `folder`."""
    checkpoint = load_pretrained(source)
    original = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    ids = checkpoint.tokenizer.encode(TEXT)
    assert ids == original.encode(TEXT).ids
    assert checkpoint.tokenizer.n_vocab == checkpoint.model.config.vocab_size
    x = torch.tensor([ids])
    torch.testing.assert_close(
        checkpoint.model.logits(checkpoint.model(x)), theirs(input_ids=x).logits, atol=1e-4, rtol=0
    )


def test_one_file(tmp_path: Path) -> None:
    theirs = write_folder(tmp_path)
    assert_same(tmp_path, theirs, tmp_path)
    assert load_pretrained(tmp_path).tokenizer.end_id == 0


def test_shards(tmp_path: Path) -> None:
    theirs = write_folder(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    assert_same(tmp_path, theirs, tmp_path)


def test_pytorch_files(tmp_path: Path) -> None:
    theirs = write_folder(tmp_path)
    torch.save(load_file(tmp_path / "model.safetensors"), tmp_path / "pytorch_model.bin")
    (tmp_path / "model.safetensors").unlink()
    assert_same(tmp_path, theirs, tmp_path)


def test_the_hubs_layout_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A repository in the hub's cache is read with no network; one that is not there says what to give instead."""
    import huggingface_hub.constants as constants

    cache = tmp_path / "hub"
    revision = "0123456789abcdef0123456789abcdef01234567"
    folder = cache / "models--someone--small" / "snapshots" / revision
    theirs = write_folder(folder)
    refs = cache / "models--someone--small" / "refs"
    refs.mkdir()
    (refs / "main").write_text(revision)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.chdir(tmp_path)
    assert_same("someone/small", theirs, folder)
    with pytest.raises(
        UserError,
        match=r"init_from=someone/else: is no file or folder here, and as a hub id cannot be downloaded.*give a folder",
    ) as error:
        load_pretrained("someone/else", key="init_from")
    assert "\n" not in str(error.value)
    with pytest.raises(UserError, match=r"init_from=some--one/small: .*cannot be downloaded"):  # no id of the hub's
        load_pretrained("some--one/small", key="init_from")


def test_a_gated_model(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub
    import huggingface_hub.errors

    def refuse(*_: Any, **__: Any) -> None:
        raise huggingface_hub.errors.GatedRepoError.__new__(huggingface_hub.errors.GatedRepoError)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(UserError, match=r"source=someone/gated: its licence must be accepted"):
        load_pretrained("someone/gated")


def test_our_own_from_the_hub(
    make_model: Callable[..., GPT], tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub.constants as constants

    model = make_model("llama", vocab_size=tokenizer.n_vocab)
    saved = Checkpoint(
        model,
        None,
        tokenizer,
        {"max_new_tokens": 8},
        answers=AnswerFormat(thinks=True),
        loop=Sequential(32, SequentialConfig(projector_width=24)),
        stage=Stage(4, first_written=None),
        groups=StepGroups(2),
    )
    revision = "0123456789abcdef0123456789abcdef01234567"
    folder = tmp_path / "models--me--mine" / "snapshots" / revision
    folder.mkdir(parents=True)
    write_checkpoint(saved, folder)
    (tmp_path / "models--me--mine" / "refs").mkdir()
    (tmp_path / "models--me--mine" / "refs" / "main").write_text(revision)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    loaded = load_pretrained("me/mine")
    assert (loaded.answers, loaded.stage, loaded.groups) == (saved.answers, saved.stage, saved.groups)
    assert loaded.tokenizer == tokenizer
    assert torch.equal(loaded.model.embedding.weight, model.embedding.weight)
    assert isinstance(loaded.loop, Sequential)
    assert saved.loop is not None
    assert all(map(torch.equal, loaded.loop.parameters(), saved.loop.parameters()))


@pytest.fixture
def nanochat(tmp_path: Path) -> tuple[Path, transformers.PreTrainedModel]:
    """An original nanochat checkpoint folder, of two steps, and the last one's model in `transformers`."""
    write_tokenizer(tmp_path)
    config = transformers.NanoChatConfig(
        vocab_size=320,
        hidden_size=32,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=64,
    )
    for step in (100, 650):
        torch.manual_seed(step)
        theirs = transformers.NanoChatForCausalLM(config).eval()
        names = [
            ("model.embed_tokens.", "transformer.wte."),
            ("model.layers.", "transformer.h."),
            (".self_attn.o_proj.", ".attn.c_proj."),
            *((f".self_attn.{x}_proj.", f".attn.c_{x}.") for x in "qkv"),
            (".mlp.fc1.", ".mlp.c_fc."),
            (".mlp.fc2.", ".mlp.c_proj."),
        ]
        state = {}
        for name, tensor in theirs.state_dict().items():
            for theirs_name, original in names:
                name = name.replace(theirs_name, original)
            state[f"_orig_mod.{name}"] = tensor
        torch.save(state, tmp_path / f"model_{step:06d}.pt")
        shape = {"sequence_len": 64, "vocab_size": 320, "n_layer": 2, "n_head": 4, "n_kv_head": 4, "n_embd": 32}
        (tmp_path / f"meta_{step:06d}.json").write_text(json.dumps({"step": step, "model_config": shape}))
    return tmp_path, theirs  # pyright: ignore[reportPossiblyUnboundVariable]


def test_nanochat(nanochat: tuple[Path, transformers.PreTrainedModel]) -> None:
    folder, theirs = nanochat
    assert_same(folder, theirs, folder)


def test_nanochats_last_step_is_the_highest(nanochat: tuple[Path, transformers.PreTrainedModel]) -> None:
    """Of files that nanochat wrote, whatever lies beside them; steps may have more digits than it pads them to."""
    folder, theirs = nanochat
    for kind in ("model_{}.pt", "meta_{}.json"):
        (folder / kind.format("000100")).rename(folder / kind.format("999999"))
        (folder / kind.format("000650")).rename(folder / kind.format("1000000"))
    (folder / "model_2000000_backup.pt").touch()
    assert_same(folder, theirs, folder)


def test_nanochats_tokenizer_in_its_own_place(tmp_path: Path) -> None:
    """BASE/tokenizer, of checkpoints in BASE/base_checkpoints/d20."""
    folder = tmp_path / "base_checkpoints" / "d20"
    folder.mkdir(parents=True)
    write_nanochat(folder, "000001", {"transformer.wte.weight": torch.zeros(1, 1)})
    (tmp_path / "tokenizer").mkdir()
    theirs = write_tokenizer(tmp_path / "tokenizer")
    assert read_published(folder).tokenizer().encode(TEXT) == theirs.encode(TEXT).ids


def write_nanochat(folder: Path, step: str, state: dict[str, Tensor], **changes: Any) -> None:
    """A checkpoint as nanochat writes it."""
    shape = {"sequence_len": 64, "vocab_size": 50, "n_layer": 2, "n_head": 4, "n_kv_head": 2, "n_embd": 32}
    torch.save(state, folder / f"model_{step}.pt")
    (folder / f"meta_{step}.json").write_text(json.dumps({"model_config": shape | changes}))


def nanochat_logits(state: dict[str, Tensor], ids_T: Tensor) -> Tensor:
    """The formulas of https://github.com/karpathy/nanochat, nanochat/gpt.py of October 2025; 4 heads, 2 of keys."""

    def norm(x: Tensor) -> Tensor:
        return F.rms_norm(x, (x.shape[-1],))

    def rotated(x_THE: Tensor) -> Tensor:
        left, right = x_THE.chunk(2, -1)
        angle = torch.arange(len(x_THE)).outer(1e4 ** -(torch.arange(4) / 4)).unsqueeze(1)
        return torch.cat((left * angle.cos() + right * angle.sin(), right * angle.cos() - left * angle.sin()), -1)

    x_TD = norm(state["transformer.wte.weight"][ids_T])
    for layer in range(2):
        block = {name.split(".", 3)[3]: w for name, w in state.items() if name.startswith(f"transformer.h.{layer}.")}
        q, k, v = (F.linear(norm(x_TD), block[f"attn.c_{x}.weight"]).unflatten(-1, (-1, 8)) for x in "qkv")
        q, k = norm(rotated(q)), norm(rotated(k))
        q, k, v = (x.transpose(0, 1) for x in (q, k, v))
        seen = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        x_TD = x_TD + F.linear(seen.transpose(0, 1).flatten(1), block["attn.c_proj.weight"])
        x_TD = x_TD + F.linear(F.relu(F.linear(norm(x_TD), block["mlp.c_fc.weight"])) ** 2, block["mlp.c_proj.weight"])
    return 15 * torch.tanh(F.linear(norm(x_TD), state["lm_head.weight"]) / 15)


@torch.no_grad()
def test_nanochats_own_formulas(tmp_path: Path) -> None:
    """Small embeddings, on which its norms' epsilon shows: transformers' 1e-6 is 3e-3 off here."""
    write_tokenizer(tmp_path)
    torch.manual_seed(0)
    shapes = {"attn.c_q": (32, 32), "attn.c_k": (16, 32), "attn.c_v": (16, 32), "attn.c_proj": (32, 32)}
    shapes |= {"mlp.c_fc": (128, 32), "mlp.c_proj": (32, 128)}
    state = {"transformer.wte.weight": 0.02 * torch.randn(50, 32), "lm_head.weight": torch.randn(50, 32) / 32**0.5}
    for layer in range(2):
        for name, shape in shapes.items():
            state[f"transformer.h.{layer}.{name}.weight"] = torch.randn(shape) / shape[1] ** 0.5
    write_nanochat(tmp_path, "000001", state)
    ids_T = torch.randint(50, (20,))
    ours = build(read_published(tmp_path))
    torch.testing.assert_close(ours.logits(ours(ids_T[None]))[0], nanochat_logits(state, ids_T), atol=1e-4, rtol=0)


def test_a_later_nanochat(tmp_path: Path) -> None:
    write_nanochat(tmp_path, "000001", {}, window_pattern="SSSL")
    with pytest.raises(UserError, match=r"meta_000001.json: model_config has window_pattern: later versions"):
        read_published(tmp_path)


def test_nanochats_pickled_tokenizer_is_not_read(nanochat: tuple[Path, transformers.PreTrainedModel]) -> None:
    folder, _ = nanochat
    (folder / "tokenizer.json").unlink()
    published = read_published(folder)
    with pytest.raises(UserError, match=r"as a pickle, which is not read: put the tokenizer.json"):
        published.tokenizer()


def test_nanochat_without_its_shape(nanochat: tuple[Path, transformers.PreTrainedModel]) -> None:
    folder, _ = nanochat
    (folder / "meta_000650.json").write_text(json.dumps({"model_config": {"n_layer": 2}}))
    with pytest.raises(UserError, match=r"meta_000650.json: model_config must hold sequence_len, vocab_size"):
        read_published(folder)


class NotTensors:
    """What a pickle must not bring in."""


def damage_shard(folder: Path) -> None:
    sorted(folder.glob("*.safetensors"))[0].unlink()


def damage_index(folder: Path) -> None:
    index = folder / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["model.extra.weight"] = sorted(content["weight_map"].values())[0]
    index.write_text(json.dumps(content))


def damage_map(folder: Path) -> None:
    (folder / "model.safetensors.index.json").write_text("{}")


def only_a_pickle(content: Any) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        for file in folder.glob("*.safetensors*"):
            file.unlink()
        torch.save(content, folder / "pytorch_model.bin")

    return damage


def broken_pickle(folder: Path) -> None:
    """What is no longer a storage's key; torch ends in a bare KeyError."""
    only_a_pickle({"x": torch.ones(1)})(folder)
    file = folder / "pytorch_model.bin"
    content = file.read_bytes()
    assert b"FloatStorage" in content
    file.write_bytes(content.replace(b"FloatStorage", b"FlootStorage"))


def cut_short(folder: Path) -> None:
    file = sorted(folder.glob("*.safetensors"))[0]
    file.write_bytes(file.read_bytes()[:-100])


def no_weights(folder: Path) -> None:
    for file in folder.glob("*.safetensors*"):
        file.unlink()


def another_tokenizer(folder: Path) -> None:
    """More tokens than the table has rows."""
    tensors = load_file(folder / "model.safetensors")
    rows = {n: t[:200] if n in ("model.embed_tokens.weight", "lm_head.weight") else t for n, t in tensors.items()}
    save_file({name: tensor.contiguous() for name, tensor in rows.items()}, folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"vocab_size": 200}))


DAMAGES: dict[str, tuple[str, Callable[[Path], None], str]] = {
    "a shard is missing": ("20KB", damage_shard, "names shards that are not there: model-00001-of"),
    "a shard lacks a tensor": (
        "20KB",
        damage_index,
        "lacks model.extra.weight, which model.safetensors.index.json says",
    ),
    "an index without a map": ("20KB", damage_map, "lacks weight_map"),
    "a pickle of something else": ("5GB", only_a_pickle({"x": NotTensors()}), "not plain tensors"),
    "a pickle without names": ("5GB", only_a_pickle({1: torch.ones(1)}), "not a state dict"),
    "a pickle that is broken": ("5GB", broken_pickle, "not plain tensors"),
    "a pickle of numbers": ("5GB", only_a_pickle({"x": 3}), "not a state dict"),
    "a file cut short": ("5GB", cut_short, "not a whole safetensors file"),
    "no weights": ("5GB", no_weights, "holds no weights; it needs model.safetensors"),
    "another tokenizer": ("5GB", another_tokenizer, "they are not of one model"),
}


@pytest.mark.parametrize("what", DAMAGES)
def test_what_is_broken_is_named(what: str, tmp_path: Path) -> None:
    size, damage, message = DAMAGES[what]
    write_folder(tmp_path, max_shard_size=size)
    damage(tmp_path)
    with pytest.raises(UserError) as error:
        load_pretrained(tmp_path)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("source", ["./nothing", "model.gguf", "a/model.gguf", "a/b/c"])
def test_what_is_nothing(source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=rf"init_from={source}: must be a folder .* a hub id"):
        load_pretrained(source, key="init_from")


@torch.no_grad()
@pytest.mark.parametrize("kept", ["lm_head.weight", "transformer.wte.weight"])
@pytest.mark.parametrize(
    "prefix", ["", "module.", "_orig_mod.", "module._orig_mod.", "model.", "_fsdp_wrapped_module."]
)
def test_tied_weights_and_wrapped_names(kept: str, prefix: str, tmp_path: Path) -> None:
    n_vocab = write_tokenizer(tmp_path).get_vocab_size()
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=n_vocab, n_embd=32, n_layer=2, n_head=2, n_positions=64)
    theirs = transformers.GPT2LMHeadModel(config).eval()
    theirs.config.save_pretrained(tmp_path)
    both = ("lm_head.weight", "transformer.wte.weight")
    state = {f"{prefix}{n}": x for n, x in theirs.state_dict().items() if n == kept or n not in both}
    torch.save({"state_dict": state, "epoch": 3}, tmp_path / "pytorch_model.bin")
    assert_same(tmp_path, theirs, tmp_path)


QUANTISED: dict[str, Callable[[Path], None]] = {
    "bitsandbytes": lambda folder: write_config(folder, quantization_config={"quant_method": "bitsandbytes"}),
    "gptq": lambda folder: write_config(folder, quantization_config={"quant_method": "gptq", "bits": 4}),
    "without a word in the configuration": lambda folder: change_tensors(folder, ".q_proj.qweight"),
    "packed": lambda folder: change_tensors(folder, ".q_proj.weight"),
}


def write_config(folder: Path, **changes: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def change_tensors(folder: Path, name: str) -> None:
    tensors = load_file(folder / "model.safetensors")
    prefix = "model.layers.0.self_attn"
    tensors.pop(f"{prefix}.q_proj.weight")
    save_file(tensors | {f"{prefix}{name}": torch.zeros(16, 4, dtype=torch.uint8)}, folder / "model.safetensors")


@pytest.mark.parametrize("how", QUANTISED)
def test_what_is_quantised_is_called_that(how: str, tmp_path: Path) -> None:
    write_folder(tmp_path)
    QUANTISED[how](tmp_path)
    with pytest.raises(UserError, match=r"is quantised \(.*which is not read; give the weights"):
        load_pretrained(tmp_path)


def test_names_that_do_not_fit_are_three_and_a_number(tmp_path: Path) -> None:
    write_folder(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    save_file({f"x.{name}": tensor for name, tensor in tensors.items()}, tmp_path / "model.safetensors")
    with pytest.raises(UserError) as error:
        load_pretrained(tmp_path)
    text = str(error.value)
    assert f"and {len(tensors) - 3} more" in text
    assert text.count("layers.") <= 6
    assert len(text) < 700


def test_a_hub_id_without_an_owner(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """gpt2; of before safetensors, too."""
    import huggingface_hub.constants as constants

    revision = "0123456789abcdef0123456789abcdef01234567"
    folder = tmp_path / "models--gpt2" / "snapshots" / revision
    theirs = write_folder(folder)
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    (tmp_path / "models--gpt2" / "refs").mkdir()
    (tmp_path / "models--gpt2" / "refs" / "main").write_text(revision)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert_same("gpt2", theirs, folder)


def test_an_empty_configuration(tmp_path: Path) -> None:
    (tmp_path / "config.json").touch()
    with pytest.raises(UserError, match=r"config.json: is empty.* read by python -m simcot_latent.import_checkpoint"):
        load_pretrained(tmp_path)


def test_an_empty_folder(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"holds no model; it needs config.json"):
        load_pretrained(tmp_path)
