"""The numbers of the public Coconut, SIM-CoT and CODI code, in `tests/reference` (its README.md says which).

Tiny GPT-2s with random weights. Rows that are padded on the left there are packed here; what stands on padding is not
compared.

Shapes: B rows, T positions of a padded row, K thoughts, G step groups, D width, M labels.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from simcot_latent.batches import ThoughtBatch
from simcot_latent.config import DecoderConfig, LatentConfig, LossConfig, MethodConfig, RunConfig
from simcot_latent.data.format import Example, untagged
from simcot_latent.interop.conversion import build
from simcot_latent.loops.base import Thoughts, go_on
from simcot_latent.loops.sequential import Sequential, SequentialConfig
from simcot_latent.method import Method
from simcot_latent.model.gpt import GPT
from simcot_latent.model.packing import Packing, take
from simcot_latent.terms.step_decoder import StepBatch, StepDecoder, StepDecoderTerm

END, START, END_OF_THOUGHT, THOUGHT, NEWLINE = 124, 125, 126, 127, 12


@dataclass(frozen=True)
class PublishedModel:
    """What `build` takes."""

    path: Path
    config: dict[str, Any]
    tensors: dict[str, Tensor]


@dataclass(frozen=True)
class Fixtures:
    """What the folder holds."""

    folder: Path
    facts: dict[str, Any]

    def tensors(self, name: str) -> dict[str, Tensor]:
        return load_file(self.folder / f"{name}.safetensors")

    def model(self, weights: str = "weights_base", **config: Any) -> GPT:
        """A GPT-2 as published files would have it."""
        config = {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]} | self.facts["config"] | config
        return build(PublishedModel(self.folder, config, self.tensors(weights)))


@pytest.fixture(scope="module")
def fixtures(reference: Path) -> Fixtures:
    return Fixtures(reference, json.loads((reference / "fixtures.json").read_text(encoding="utf-8")))


def assert_close(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def assert_same_gradients(module: torch.nn.Module, gradients: dict[str, Tensor]) -> None:
    """The gradient of every parameter to 1e-5 of its largest number (the loss of steps makes them large)."""
    assert gradients.keys() == dict(module.named_parameters()).keys()
    for name, gradient in gradients.items():
        ours, scale = module.get_parameter(name).grad, max(1.0, gradient.abs().max().item())
        assert ours is not None, name
        torch.testing.assert_close(
            ours, gradient, atol=1e-5 * scale, rtol=1e-5, msg=lambda text, n=name: f"{n}: {text}"
        )


def unpadded(ids_BT: Tensor, mask_BT: Tensor) -> list[list[int]]:
    return [ids_T[mask_T.bool()].tolist() for ids_T, mask_T in zip(ids_BT, mask_BT, strict=True)]


def flat(rows: Sequence[Sequence[int]]) -> Tensor:
    return torch.tensor([i for row in rows for i in row])


def think_about(
    model: GPT, questions: Sequence[Sequence[int]], n_states: int, loop: Sequential | None = None
) -> Thoughts:
    """All states that a loop comes to; None: one without a projector, that feeds them all."""
    loop, counts = loop or Sequential(model.config.n_embd, SequentialConfig()), [n_states] * len(questions)
    packing = loop.pack_questions([len(question) - 1 for question in questions], counts)
    ids_P = torch.cat(
        (flat([question[:-1] for question in questions]), flat([question[-1:] for question in questions]))
    )
    return loop.think(model, model.embedding(ids_P), packing, counts, room=5)


def answer_logits(model: GPT, thoughts: Thoughts, texts_BT: Tensor) -> Tensor:
    """Logits (B, T, V) at what follows the thoughts."""
    B, T = texts_BT.shape
    packing = Packing.of([T] * B) if thoughts.unread_RD is None else Packing.of([1] * B, [T] * B)
    return model.logits(go_on(model, thoughts, model.embedding(texts_BT.flatten()), packing)).unflatten(0, (B, T))


# A plain forward


def test_gpt2(fixtures: Fixtures) -> None:
    model, expected = fixtures.model(), fixtures.tensors("gpt2_plain")
    ids_BT = expected["input_ids"]
    positions_T = torch.arange(ids_BT.shape[1])
    states: list[Tensor] = []

    def keep(block: torch.nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        states.extend((inputs[0], output))

    model.transformer.blocks[0].register_forward_hook(keep)
    hidden_BTD = model(ids_BT)
    embed_PD, block0_PD = states
    assert model.transformer.positions is not None
    assert_close(model.embedding(ids_BT) + model.transformer.positions(positions_T), expected["hidden_embed"])
    assert_close(embed_PD.view_as(hidden_BTD), expected["hidden_embed"])
    assert_close(block0_PD.view_as(hidden_BTD), expected["hidden_block0"])
    assert_close(hidden_BTD, expected["hidden_last_after_ln_f"])
    assert_close(model.logits(hidden_BTD), expected["logits"])


def test_gpt2_on_rows_of_different_lengths(fixtures: Fixtures) -> None:
    model, expected = fixtures.model(), fixtures.tensors("gpt2_plain")
    mask_BT = expected["pad_attention_mask"]
    rows = unpadded(expected["pad_input_ids"], mask_BT)
    assert [len(row) for row in rows] == fixtures.facts["files"]["gpt2_plain.safetensors"]["real_lengths"]
    logits_PV = model.logits(model(flat(rows), Packing.of(list(map(len, rows)))))
    assert_close(logits_PV, expected["pad_logits"][mask_BT.bool()])


# Coconut


def test_coconut(fixtures: Fixtures, from_hf_gpt2: Callable[..., dict[str, Tensor]]) -> None:
    """Thoughts, the input embeddings of whole rows, their logits, the loss and all gradients."""
    model, expected = fixtures.model(), fixtures.tensors("coconut_final_stage")
    ids_BT, mask_BT, labels_BT = expected["input_ids"], expected["attention_mask"].bool(), expected["labels"]
    is_thought_T = ids_BT[0] == THOUGHT  # thoughts stand in the same place in all rows
    first, last = is_thought_T.nonzero()[[0, -1], 0].tolist()
    questions = unpadded(ids_BT[:, :first], mask_BT[:, :first])
    assert [len(question) for question in questions] == [10, 7, 13], "ragged, or packing proves nothing"

    thoughts = think_about(model, questions, last + 1 - first)
    logits_BAV = answer_logits(model, thoughts, ids_BT[:, last + 1 :])
    assert_close(thoughts.latents, expected["latent_vectors"])
    assert_close(logits_BAV, expected["logits"][:, last + 1 :])

    # The whole rows in one pass, thoughts in their places.
    embeds_BTD = model.embedding(ids_BT)
    embeds_BTD = torch.cat((embeds_BTD[:, :first], thoughts.latents, embeds_BTD[:, last + 1 :]), dim=1)
    assert_close(embeds_BTD[mask_BT], expected["inputs_embeds"][mask_BT])
    hidden_PD = model.transformer(embeds_BTD[mask_BT], Packing.of(mask_BT.sum(1).tolist()))
    assert_close(model.logits(hidden_PD), expected["logits"][mask_BT])

    method = make_method(model, step_decoder=None)
    batch = collate(method, [(question, [], text[1:]) for question, text in zip(
        questions, ids_BT[:, last + 1 :].tolist(), strict=True)])  # fmt: skip
    assert batch.targets.label_M.tolist() == labels_BT[labels_BT != -100].tolist()
    shares = method(batch, batch.totals)
    assert_close(shares["loss"], expected["loss"][0])
    shares["loss"].backward()
    assert_same_gradients(model, from_hf_gpt2(expected, prefix="grad.base."))


# SIM-CoT on Coconut


@dataclass(frozen=True)
class FixtureTokenizer:
    """The ids of the fixtures; what a method asks of a tokenizer."""

    bot_id: int = START
    eot_id: int = END_OF_THOUGHT
    end_id: int = END

    def encode(self, text: str) -> list[int]:
        assert text == "\n"
        return [NEWLINE]


def make_method(model: GPT, step_decoder: StepDecoder | None) -> Method:
    """2 groups of 2 thoughts as the public code trains them, with this decoder or with none."""
    config = MethodConfig.simcot(
        LatentConfig(n_latents=4, latents_per_step=2, surplus="merge", missing="answer", warmup=0.0, stages=0),
        DecoderConfig(),
        LossConfig(answer_weight=1.0, step_weight=0.0 if step_decoder is None else 1.0, step_reduction="coconut"),
    )
    run = RunConfig(mode="", model={}, data={}, tokenizer={}, rationale="equations")
    method = Method(model, FixtureTokenizer(), run, config)  # type: ignore[arg-type]
    if step_decoder is not None:
        term = method.terms["step"]
        assert isinstance(term, StepDecoderTerm)
        method.step_decoder = term.decoder = step_decoder
    return method


def collate(method: Method, samples: Sequence[tuple[list[int], list[list[int]], list[int]]]) -> ThoughtBatch:
    """Questions that end in the token before the thoughts, steps without a newline, answers with their end token."""
    examples = [
        Example(question, untagged([]), list(map(untagged, steps)), untagged(answer))
        for question, steps, answer in samples
    ]
    batch = method.collate(examples, method.last_stage)
    assert isinstance(batch, ThoughtBatch)
    return batch


def published_decoder(fixtures: Fixtures, base: GPT) -> StepDecoder:
    """It reads the base's embeddings and has an output head of its own, tied to a table that nothing is read from.

    Its positions start at 1: the first row of its position table is not used.
    """
    theirs = fixtures.model("weights_decoder125", vocab_size=125)
    config = replace(theirs.config, tie_head=False, context_length=theirs.config.context_length - 1)
    state = theirs.transformer.state_dict()
    state["positions.weight"] = state["positions.weight"][1:]
    decoder = StepDecoder(config, base.embedding)
    decoder.transformer.load_state_dict(state)
    assert decoder.head is not None
    decoder.head.load_state_dict({"weight": theirs.embedding.weight})
    return decoder


def test_simcot(fixtures: Fixtures, from_hf_gpt2: Callable[..., dict[str, Tensor]]) -> None:
    """Both losses, what the decoder says in each group and what it was to say, gradients of base and decoder."""
    model, expected = fixtures.model(), fixtures.tensors("simcot_final_stage")
    decoder = published_decoder(fixtures, model)
    method = make_method(model, decoder)
    samples = [
        (
            [*sample["question_tokenized"], START],
            [step[:-1] for step in sample["steps_tokenized"] if step[-1] == NEWLINE],
            sample["answer_tokenized"],
        )
        for sample in fixtures.facts["samples"]
    ]
    assert [len(steps) for _, steps, _ in samples] == [2, 1, 4]
    batch = collate(method, samples)

    # Each group's labels and logits.
    is_label = [expected[f"thought{group}.shifted_labels"] != -100 for group in range(2)]
    labels = [expected[f"thought{g}.shifted_labels"][row][is_label[g][row]] for row in range(3) for g in range(2)]
    of_steps = batch.terms["step"]
    assert isinstance(of_steps, StepBatch)
    steps = of_steps.steps
    by_group_M = steps.group_M.argsort(stable=True)
    assert_close(steps.label_M[by_group_M], torch.cat(labels))
    thoughts = think_about(model, [question for question, _, _ in samples], 4)
    groups_NCD = thoughts.latents.unflatten(1, (2, 2)).flatten(0, 1)
    steps_LD = model.embedding(steps.ids_L)
    logits_MV = decoder.logits(decoder(take(groups_NCD, of_steps.row_N), steps_LD, steps.packing))
    logits = [expected[f"thought{g}.logits"][row, :-1][is_label[g][row]] for row in range(3) for g in range(2)]
    assert_close(logits_MV[by_group_M], torch.cat(logits))
    texts_BT = torch.tensor([[END_OF_THOUGHT, *answer] for _, _, answer in samples])
    assert_close(answer_logits(model, thoughts, texts_BT), expected["logits"][:, -texts_BT.shape[1] :])
    for group in range(2):
        assert_close(thoughts.latents[:, 2 * group :][:, :2], expected[f"thought{group}.inputs_embeds"][:, :2])
    nll_M = torch.nn.functional.cross_entropy(logits_MV, steps.label_M, reduction="none")
    ce_sum_G = torch.zeros(2).index_add(0, of_steps.group_M, nll_M)
    for group in range(2):
        torch.testing.assert_close(ce_sum_G[group], expected[f"thought{group}.ce_sum"][0], atol=1e-4, rtol=1e-5)
        assert batch.totals["group_problems_G"][group] == expected[f"thought{group}.n_samples_with_labels"].item()

    shares = method(batch, batch.totals)
    assert_close(shares["answer_loss"], expected["loss_main"][0])
    assert_close(shares["step_loss"], expected["loss_explain"][0])
    assert_close(shares["loss"], expected["loss_total"][0])

    shares["loss"].backward()
    assert_same_gradients(model, from_hf_gpt2(expected, prefix="grad.base."))
    gradients = from_hf_gpt2(expected, prefix="grad.decoder.")
    gradients["head.weight"] = gradients.pop("embedding.weight")
    unused, gradients["transformer.positions.weight"] = gradients["transformer.positions.weight"].split((1, 127))
    assert unused.count_nonzero() == 0, "their decoder reads no position 0"
    del decoder.embedding  # the base's
    assert_same_gradients(decoder, gradients)


# CODI


@pytest.mark.parametrize("projector", [False, True], ids=["noprj", "prj"])
def test_codi(fixtures: Fixtures, projector: bool) -> None:
    """Six thoughts that are fed and a seventh that is not, with a projector and without."""
    model, expected = fixtures.model(), fixtures.tensors("codi")
    name = "masked.prj" if projector else "masked.noprj"
    weights = fixtures.tensors("weights_codi_prj") if projector else {}
    width = len(weights["1.weight"]) if projector else None
    loop = Sequential(model.config.n_embd, SequentialConfig(feeds_last=False, projector_width=width))
    parts = {"1": "up", "3": "down", "ln": "norm"}
    ours = {f"{parts[their.split('.')[0]]}.{their.split('.')[1]}": tensor for their, tensor in weights.items()}
    loop.load_state_dict({f"projector.{key}": tensor for key, tensor in ours.items()})

    mask_BT = expected["attention_mask"]
    questions = unpadded(expected["input_ids"], mask_BT)
    logits_PV = model.logits(model(flat(questions), Packing.of(list(map(len, questions)))))
    assert_close(logits_PV, expected["masked.noprj.question_logits"][mask_BT.bool()])
    thoughts = think_about(model, questions, loop.states(6), loop)
    assert_close(thoughts.latents[:, :6], expected[f"{name}.latents"])
    assert_close(thoughts.latents[:, 6:], expected[f"{name}.seventh_latent_not_fed"])
    assert_close(answer_logits(model, thoughts, expected["answer_ids"]), expected[f"{name}.answer_logits"])
