"""python -m simcot_latent.export: what it writes is the same model and the same tokenizer to `transformers`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import Outcome, contents, run
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from simcot_latent.checkpoint import Checkpoint, TrainerState, load_checkpoint, read_json
from simcot_latent.curricula.base import Stage
from simcot_latent.data.format import AnswerFormat
from simcot_latent.data.tokenizer import Tokenizer
from simcot_latent.generate import generate_all
from simcot_latent.loops.sequential import Sequential, SequentialConfig
from simcot_latent.model.gpt import GPT
from simcot_latent.terms.step_decoder import StepDecoder
from simcot_latent.terms.steps import StepGroups
from simcot_latent.training.saving import save_checkpoint

EXPORT = "simcot_latent.export"

LLAMA = {"norm_eps": 1e-6, "rope_base": 500_000.0}
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("gpt2", {}),
    "llama": ("llama", LLAMA),
    "llama tied": ("llama", LLAMA | {"tie_head": True, "n_kv_head": 1}),
    "qwen2": ("llama", {"qkv_bias": True, "tie_head": True}),
    "nanochat": ("nanochat", {"embedding_norm": True, "norm_eps": 1e-6, "tie_head": False}),
    "tiny": (
        "llama",
        {"norm": "layernorm", "activation": "gelu", "n_kv_head": None, "ffn_width": None, "tie_head": True},
    ),
}
"""By the family that `transformers` has for it: a family of the `make_model` fixture, and changes."""
CLASSES = {
    "gpt2": "GPT2LMHeadModel",
    "llama": "LlamaForCausalLM",
    "llama tied": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "nanochat": "NanoChatForCausalLM",
    "tiny": "Starcoder2ForCausalLM",
}

TEXTS = [
    "Ann has 3 bags of 4 pears, eats 2 and gives $1.50 away. <<3*4=12>> <<12-2=10>>\n#### 10",
    "Zoë's 1,234  Äpfel\t(½ ≈ 0.5)\r\n\n  三つ 🍎🍐 e\u0301 don't I'LL",
    " <|end|> <|bot|>",
]


@pytest.fixture
def make_run_folder(
    make_model: Callable[..., GPT], tokenizer: Tokenizer, tmp_path: Path
) -> Callable[..., tuple[Path, Checkpoint]]:
    """`make_run_folder(shape, tokenizer=None, loop=None, **changes)`: an `out_dir` with a checkpoint, and it.

    With settings of a loop, the model thinks.
    """

    def make(
        shape: str = "llama",
        tokenizer: Tokenizer = tokenizer,
        loop: SequentialConfig | None = None,
        **changes: Any,
    ) -> tuple[Path, Checkpoint]:
        family, shape_changes = SHAPES[shape]
        model = make_model(family, vocab_size=tokenizer.n_vocab, **(shape_changes | changes))
        checkpoint = Checkpoint(model, None, tokenizer, {"max_new_tokens": 8})
        if loop is not None:
            checkpoint.step_decoder = StepDecoder.from_base(model, 1, "base").eval()
            checkpoint.loop = Sequential(model.config.n_embd, loop).eval()
            checkpoint.answers, checkpoint.stage = AnswerFormat(thinks=True), Stage(4, first_written=None)
            checkpoint.groups = StepGroups(latents_per_step=2)
        save_checkpoint(checkpoint, tmp_path / "run", TrainerState({}, {}), keep=1)
        return tmp_path / "run", checkpoint

    return make


@pytest.fixture
def qwen(tokenizer: Tokenizer) -> Tokenizer:
    """The default tokenizer's ranks in a tokenizer like Qwen's."""
    pattern = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
        r"|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    special = {"<|endoftext|>": len(tokenizer.ranks), "<|im_end|>": len(tokenizer.ranks) + 1}
    roles = {"end": "<|im_end|>", "pad": "<|endoftext|>"}
    return Tokenizer("qwen", pattern, tokenizer.ranks, special, roles, "NFC")


def names(folder: Path) -> list[str]:
    """What lies in a folder."""
    return sorted(path.name for path in folder.iterdir())


def export(folder: Path, *arguments: str, out: str = "out") -> Outcome:
    return run(EXPORT, f"ckpt={folder}", f"out={out}", *arguments, folder=folder.parent)


def load(folder: Path) -> tuple[Any, dict[str, Any]]:
    """A model of theirs, and what of its weights was missing, left over or of another shape."""
    return AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)  # type: ignore[return-value]


@torch.no_grad()
def logits(model: Any, ids: list[int]) -> Tensor:
    """(T, V), of a model of ours or of theirs."""
    ids_BT = torch.tensor([ids])
    return (model.logits(model(ids_BT)) if isinstance(model, GPT) else model(ids_BT).logits)[0]


def assert_same_ids(folder: Path, tokenizer: Tokenizer, texts: list[str]) -> None:
    theirs = AutoTokenizer.from_pretrained(folder)
    assert len(theirs) == tokenizer.n_vocab
    for text in texts:
        ids = theirs(text, add_special_tokens=False, split_special_tokens=True).input_ids
        assert ids == tokenizer.encode(text)
        assert theirs.decode(ids, clean_up_tokenization_spaces=False) == tokenizer.decode(ids)
    assert theirs.eos_token_id == tokenizer.end_id
    assert theirs.pad_token_id == tokenizer.pad_id
    assert theirs.bos_token_id == tokenizer.bos_id


@pytest.mark.parametrize("shape", SHAPES)
def test_transformers_loads_the_same_model(
    shape: str, make_run_folder: Callable[..., Any], tokenizer: Tokenizer, qwen: Tokenizer, tmp_path: Path
) -> None:
    folder, checkpoint = make_run_folder(shape, qwen if shape == "qwen2" else tokenizer)
    before = contents(folder)
    outcome = export(folder, "format=hf").ok()
    assert outcome.out.startswith(f"{CLASSES[shape]} | ")
    assert len(outcome.out.splitlines()) == 1
    assert contents(folder) == before
    assert names(tmp_path) == ["out", "run"]

    out, tokenizer = tmp_path / "out", checkpoint.tokenizer
    with safe_open(out / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
    theirs, loading = load(out)
    assert type(theirs).__name__ == CLASSES[shape]
    assert not any(loading.values()), loading
    assert theirs.dtype == torch.float32
    ids = (tokenizer.encode("".join(TEXTS)) * 2)[: checkpoint.model.config.context_length]
    assert len(ids) > 100
    torch.testing.assert_close(logits(theirs, ids), logits(checkpoint.model, ids), atol=1e-4, rtol=0)
    assert_same_ids(out, tokenizer, TEXTS)
    for config in (theirs.config, theirs.generation_config):
        assert (config.eos_token_id, config.pad_token_id) == (tokenizer.end_id, tokenizer.pad_id)
        assert config.bos_token_id is None

    assert read_json(out / "generation_config.json") == {
        "bos_token_id": None,
        "eos_token_id": tokenizer.end_id,
        "pad_token_id": tokenizer.pad_id,
    }

    prompt = "What is 12 * 3?"
    (generation,) = generate_all(checkpoint, [prompt], batch_size=1)
    ids = tokenizer.encode(f"{prompt}\n")
    written = theirs.generate(torch.tensor([ids]), max_new_tokens=8, do_sample=False)[0, len(ids) :].tolist()
    assert tokenizer.decode(written) == generation.text


def test_a_qwen2_with_another_tokenizer(make_run_folder: Callable[..., Any], tmp_path: Path) -> None:
    """`AutoTokenizer` goes by the model type there; what the command says instead holds."""
    folder, checkpoint = make_run_folder("qwen2")
    assert "load it with transformers.PreTrainedTokenizerFast.from_pretrained" in export(folder).ok().out
    theirs = PreTrainedTokenizerFast.from_pretrained(tmp_path / "out")
    for text in TEXTS:
        assert theirs(text, split_special_tokens=True).input_ids == checkpoint.tokenizer.encode(text)


def test_gpt2s_tokenizer_and_one_with_a_bos(
    gpt2: Tokenizer, make_run_folder: Callable[..., Any], tmp_path: Path
) -> None:
    tokenizer = gpt2.with_roles({"bos": "<|endoftext|>"})
    folder, checkpoint = make_run_folder("gpt2", tokenizer, n_embd=8, n_layer=1)
    export(folder).ok()
    assert_same_ids(tmp_path / "out", tokenizer, TEXTS)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert theirs.config.bos_token_id == theirs.generation_config.bos_token_id == tokenizer.bos_id
    ids = AutoTokenizer.from_pretrained(tmp_path / "out")(TEXTS[0]).input_ids
    assert ids == [tokenizer.bos_id, *tokenizer.encode(TEXTS[0])]
    torch.testing.assert_close(logits(theirs, ids), logits(checkpoint.model, ids), atol=1e-4, rtol=0)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_weights_of_fewer_bits(dtype: str, make_run_folder: Callable[..., Any], tmp_path: Path) -> None:
    folder, _ = make_run_folder("llama")
    export(folder).ok()
    export(folder, f"dtype={dtype}", out="half").ok()
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "half")
    assert theirs.dtype == getattr(torch, dtype)
    assert read_json(tmp_path / "half" / "config.json")["torch_dtype"] == dtype
    whole, half = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "half"))
    assert whole.keys() == half.keys()
    for name, value in half.items():
        assert torch.equal(value, whole[name].to(getattr(torch, dtype)))


def test_shards(make_run_folder: Callable[..., Any], tmp_path: Path) -> None:
    """Two tables of 262 kB and 62 kB of blocks, in files of at most 270 kB."""
    folder, checkpoint = make_run_folder("llama")
    export(folder, "max_shard_gb=0.00027").ok()
    out = tmp_path / "out"
    index = read_json(out / "model.safetensors.index.json")
    files = sorted(out.glob("*.safetensors"))
    assert len(files) == 3
    assert set(index["weight_map"].values()) == {file.name for file in files}
    for file in files:
        tensors = load_file(file)
        assert sum(value.nbytes for value in tensors.values()) <= 270_000
        assert all(index["weight_map"][name] == file.name for name in tensors)
    theirs = AutoModelForCausalLM.from_pretrained(out)
    ids = checkpoint.tokenizer.encode(TEXTS[0])
    torch.testing.assert_close(logits(theirs, ids), logits(checkpoint.model, ids), atol=1e-4, rtol=0)


def test_what_is_left_out_is_said(make_run_folder: Callable[..., Any], tmp_path: Path) -> None:
    folder, checkpoint = make_run_folder("llama", loop=SequentialConfig(projector_width=16))
    outcome = export(folder).ok()
    _, said = outcome.out.splitlines()
    assert said.startswith("left out, since LlamaForCausalLM has no place for it: ")
    for part in ("auxiliary decoder", "projector", "4 thoughts"):
        assert part in said
    assert str((folder / "latest").resolve()) in said
    theirs, loading = load(tmp_path / "out")
    assert not any(loading.values()), loading
    ids = checkpoint.tokenizer.encode(TEXTS[0])
    torch.testing.assert_close(logits(theirs, ids), logits(checkpoint.model, ids), atol=1e-4, rtol=0)


def test_an_empty_folder_and_one_in_new_folders_are_taken(make_run_folder: Callable[..., Any], tmp_path: Path) -> None:
    folder, _ = make_run_folder()
    (tmp_path / "out").mkdir()
    (tmp_path / ".out.partial").mkdir()  # as an export that was killed leaves it
    (tmp_path / ".out.partial" / "old").touch()
    export(folder).ok()
    export(folder, out="a/b").ok()
    assert contents(tmp_path / "out") == contents(tmp_path / "a" / "b")
    assert names(tmp_path) == ["a", "out", "run"]


# --- mistakes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_folder", [True, False])
def test_what_is_there_is_not_written_over(
    is_folder: bool, make_run_folder: Callable[..., Any], tmp_path: Path
) -> None:
    folder, _ = make_run_folder()
    if is_folder:
        (tmp_path / "out").mkdir()
    file = tmp_path / "out" / "mine" if is_folder else tmp_path / "out"
    file.write_text("mine")
    before = contents(tmp_path)
    assert f"out={tmp_path / 'out'}: is there already" in export(folder).error
    assert contents(tmp_path) == before


def test_a_shape_that_no_family_has(make_run_folder: Callable[..., Any], tmp_path: Path) -> None:
    folder, _ = make_run_folder(norm="rmsnorm", activation="gelu", positions="learned")
    message = export(folder).error
    assert "no published family is like this model" in message
    assert names(tmp_path) == ["run"]


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("format=gguf", "format=gguf: must be one of hf"),
        ("dtype=int8", "dtype=int8: must be one of float32, bfloat16, float16"),
        ("max_shard_gb=0", "max_shard_gb=0.0: must be above 0"),
        ("max_shard_gb=inf", "max_shard_gb=inf: must be above 0, finite"),
        ("shards=2", "shards"),
        ("out=null", "out is missing"),
        ("ckpt=null", "ckpt is missing"),
        ("ckpt=nowhere", "ckpt=nowhere: is no folder"),
    ],
)
def test_mistakes_in_the_command(
    argument: str, message: str, make_run_folder: Callable[..., Any], tmp_path: Path
) -> None:
    folder, _ = make_run_folder()
    assert message in export(folder, argument).error
    assert names(tmp_path) == ["run"]


def test_a_checkpoint_that_is_broken(make_run_folder: Callable[..., Any], tmp_path: Path) -> None:
    folder, _ = make_run_folder()
    (folder / "latest" / "model.safetensors").write_bytes(b"no")
    assert "model.safetensors: is not the file" in export(folder).error
    assert "model.safetensors: not a whole safetensors file" in export(folder, "verify=false").error
    assert names(tmp_path) == ["run"]


def test_the_exported_folder_comes_back(make_run_folder: Callable[..., Any], tmp_path: Path) -> None:
    """`init_from=` takes what was exported."""
    from simcot_latent.interop.pretrained import load_pretrained

    folder, _ = make_run_folder("qwen2")
    export(folder).ok()
    ours, back = load_checkpoint(folder), load_pretrained(tmp_path / "out")
    assert back.model.config == ours.model.config
    for name, value in ours.model.state_dict().items():
        assert torch.equal(value, back.model.state_dict()[name])
    assert [back.tokenizer.encode(text) for text in TEXTS] == [ours.tokenizer.encode(text) for text in TEXTS]
