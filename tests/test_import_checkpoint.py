"""Published checkpoints, imported: against loops on `transformers` that think as the public code does.

Files are built here in each layout, from tiny random models: Coconut and CODI, each with SIM-CoT's decoder and without,
GPT-2 and Llama. LoRA is written out by hand, and left unmerged in the reference.

Shapes: B questions, K thoughts, D width, V vocabulary.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer as HFTokenizer
from tokenizers import decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from simcot_latent.checkpoint import Checkpoint
from simcot_latent.data.format import encode_problem
from simcot_latent.data.problem import Problem, parse_steps
from simcot_latent.errors import UserError
from simcot_latent.generate import encode_prompts, generate_all, think_about
from simcot_latent.interop.imported import KINDS, import_checkpoint
from simcot_latent.loops.base import go_on
from simcot_latent.loops.sequential import Sequential
from simcot_latent.probing.thoughts import decode_steps, gold_groups, think
from simcot_latent.terms.step_decoder import PackedSteps

QUESTIONS = [
    "Ann has 3 bags of 4 pears and eats 2. How many are left?",
    "Half of 9?",
    "Joe saves $5 a day for a week and buys a $12 book. What is left of it?",
]
STEPS = ["<<3*4=12>>", "<<12-2=10>>", "<<10/2=5>>"]
ADDED = 3
RANK, ALPHA = 4, 12.0


@dataclass
class Base:
    """A model that published ones are made from, as a folder in Hugging Face's layout."""

    folder: Path
    family: str
    tokenizer: HFTokenizer
    end_id: int

    @property
    def vocab_size(self) -> int:
        return self.tokenizer.get_vocab_size()

    def ids(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def model(self, vocab_size: int, seed: int) -> Any:
        """Random weights in which every parameter matters."""
        shape: dict[str, Any] = {"vocab_size": vocab_size, "bos_token_id": self.end_id, "eos_token_id": self.end_id}
        if self.family == "gpt2":
            config = GPT2Config(n_embd=32, n_layer=2, n_head=2, n_positions=96, **shape)
            model: Any = GPT2LMHeadModel(config)
        else:
            model = LlamaForCausalLM(
                LlamaConfig(
                    hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
                    num_key_value_heads=2, max_position_embeddings=96, tie_word_embeddings=self.family == "llama-tied",
                    **shape,
                )
            )  # fmt: skip
        generator = torch.Generator().manual_seed(seed)
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() == 1:
                parameter.data = 0.2 * noise + (0.0 if name.endswith("bias") else 1.0)
            else:
                parameter.data = noise * (0.5 if parameter.shape[0] >= 100 else 0.18)
        return model.eval()


@pytest.fixture(scope="module", params=["gpt2", "llama", "llama-tied"])
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Base:
    return make_base(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def gpt2_base(tmp_path_factory: pytest.TempPathFactory) -> Base:
    return make_base("gpt2", tmp_path_factory.mktemp("only-gpt2"))


def make_base(family: str, folder: Path) -> Base:
    tokenizer = HFTokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    texts = [*QUESTIONS, *STEPS, "### 18\n", "The answer is: 18"] * 4
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=320, initial_alphabet=alphabet, special_tokens=[], show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_special_tokens(["<|endoftext|>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|endoftext|>"}))
    end_id = tokenizer.get_vocab()["<|endoftext|>"]
    made = Base(folder, family, tokenizer, end_id)
    made.model(made.vocab_size, seed=9).save_pretrained(folder)
    return made


# What is published


@dataclass
class Published:
    """A model as its authors hold it in memory.

    Attributes:
        lora: the factors of each linear layer, by the layer's name.
        heads: the decoder and the projector, where there are any.
    """

    kind: str
    base: Base
    model: Any
    decoder: Any = None
    projector: nn.Sequential | None = None
    lora: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)

    @property
    def is_codi(self) -> bool:
        return self.kind.endswith("codi")

    @property
    def start_id(self) -> int:
        return self.base.vocab_size + (1 if self.is_codi else 0)

    @property
    def end_of_thought_id(self) -> int:
        return self.start_id + 1

    def state_dict(self) -> dict[str, Tensor]:
        """What their `state_dict()` gives, tied weights under each of their names."""
        if not self.is_codi:
            state = {f"base_causallm.{name}": x for name, x in self.model.state_dict().items()}
            state["embedding.weight"] = self.model.get_input_embeddings().weight.data
            decoder = "expainable_llm"
        else:
            state = dict(self.peft_state_dict())
            decoder = "decoder"
        if self.decoder is not None:
            state |= {f"{decoder}.{name}": x for name, x in self.decoder.state_dict().items()}
        if self.projector is not None:
            state |= {f"prj.{name}": x for name, x in self.projector.state_dict().items()}
        return state

    def peft_state_dict(self) -> Iterator[tuple[str, Tensor]]:
        for name, x in self.model.state_dict().items():
            module, _, kind = name.rpartition(".")
            yield f"codi.base_model.model.{module}.{'base_layer.' if module in self.lora else ''}{kind}", x
        for module, (a, b) in self.lora.items():
            yield f"codi.base_model.model.{module}.lora_A.default.weight", a
            yield f"codi.base_model.model.{module}.lora_B.default.weight", b

    @contextmanager
    def adapted(self) -> Iterator[None]:
        """LoRA as a detour beside each layer: y + alpha / rank * (x A^T) B^T."""
        handles = []
        for name, (a, b) in self.lora.items():

            def add(module: nn.Module, inputs: tuple[Tensor], output: Tensor, a: Tensor = a, b: Tensor = b) -> Tensor:
                return output + ALPHA / RANK * (inputs[0] @ a.T) @ b.T

            handles.append(self.model.get_submodule(name).register_forward_hook(add))
        yield
        for handle in handles:
            handle.remove()


def publish(kind: str, base: Base, *, projector: bool = True) -> Published:
    """Random weights of a kind; of CODI with LoRA on all linear layers of the blocks."""
    model = base.model(base.vocab_size + ADDED, seed=11)
    made = Published(kind, base, model)
    if kind.startswith("simcot"):
        made.decoder = base.model(base.vocab_size, seed=2)
    if kind.endswith("codi"):
        torch.manual_seed(5)
        width = model.config.hidden_size
        for name, module in model.named_modules():
            if (".h." in name or ".layers." in name) and getattr(module, "weight", torch.empty(0)).dim() == 2:
                weight = module.weight.T if base.family == "gpt2" else module.weight  # (out, in)
                made.lora[name] = (0.1 * torch.randn(RANK, weight.shape[1]), 0.1 * torch.randn(len(weight), RANK))
        if projector:
            norm = nn.LayerNorm(width)
            norm.weight.data += 0.1 * torch.randn(width)
            norm.bias.data += 0.1 * torch.randn(width)
            made.projector = nn.Sequential(nn.Dropout(0.0), nn.Linear(width, 24), nn.GELU(), nn.Linear(24, width))
            made.projector.add_module("ln", norm)
    return made


# How the public code thinks, word by word: no cache, one question at a time


@dataclass
class Thought:
    """What the reference makes of a question: thoughts (K, D), logits (V) after them, and the answer's ids."""

    latents_KD: Tensor
    logits_V: Tensor
    answer: list[int]


@torch.no_grad()
def reference(published: Published, question: str, fed: int, max_new_tokens: int) -> Thought:
    base, model = published.base, published.model
    table = model.get_input_embeddings()

    def read(vectors: list[Tensor]) -> Tensor:
        return model.base_model(inputs_embeds=torch.stack(vectors).unsqueeze(0)).last_hidden_state[0, -1]

    def thought(hidden_D: Tensor) -> Tensor:
        return hidden_D if published.projector is None else published.projector(hidden_D)

    def embed(token: int) -> Tensor:
        return table(torch.tensor(token))

    prompt = base.ids(question) if published.is_codi else base.ids(question + "\n")
    with published.adapted():
        vectors = [embed(token) for token in [*prompt, published.start_id]]
        latents = [thought(read(vectors))]
        for _ in range(fed if published.is_codi else fed - 1):
            vectors.append(latents[-1])
            latents.append(thought(read(vectors)))
        if not published.is_codi:
            vectors.append(latents[-1])
        vectors.append(embed(published.end_of_thought_id))
        logits_V = model.lm_head(read(vectors))
        first, answer = logits_V, []
        while True:
            best, second = logits_V.topk(2).values.tolist()
            assert best - second > 1e-3, "too close to call: take another seed"
            answer.append(int(logits_V.argmax()))
            if answer[-1] == base.end_id or len(answer) == max_new_tokens:
                return Thought(torch.stack(latents), first, answer)
            vectors.append(embed(answer[-1]))
            logits_V = model.lm_head(read(vectors))


@torch.no_grad()
def decoder_logits(published: Published, prefix_CD: Tensor, ids: list[int]) -> Tensor:
    """What their decoder predicts from the last thought of a group on: it reads the base's table."""
    assert published.decoder is not None
    table = published.model.get_input_embeddings()
    x = torch.cat((prefix_CD, table(torch.tensor(ids, dtype=torch.long)))).unsqueeze(0)
    first = 0 if published.is_codi else 1
    positions = torch.arange(first, first + x.shape[1]).unsqueeze(0)
    return published.decoder(inputs_embeds=x, position_ids=positions).logits[0, len(prefix_CD) - 1 :]


def save(published: Published, file: Path) -> Path:
    torch.save(published.state_dict(), file)
    return file


def imported(published: Published, source: Path, **options: Any) -> Checkpoint:
    return import_checkpoint(source, published.kind, published.base.folder, lora_alpha=ALPHA, **options)


def assert_close(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


# Models


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_thinks_and_answers_as_published(kind: str, base: Base, tmp_path: Path) -> None:
    published = publish(kind, base)
    fed, c = (6, 1) if published.is_codi else (10, 2)
    checkpoint = imported(published, save(published, tmp_path / "checkpoint_28"))
    loop, n_latents = checkpoint.loop, checkpoint.stage.thoughts
    assert isinstance(loop, Sequential)
    assert n_latents == (6 if published.is_codi else 10), "as the papers count them"
    assert checkpoint.n_states == (7 if published.is_codi else 10)
    assert checkpoint.groups.latents_per_step == c
    assert checkpoint.model.config.vocab_size == checkpoint.tokenizer.n_vocab == base.vocab_size + 3

    expected = [reference(published, question, fed, 12) for question in QUESTIONS]
    prompts = encode_prompts(checkpoint, QUESTIONS)
    state = think_about(checkpoint, prompts, room=1)
    assert_close(state.latents, torch.stack([row.latents_KD for row in expected]))
    eot_BD = checkpoint.model.embedding(torch.full((3,), checkpoint.tokenizer.eot_id))
    hidden_BD = go_on(checkpoint.model, state, eot_BD, loop.pack_texts([1] * 3, [checkpoint.n_states] * 3))
    assert_close(checkpoint.model.logits(hidden_BD), torch.stack([row.logits_V for row in expected]))

    answers = generate_all(checkpoint, QUESTIONS, batch_size=3, max_new_tokens=12)
    for row, answer in zip(expected, answers, strict=True):
        assert answer.text == base.tokenizer.decode(row.answer)
        assert answer.n_tokens == n_latents + len(row.answer)
        assert answer.finished == (row.answer[-1] == base.end_id)
    assert len({answer.text for answer in answers}) == 3, "the same answer to every question would prove little"


@pytest.mark.parametrize("kind", ["simcot_coconut", "simcot_codi"])
@torch.no_grad()
def test_the_decoder_says_as_published(kind: str, base: Base, tmp_path: Path) -> None:
    """Teacher-forced on steps, and free-running."""
    published = publish(kind, base)
    checkpoint = imported(published, save(published, tmp_path / "model.bin"))
    decoder, c = checkpoint.step_decoder, checkpoint.groups.latents_per_step
    assert decoder is not None
    latents_BKD = think(checkpoint, QUESTIONS).latents
    groups_NCD = latents_BKD.unflatten(1, (-1, c)).flatten(0, 1)
    assert len(groups_NCD) == 3 * (7 if published.is_codi else 5)

    texts = [base.ids(step) for step in STEPS]
    steps = PackedSteps.of(texts, base.end_id, c)
    logits_MV = decoder.logits(decoder(groups_NCD[:3], decoder.embedding(steps.ids_L), steps.packing))
    by_group_M = steps.group_M.argsort(stable=True)
    theirs = [decoder_logits(published, group_CD, ids) for group_CD, ids in zip(groups_NCD, texts, strict=False)]
    assert_close(logits_MV[by_group_M], torch.cat(theirs))

    said = [text for groups in decode_steps(checkpoint, latents_BKD) for text in groups][:5]
    for group_CD, text in zip(groups_NCD, said, strict=False):
        ids: list[int] = []
        while len(ids) < 15 and base.end_id not in ids:
            ids.append(int(decoder_logits(published, group_CD, ids)[-1].argmax()))
        start = base.tokenizer.decode(ids)
        assert text == start if base.end_id in ids else text.startswith(start.rstrip("\ufffd"))
    assert len(set(said)) > 1


def test_codi_without_a_projector_or_lora(gpt2_base: Base, tmp_path: Path) -> None:
    """Its `prj` is left out, and the model is not wrapped."""
    published = publish("codi", gpt2_base, projector=False)
    published.lora.clear()
    state = {name.replace("codi.base_model.model.", "codi."): x for name, x in published.state_dict().items()}
    assert "codi.transformer.wte.weight" in state
    torch.save(state, tmp_path / "model.pt")
    checkpoint = imported(published, tmp_path / "model.pt")
    assert isinstance(checkpoint.loop, Sequential)
    assert checkpoint.loop.projector is None
    expected = reference(published, QUESTIONS[0], 6, 1)
    assert_close(think(checkpoint, QUESTIONS[:1]).latents[0], expected.latents_KD)


def test_modules_that_peft_has_copied(gpt2_base: Base, tmp_path: Path) -> None:
    """`modules_to_save`: the copy is what was trained."""
    published = publish("codi", gpt2_base)
    state = published.state_dict()
    name = "codi.base_model.model.transformer.wte"
    state[f"{name}.modules_to_save.default.weight"] = state.pop(f"{name}.weight")
    state[f"{name}.original_module.weight"] = torch.zeros(3)
    torch.save(state, tmp_path / "model.pt")
    checkpoint = imported(published, tmp_path / "model.pt")
    assert torch.equal(checkpoint.model.embedding.weight, published.model.get_input_embeddings().weight)


def test_lora_weighs_alpha_over_rank(gpt2_base: Base, tmp_path: Path) -> None:
    published = publish("codi", gpt2_base)
    file = save(published, tmp_path / "model.bin")
    name = "transformer.h.1.mlp.c_fc"
    a, b = published.lora[name]
    weight = published.model.get_submodule(name).weight
    for alpha in (32.0, 5.0):
        checkpoint = import_checkpoint(file, "codi", gpt2_base.folder, lora_alpha=alpha)
        merged = weight + (alpha / RANK * b @ a).T
        assert_close(checkpoint.model.get_parameter("transformer.blocks.1.mlp.up.weight"), merged.T)
    default = import_checkpoint(file, "codi", gpt2_base.folder).model.state_dict()
    again = import_checkpoint(file, "codi", gpt2_base.folder, lora_alpha=32.0).model.state_dict()
    assert all(torch.equal(default[key], again[key]) for key in again)


def test_weights_in_bfloat16(gpt2_base: Base, tmp_path: Path) -> None:
    """As CODI is published; they are merged in float32."""
    published = publish("simcot_codi", gpt2_base)
    assert published.decoder is not None
    assert published.projector is not None
    for module in (published.model, published.decoder, published.projector):
        module.to(torch.bfloat16)
    published.lora = {name: (a.bfloat16(), b.bfloat16()) for name, (a, b) in published.lora.items()}
    checkpoint = imported(published, save(published, tmp_path / "model.bin"))
    assert {p.dtype for p in checkpoint.model.parameters()} == {torch.float32}
    for module in (published.model, published.decoder, published.projector):
        module.float()
    published.lora = {name: (a.float(), b.float()) for name, (a, b) in published.lora.items()}
    assert_close(think(checkpoint, QUESTIONS[:1]).latents[0], reference(published, QUESTIONS[0], 6, 1).latents_KD)


def test_a_shallower_decoder_and_a_grown_table(gpt2_base: Base, tmp_path: Path) -> None:
    published = publish("simcot_coconut", gpt2_base)
    published.decoder = gpt2_base.model(gpt2_base.vocab_size + ADDED, seed=4)
    state = {
        name: x for name, x in published.state_dict().items() if not name.startswith("expainable_llm.transformer.h.1.")
    }
    torch.save(state, tmp_path / "model.bin")
    checkpoint = imported(published, tmp_path / "model.bin")
    assert checkpoint.step_decoder is not None
    assert checkpoint.step_decoder.config.n_layer == 1
    published.decoder.transformer.h = published.decoder.transformer.h[:1]
    group_NCD = torch.randn(1, 2, 32)
    steps = PackedSteps.of([gpt2_base.ids(STEPS[0])], gpt2_base.end_id, 2)
    with torch.no_grad():
        hidden_MD = checkpoint.step_decoder(group_NCD, checkpoint.model.embedding(steps.ids_L), steps.packing)
        logits_MV = checkpoint.step_decoder.logits(hidden_MD)
    assert_close(logits_MV, decoder_logits(published, group_NCD[0], gpt2_base.ids(STEPS[0])))


# What the file cannot tell


def test_numbers_of_thoughts(gpt2_base: Base, tmp_path: Path) -> None:
    coconut, codi = publish("coconut", gpt2_base), publish("codi", gpt2_base)
    files = save(coconut, tmp_path / "coconut.pt"), save(codi, tmp_path / "codi.pt")
    for published, file, fed, c, K in ((coconut, files[0], 6, 3, 6), (codi, files[1], 5, 2, 6)):
        checkpoint = imported(published, file, n_latents=fed, latents_per_step=c)
        assert checkpoint.stage.thoughts == fed
        assert checkpoint.n_states == K
        assert checkpoint.n_groups == K // c
        expected = reference(published, QUESTIONS[0], fed, 8)
        assert_close(think(checkpoint, QUESTIONS[:1]).latents[0], expected.latents_KD)
        (answer,) = generate_all(checkpoint, QUESTIONS[:1], 1, 8)
        assert answer.text == gpt2_base.tokenizer.decode(expected.answer)
        with pytest.raises(UserError, match=r"n_latents=5.* must make whole groups of latents_per_step=4"):
            imported(published, file, n_latents=5, latents_per_step=4)


@pytest.mark.parametrize("kind", KINDS)
def test_prompts_and_special_tokens(kind: str, gpt2_base: Base, tmp_path: Path) -> None:
    published = publish(kind, gpt2_base)
    checkpoint = imported(published, save(published, tmp_path / "model.bin"))
    tokenizer, V = checkpoint.tokenizer, gpt2_base.vocab_size
    assert tokenizer.end_id == gpt2_base.end_id
    problem = Problem(QUESTIONS[1], parse_steps("<<9/2=4.5>>")[0], "<<9/2=4.5>>", "4.5")
    assert checkpoint.answers.thinks
    example = encode_problem(tokenizer, problem, checkpoint.answers, "equations")
    if published.is_codi:
        assert (tokenizer.bot_id, tokenizer.eot_id) == (V + 1, V + 2)
        assert example.question == [*gpt2_base.ids(QUESTIONS[1]), V + 1]
        assert example.answer.ids == [*gpt2_base.ids("The answer is: 4.5"), gpt2_base.end_id]
    else:
        assert [tokenizer.token_id(f"<|{name}|>") for name in ("start-latent", "end-latent", "latent")] == [
            V,
            V + 1,
            V + 2,
        ]
        assert (tokenizer.bot_id, tokenizer.eot_id) == (V, V + 1)
        assert example.question == [*gpt2_base.ids(QUESTIONS[1] + "\n"), V]
        assert example.answer.ids == [*gpt2_base.ids("### 4.5"), gpt2_base.end_id]
    steps = [f"<<{i}+1={i + 1}>>" for i in range(1, 10)]
    problem = Problem("?", parse_steps(" ".join(steps[:2]))[0], " ".join(steps[:2]), "3")
    gold = gold_groups(checkpoint, problem)
    # The public code of CODI leaves the last step out.
    assert gold == ([steps[0], *[None] * 6] if published.is_codi else [*steps[:2], *["### 3"] * 3])
    problem = Problem("?", parse_steps(" ".join(steps))[0], " ".join(steps), "10")
    gold = gold_groups(checkpoint, problem)
    assert gold[-1] == "\n".join(steps[6:8] if published.is_codi else steps[4:])


# Files


@pytest.mark.parametrize(
    "layout",
    [
        "x.safetensors",
        "x.bin",
        "x.pt",
        "checkpoint_28",
        "folder/model.safetensors",
        "folder/pytorch_model.bin",
        "folder/model.safetensors in shards",
        "folder/pytorch_model.bin in shards",
    ],
)
def test_files_and_folders(layout: str, gpt2_base: Base, tmp_path: Path) -> None:
    published = publish("simcot_coconut", gpt2_base)
    state = {name: x.clone() for name, x in published.state_dict().items()}
    file = tmp_path / layout.removesuffix(" in shards")
    file.parent.mkdir(exist_ok=True)
    write = save_file if file.suffix == ".safetensors" else torch.save
    if file.name == layout.rpartition("/")[2]:
        write(state, file)
    else:
        weight_map: dict[str, str] = {}
        for n in range(3):
            part = dict(list(state.items())[n::3])
            shard = f"{file.stem}-{n + 1:05}-of-00003{file.suffix}"
            write(part, file.with_name(shard))
            weight_map |= dict.fromkeys(part, shard)
        file.with_name(f"{file.name}.index.json").write_text(json.dumps({"weight_map": weight_map}))
    source = file.parent if "folder" in layout else file
    checkpoint = imported(published, source)
    assert torch.equal(checkpoint.model.embedding.weight, state["base_causallm.transformer.wte.weight"])
    assert checkpoint.step_decoder is not None
    assert checkpoint.step_decoder.config.n_layer == 2


def test_tied_weights_under_either_name(gpt2_base: Base, tmp_path: Path) -> None:
    """safetensors keeps one name of weights that share their memory; which one is not the model's choice."""
    for kind, tied in {
        "simcot_coconut": ("base_causallm.transformer.wte", "base_causallm.lm_head", "embedding"),
        "simcot_codi": ("codi.base_model.model.transformer.wte", "codi.base_model.model.lm_head"),
    }.items():
        published = publish(kind, gpt2_base)
        state = published.state_dict()
        expected = imported(published, save(published, tmp_path / "all.pt"))
        decoder = "decoder" if published.is_codi else "expainable_llm"
        for kept in tied:
            for kept_of_decoder in ("transformer.wte", "lm_head"):
                dropped = {f"{name}.weight" for name in tied if name != kept}
                dropped |= {f"{decoder}.{name}.weight" for name in ("transformer.wte", "lm_head")}
                dropped -= {f"{decoder}.{kept_of_decoder}.weight"}
                assert dropped <= state.keys()
                torch.save({name: x for name, x in state.items() if name not in dropped}, tmp_path / "one.pt")
                found = imported(published, tmp_path / "one.pt")
                assert_same_weights(found, expected)


def assert_same_weights(found: Checkpoint, expected: Checkpoint) -> None:
    parts = ("model", "loop", "step_decoder")
    pairs: list[tuple[Any, Any]] = [(getattr(found, part), getattr(expected, part)) for part in parts]
    assert [ours is None for ours, _ in pairs] == [theirs is None for _, theirs in pairs]
    for ours, theirs in ((ours, theirs) for ours, theirs in pairs if ours is not None):
        state, wanted = ours.state_dict(), theirs.state_dict()
        assert state.keys() == wanted.keys()
        assert all(torch.equal(state[name], wanted[name]) for name in wanted)


WRAPPED: dict[str, Callable[[str], str]] = {
    "DDP": lambda name: f"module.{name}",
    "compiled": lambda name: f"_orig_mod.{name}",
    "DDP of a compiled one": lambda name: f"module._orig_mod.{name}",
    "FSDP, every block": lambda name: f"_fsdp_wrapped_module.{name}".replace(".h.0.", ".h.0._fsdp_wrapped_module."),
    "a wrapped base": lambda name: name.replace("base_causallm.", "base_causallm.module._orig_mod."),
    "checkpointed blocks": lambda name: name.replace(".h.1.", ".h.1._checkpoint_wrapped_module."),
}


@pytest.mark.parametrize("how", WRAPPED)
@pytest.mark.parametrize("under", ["", "state_dict", "model", "model state_dict"])
def test_what_wrappers_leave_in_names(how: str, under: str, gpt2_base: Base, tmp_path: Path) -> None:
    published = publish("simcot_coconut", gpt2_base)
    expected = imported(published, save(published, tmp_path / "plain.pt"))
    content: Any = {WRAPPED[how](name): x for name, x in published.state_dict().items()}
    assert content.keys() != published.state_dict().keys()
    for key in reversed(under.split()):
        content = {"epoch": 3, "optimizer": {"state": {}}, key: content}
    torch.save(content, tmp_path / "wrapped.pt")
    assert_same_weights(imported(published, tmp_path / "wrapped.pt"), expected)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("prefix", ["model.", "net.", "trainer.model."])
def test_an_attribute_of_a_trainers_in_names(kind: str, prefix: str, gpt2_base: Base, tmp_path: Path) -> None:
    published = publish(kind, gpt2_base)
    expected = imported(published, save(published, tmp_path / "plain.pt"))
    state = {prefix + name: x for name, x in published.state_dict().items()}
    torch.save({"state_dict": state}, tmp_path / "x.ckpt")
    assert_same_weights(imported(published, tmp_path / "x.ckpt"), expected)
    state[f"{prefix}loss.weight"] = torch.ones(1)
    message = error_of(state, tmp_path / "x.ckpt", kind, gpt2_base.folder)
    assert f"has {prefix}loss.weight, which kind={kind} has not" in message


def test_two_weights_of_one_name(gpt2_base: Base, tmp_path: Path) -> None:
    state = publish("coconut", gpt2_base).state_dict()
    name = "base_causallm.transformer.ln_f.bias"
    state[f"module.{name}"] = state[name].clone()
    torch.save(state, tmp_path / "x.pt")
    import_checkpoint(tmp_path / "x.pt", "coconut", gpt2_base.folder)  # the same one: no harm
    state[f"module.{name}"] += 1
    message = error_of(state, tmp_path / "x.pt", "coconut", gpt2_base.folder)
    assert f"holds {name} twice" in message


@pytest.mark.parametrize("empty", ["", "{}", None])
def test_a_folder_as_simcots_repositories_are(empty: str | None, gpt2_base: Base, tmp_path: Path) -> None:
    """One file without a suffix beside an empty configuration, and what else lies in repositories."""
    published = publish("simcot_coconut", gpt2_base)
    folder = tmp_path / "repository"
    folder.mkdir()
    save(published, folder / "checkpoint_34")
    for name in ("README.md", "LICENSE", ".gitattributes"):
        (folder / name).write_text("text")
    torch.save({"step": 3}, folder / "optimizer.pt")
    if empty is not None:
        (folder / "config.json").write_text(empty)
    assert imported(published, folder).step_decoder is not None
    save(published, folder / "checkpoint_35")
    with pytest.raises(UserError, match="holds several files of tensors: checkpoint_34, checkpoint_35; give one"):
        imported(published, folder)


def test_shards_without_an_index(gpt2_base: Base, tmp_path: Path) -> None:
    published = publish("simcot_coconut", gpt2_base)
    state = list(published.state_dict().items())
    for n in range(3):
        save_file({name: x.clone() for name, x in state[n::3]}, tmp_path / f"model-{n + 1:05}-of-00003.safetensors")
    assert imported(published, tmp_path).step_decoder is not None
    (tmp_path / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(UserError, match="2 shards of 3 are there; all are needed"):
        imported(published, tmp_path)


def test_safetensors_without_a_suffix(gpt2_base: Base, tmp_path: Path) -> None:
    published = publish("coconut", gpt2_base)
    save_file({name: x.clone() for name, x in published.state_dict().items()}, tmp_path / "checkpoint_3")
    imported(published, tmp_path / "checkpoint_3")


def test_a_repository_on_the_hub(gpt2_base: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub.constants as constants

    revision = "0123456789abcdef0123456789abcdef01234567"
    cached = tmp_path / "hub" / "models--someone--SIM_CoT-GPT2-Coconut"
    folder = cached / "snapshots" / revision
    folder.mkdir(parents=True)
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text(revision)
    published = publish("simcot_coconut", gpt2_base)
    save(published, folder / "checkpoint_34")
    (folder / "config.json").touch()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.chdir(tmp_path)
    checkpoint = import_checkpoint("someone/SIM_CoT-GPT2-Coconut", "simcot_coconut", gpt2_base.folder)
    assert checkpoint.step_decoder is not None
    with pytest.raises(UserError, match=r"source=someone/else: is no file or folder here, and as a hub id cannot be"):
        import_checkpoint("someone/else", "simcot_coconut", gpt2_base.folder)


@pytest.mark.parametrize("rows", ["base", "with the added tokens"])
def test_coconuts_stage_0(rows: str, gpt2_base: Base, tmp_path: Path) -> None:
    """Saved before there is any thought: the model by itself, which writes its steps."""
    V = gpt2_base.vocab_size + (ADDED if rows != "base" else 0)
    theirs = gpt2_base.model(V, seed=3)
    torch.save({f"module.{name}": x for name, x in theirs.state_dict().items()}, tmp_path / "checkpoint_3")
    checkpoint = import_checkpoint(tmp_path / "checkpoint_3", "coconut", gpt2_base.folder)
    assert (checkpoint.stage.thoughts, checkpoint.loop, checkpoint.step_decoder) == (0, None, None)
    assert not checkpoint.answers.thinks
    assert checkpoint.tokenizer.n_vocab == checkpoint.model.config.vocab_size == V
    ids = gpt2_base.ids(f"{QUESTIONS[1]}\n")
    assert encode_prompts(checkpoint, QUESTIONS[1:2]) == [ids]
    expected = theirs.generate(torch.tensor([ids]), do_sample=False, max_new_tokens=8, eos_token_id=gpt2_base.end_id,
                               pad_token_id=gpt2_base.end_id)[0, len(ids):].tolist()  # fmt: skip
    (answer,) = generate_all(checkpoint, QUESTIONS[1:2], 1, 8)
    assert answer.text == gpt2_base.tokenizer.decode([i for i in expected if i != gpt2_base.end_id])
    problem = Problem(QUESTIONS[1], parse_steps("<<9/2=4.5>>")[0], "<<9/2=4.5>>", "4.5")
    example = encode_problem(checkpoint.tokenizer, problem, checkpoint.answers, "equations")
    written = [*example.question, *example.rationale.ids, *example.answer.ids]
    assert checkpoint.tokenizer.decode(written[:-1]) == f"{QUESTIONS[1]}\n<<9/2=4.5>>\n### 4.5"
    assert checkpoint.config["rationale"] == "equations", "evals score the steps that it writes"
    with pytest.raises(UserError, match="is of stage 0, whose model writes its steps; leave n_latents out"):
        import_checkpoint(tmp_path / "checkpoint_3", "coconut", gpt2_base.folder, n_latents=2)


# What is wrong


def drop(state: dict[str, Tensor], *ends: str) -> None:
    for name in [name for name in state if name.endswith(ends)]:
        del state[name]


Change = Callable[[dict[str, Tensor]], object]
C_FC = "transformer.h.0.mlp.c_fc"


def error_of(state: Mapping[str, Any], file: Path, kind: str, base: Path) -> str:
    torch.save(dict(state), file)
    with pytest.raises(UserError) as caught:
        import_checkpoint(file, kind, base)
    message = str(caught.value)
    assert "\n" not in message
    assert str(file) in message
    return message


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("given", KINDS)
def test_another_kind_is_named(kind: str, given: str, gpt2_base: Base, tmp_path: Path) -> None:
    if kind != given:
        message = error_of(publish(kind, gpt2_base).state_dict(), tmp_path / "x.pt", given, gpt2_base.folder)
        assert message.endswith(f"that is kind={kind}")
        assert f"kind={given}: " in message


def test_no_kind_at_all(gpt2_base: Base, tmp_path: Path) -> None:
    state = {"lm_head.weight": torch.ones(1), "encoder.weight": torch.ones(1)}
    message = error_of(state, tmp_path / "x.pt", "coconut", gpt2_base.folder)
    assert "begin with encoder, lm_head; no such kind is known" in message
    state = gpt2_base.model(gpt2_base.vocab_size, 1).state_dict()
    message = error_of(state, tmp_path / "x.pt", "codi", gpt2_base.folder)
    assert "begin with lm_head, transformer; that is kind=coconut, of its stage 0" in message


@pytest.mark.parametrize(
    ("kind", "change", "says"),
    [
        ("coconut", lambda s: s.pop("base_causallm.transformer.h.1.ln_2.bias"), ["lacks transformer.h.1.ln_2.bias"]),
        ("coconut", lambda s: drop(s, "wte.weight", "lm_head.weight", "embedding.weight"), ["lacks transformer.wte.w"]),
        ("coconut", lambda s: drop(s, "h.0.ln_1.bias", "h.0.ln_2.bias", "h.1.ln_1.bias", "h.1.ln_2.bias", "ln_f.bias"),
         ["lacks transformer.", "and 2 more"]),
        ("coconut", lambda s: s.update({f"base_causallm.extra.{i}": torch.ones(1) for i in range(9)}),
         ["has extra.0, extra.1, extra.2 and 6 more, which a gpt2 has not"]),
        ("coconut", lambda s: s.update({"base_causallm.transformer.h.0.mlp.c_fc.qweight": torch.ones(1)}),
         ["is quantised (base_causallm.transformer.h.0.mlp.c_fc.qweight)"]),
        ("codi", lambda s: s.update({f"codi.base_model.model.{C_FC}.base_layer.weight": torch.arange(9)}),
         ["is quantised", C_FC]),
        ("coconut", lambda s: s.update({"base_causallm.what": torch.ones(1)}), ["what", "which a gpt2 has not"]),
        ("coconut", lambda s: s.update({"value_head.weight": torch.ones(1)}), ["value_head.weight", "kind=coconut"]),
        ("coconut", lambda s: s.update({"base_causallm.transformer.h.0.mlp.c_fc.weight": torch.ones(3, 4)}),
         ["transformer.h.0.mlp.c_fc.weight", "(3, 4)"]),
        ("simcot_coconut", lambda s: s.pop("expainable_llm.transformer.ln_f.bias"),
         ["expainable_llm", "lacks transformer.ln_f.bias"]),
        ("codi", lambda s: s.pop(f"codi.base_model.model.{C_FC}.lora_B.default.weight"),
         [f"{C_FC}.lora_A.default.weight", "no lora_B"]),
        ("codi", lambda s: s.pop(f"codi.base_model.model.{C_FC}.lora_A.default.weight"),
         [f"has {C_FC}.lora_B.default.weight"]),
        ("codi", lambda s: s.update({f"codi.base_model.model.{C_FC}.lora_A.default.weight": torch.ones(3, 32)}),
         [f"LoRA of {C_FC} does not fit", "(3, 32)", "(128, 4)", "(rank, 32) and (128, rank)"]),
        ("codi", lambda s: s.pop("prj.ln.bias"), ["prj.1.weight", "prj.ln.bias", "LayerNorm"]),
        ("codi", lambda s: s.update({"prj.3.weight": torch.ones(31, 24)}), ["projector", "width 32"]),
        ("simcot_codi", lambda s: s.update({"pj_in.weight": torch.ones(3, 4)}),
         ["pj_in", "another width or vocabulary"]),
        ("simcot_codi", lambda s: s.update({"decoder.transformer.wpe.weight": torch.ones(3, 4)}),
         ["decoder", "transformer.wpe.weight", "(3, 4)"]),
    ],
)  # fmt: skip
def test_wrong_tensors_are_named(kind: str, change: Change, says: list[str], gpt2_base: Base, tmp_path: Path) -> None:
    state = publish(kind, gpt2_base).state_dict()
    change(state)
    message = error_of(state, tmp_path / "x.pt", kind, gpt2_base.folder)
    for words in says:
        assert words in message


@pytest.mark.parametrize("value", [math.nan, math.inf, 1e30])
@pytest.mark.parametrize(
    ("kind", "tensor", "named"),
    [
        ("coconut", "base_causallm.transformer.h.1.mlp.c_fc.weight", "blocks.1.mlp.up.weight"),
        ("coconut", "base_causallm.transformer.wpe.weight", "positions"),
        ("simcot_coconut", "expainable_llm.transformer.ln_f.bias", "norm.bias"),
        ("codi", f"codi.base_model.model.{C_FC}.lora_B.default.weight", "mlp.up.weight"),
        ("codi", "prj.1.weight", "projector"),
        ("simcot_codi", "decoder.transformer.h.0.ln_1.weight", "blocks.0.attention_norm.weight"),
    ],
)
def test_weights_that_are_not_finite(
    kind: str, tensor: str, named: str, value: float, gpt2_base: Base, tmp_path: Path
) -> None:
    """One number of one tensor of each part is enough; nothing but nonsense would come of it."""
    state = publish(kind, gpt2_base).state_dict()
    state[tensor] = state[tensor].clone()
    state[tensor].view(-1)[3] = value
    message = error_of(state, tmp_path / "x.pt", kind, gpt2_base.folder)
    assert message.startswith(f"source={tmp_path / 'x.pt'}: ")
    assert named in message
    assert "numbers that are not finite, or over 1e19" in message


def test_another_base(gpt2_base: Base, tmp_path: Path) -> None:
    published = publish("coconut", gpt2_base)
    published.model.resize_token_embeddings(gpt2_base.vocab_size + 5)
    torch.save(published.state_dict(), tmp_path / "x.pt")
    with pytest.raises(
        UserError, match=f"base={gpt2_base.folder}: has 321 tokens and 321 rows, the imported model 323"
    ):
        import_checkpoint(tmp_path / "x.pt", "coconut", gpt2_base.folder)
    with pytest.raises(UserError, match="base=nowhere"):
        import_checkpoint(tmp_path / "x.pt", "coconut", "nowhere")


class Anything:
    """What no state dict holds."""


@pytest.mark.parametrize(
    "value", [{"codi.x": Anything()}, [torch.ones(1)], {"model": {"codi.x": [1]}}, {"codi.x": 1}, "text", {"model": {}}]
)
def test_a_pickle_that_is_not_plain_tensors(value: object, gpt2_base: Base, tmp_path: Path) -> None:
    torch.save(value, tmp_path / "x.bin")
    with pytest.raises(UserError, match="plain tensors") as caught:
        import_checkpoint(tmp_path / "x.bin", "codi", gpt2_base.folder)
    assert str(tmp_path / "x.bin") in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"hello, world\n" * 20, b"\x80\x02}q\x00(X", b"PK\x03\x04" + bytes(90)])
@pytest.mark.parametrize("name", ["x.bin", "x.safetensors", "x"])
def test_a_broken_file(content: bytes, name: str, gpt2_base: Base, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError) as caught:
        import_checkpoint(tmp_path / name, "codi", gpt2_base.folder)
    assert str(tmp_path / name) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_what_is_not_there(gpt2_base: Base, tmp_path: Path) -> None:
    def message() -> str:
        with pytest.raises(UserError) as caught:
            import_checkpoint(tmp_path / "there", "codi", gpt2_base.folder)
        return str(caught.value)

    folder = tmp_path / "there"
    assert "does not exist" in message()
    folder.mkdir()
    assert "holds no weights" in message()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"codi.x": "model-1.safetensors"}}))
    assert "model-1.safetensors" in message()
