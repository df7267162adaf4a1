"""Training losses of the field's methods against numbers of their public code, in `tests/reference` (its README.md).

Tiny GPT-2s with random weights. Rows that are padded on the left there are packed here; what stands on padding is not
compared.

Shapes: B rows, K states, G step groups, N of the B * G groups that have a target, L tokens of a target, M labels, D
width, V vocabulary.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from simcot_latent.batches import ThoughtBatch
from simcot_latent.checkpoint import Checkpoint
from simcot_latent.config import LatentConfig, LossConfig, MethodConfig, RunConfig
from simcot_latent.data.format import AnswerFormat, Example, concatenate, untagged
from simcot_latent.generate import generate
from simcot_latent.interop.conversion import build
from simcot_latent.interop.imported import step_decoder
from simcot_latent.loops.base import ThoughtLoop
from simcot_latent.loops.compressed import Compressed
from simcot_latent.loops.jacobi import Jacobi
from simcot_latent.loops.looped import Looped
from simcot_latent.method import Method
from simcot_latent.model.gpt import GPT
from simcot_latent.model.packing import take
from simcot_latent.terms.base import Trace
from simcot_latent.terms.compressed import firsts_first
from simcot_latent.terms.keys import importance, non_redundancy, pair_distance_L, select
from simcot_latent.terms.own_head import OwnHead
from simcot_latent.terms.step_decoder import StepBatch, StepDecoderTerm

NEWLINE = 12


@dataclass(frozen=True)
class PublishedModel:
    """What `build` takes."""

    path: Path
    config: dict[str, Any]
    tensors: dict[str, Tensor]


@dataclass(frozen=True)
class FixtureTokenizer:
    """The ids of the fixtures; what a method asks of a tokenizer."""

    bot_id: int
    eot_id: int
    end_id: int = 124
    bos_id: None = None

    def encode(self, text: str) -> list[int]:
        return [NEWLINE] if text == "\n" else [int(word) for word in text.split()]

    def decode(self, ids: list[int]) -> str:
        return " ".join(map(str, ids))


@dataclass(frozen=True)
class Case:
    """One file of reference numbers."""

    folder: Path
    facts: dict[str, Any]
    tensors: dict[str, Tensor]

    @classmethod
    def of(cls, folder: Path, name: str) -> Case:
        facts = json.loads((folder / "fixtures2.json").read_text(encoding="utf-8"))["files"][f"{name}.safetensors"]
        return cls(folder, facts, load_file(folder / f"{name}.safetensors"))

    def model(self, weights: str = "weights_base", **config: Any) -> GPT:
        config = json.loads((self.folder / "fixtures.json").read_text(encoding="utf-8"))["config"] | config
        config = {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]} | config
        return build(PublishedModel(self.folder, config, load_file(self.folder / f"{weights}.safetensors"))).train()

    def projector(self, name: str = "weights_codi_prj") -> dict[str, Tensor]:
        """The weights of a published projector (Linear, GELU, Linear, LayerNorm), by our names."""
        parts = {"1": "up", "3": "down", "ln": "norm"}
        weights = load_file(self.folder / f"{name}.safetensors")
        return {f"projector.{parts[n.split('.')[0]]}.{n.split('.')[1]}": tensor for n, tensor in weights.items()}

    def examples(self, samples: list[dict[str, Any]] | None = None) -> list[Example]:
        """Questions, steps without anything between them, answers of an answer prompt, the number and the end token."""
        prompt = self.facts["answer_prompt"]
        bot = self.facts["token_ids"]["bot"]
        found = []
        for sample in self.facts["samples"] if samples is None else samples:
            steps = [untagged(step) for step in sample["steps_tokenized"]]
            answer = untagged(sample["answer_tokenized"])
            assert answer.ids[: len(prompt)] == prompt
            found.append(Example([*sample["question_tokenized"], bot], concatenate(steps), steps, answer, len(prompt)))
        return found

    def method(self, config: MethodConfig) -> Method:
        run = RunConfig(mode="", model={}, data={}, tokenizer={}, rationale="equations", step_weight_multiplier=1.0)
        ids = self.facts["token_ids"]
        return Method(self.model(), FixtureTokenizer(ids["bot"], ids["eot"]), run, config)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def case(reference: Path) -> Callable[[str], Case]:
    return lambda name: Case.of(reference, name)


def assert_close(ours: Tensor, theirs: Tensor, what: str = "") -> None:
    scale = theirs.abs().max().item()
    torch.testing.assert_close(
        ours, theirs.reshape(ours.shape), atol=1e-5 * scale, rtol=1e-5, msg=lambda text: f"{what}: {text}"
    )


def run_step(method: Method, examples: list[Example]) -> tuple[ThoughtBatch, dict[str, Tensor]]:
    batch = method.collate(examples, method.last_stage)
    assert isinstance(batch, ThoughtBatch)
    shares = method(batch, batch.totals)
    shares["loss"].backward()
    return batch, shares


def run_traced(method: Method, examples: list[Example], term: str) -> tuple[ThoughtBatch, dict[str, Tensor], Trace]:
    """The same, and what the passes showed to a term."""
    traces: list[Trace] = []
    loss = method.terms[term].loss

    def keep_trace(trace: Trace, *rest: Any) -> Any:
        traces.append(trace)
        return loss(trace, *rest)

    method.terms[term].loss = keep_trace  # type: ignore[method-assign]
    batch, shares = run_step(method, examples)
    return batch, shares, traces[0]


def assert_same_answer_logits(method: Method, trace: Trace, examples: list[Example], logits: Tensor) -> None:
    """From the token after the thoughts on; theirs are padded on the right."""
    lengths = [len(example.answer) for example in examples]
    theirs = torch.cat([row[:length] for row, length in zip(logits, lengths, strict=True)])
    assert_close(method.model.logits(trace.hidden_AD), theirs, "answer logits")


def assert_same_teacher_logits(method: Method, trace: Trace, examples: list[Example], logits: Tensor) -> None:
    """Those that predict the written solution; theirs are of the question, too."""
    assert trace.written_MD is not None
    begins = [len(example.question) - 2 for example in examples]  # its last token, without the one for thoughts
    lengths = [len(example.rationale) + len(example.answer) for example in examples]
    theirs = [row[begin : begin + n] for row, begin, n in zip(logits, begins, lengths, strict=True)]
    assert_close(method.model.logits(trace.written_MD), torch.cat(theirs), "teacher logits")


def assert_same_gradients(
    method: Method, expected: dict[str, Tensor], prefix: str, from_hf: Callable[..., dict[str, Tensor]]
) -> None:
    """Of every parameter of the base that they name, and of the projector."""
    ours = from_hf({name.removeprefix(prefix): x for name, x in expected.items() if name.startswith(prefix)})
    assert len(ours) >= 3
    for name, gradient in ours.items():
        found = method.model.get_parameter(name).grad
        assert found is not None, name
        assert_close(found, gradient, name)
    parts = {"1": "up", "3": "down", "ln": "norm"}
    assert isinstance(method.loop, ThoughtLoop)
    for name, gradient in expected.items():
        if name.startswith(f"{prefix}prj."):
            part, kind = name.removeprefix(f"{prefix}prj.").split(".")
            found = method.loop.get_parameter(f"projector.{parts[part]}.{kind}").grad
            assert found is not None, name
            assert_close(found, gradient, name)


def codi(
    n_latents: int = 6, steps: str = "none", answer_weight: float = 1.0, step_weight: float = 1.0, **own: Any
) -> MethodConfig:
    """CODI; with `steps="decoder"` SIM-CoT on CODI."""
    latent = LatentConfig(
        n_latents=n_latents, feeds_last=False, projector_width=48, missing="mask", warmup=0.0, stages=0
    )
    loss = LossConfig(answer_weight=answer_weight, step_weight=step_weight, step_reduction="codi")
    return MethodConfig(
        loop="sequential", steps=steps, written="joint", distill=["hidden"], latent=latent, loss=loss, own=own
    )


ALONE: dict[str, dict[str, Any]] = {
    "ce": {"distill_weight": 0.0, "written_weight": 0.0, "step_weight": 0.0},
    "ref": {"answer_weight": 0.0, "distill_weight": 0.0, "step_weight": 0.0},
    "distill": {"answer_weight": 0.0, "written_weight": 0.0, "step_weight": 0.0},
    "explain": {"answer_weight": 0.0, "written_weight": 0.0, "distill_weight": 0.0},
}
"""Weights that leave one loss."""


@pytest.mark.parametrize("which", ["masked", "row0", "row1", "row2"])
def test_codi(case: Callable[[str], Case], which: str, from_hf_gpt2: Callable[..., dict[str, Tensor]]) -> None:
    """All three losses and their gradients: the batch, and each row as the public code has it alone."""
    codi_case = case("codi_train")
    method = codi_case.method(codi())
    assert method.loop is not None
    method.loop.load_state_dict(codi_case.projector())
    examples = codi_case.examples()
    if which != "masked":
        examples = [examples[int(which[-1])]]
    _, shares = run_step(method, examples)
    expected = codi_case.tensors
    assert_close(shares["answer_loss"], expected[f"{which}.ce"], "answer")
    assert_close(shares["written_loss"], expected[f"{which}.ref_ce"], "written")
    assert_close(shares["distill_loss"], expected[f"{which}.distill"], "distill")
    assert_close(shares["loss"], expected[f"{which}.loss"], "loss")
    if which == "masked":  # of rows alone there are losses only
        assert_same_gradients(method, expected, "masked.grad.", from_hf_gpt2)


@pytest.mark.parametrize("loss", ["ce", "ref", "distill"])
def test_codi_each_loss_alone(
    case: Callable[[str], Case], loss: str, from_hf_gpt2: Callable[..., dict[str, Tensor]]
) -> None:
    """Which gradients each of them has: the teacher has none of the distillation."""
    codi_case = case("codi_train")
    method = codi_case.method(codi(**ALONE[loss]))
    assert method.loop is not None
    method.loop.load_state_dict(codi_case.projector())
    run_step(method, codi_case.examples())
    for parameter in method.parameters():  # the teacher's loss does not reach the projector: zeros there
        parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
    assert_same_gradients(method, codi_case.tensors, f"masked.grad_{loss}.", from_hf_gpt2)


def test_codi_on_the_way(case: Callable[[str], Case]) -> None:
    """Thoughts, logits of student and teacher, and the hidden states that are pulled together."""
    codi_case = case("codi_train")
    method = codi_case.method(codi())
    assert method.loop is not None
    method.loop.load_state_dict(codi_case.projector())
    examples, expected = codi_case.examples(), codi_case.tensors
    _, _, trace = run_traced(method, examples, "distill")
    fed_BKD, unfed_BKD = trace.thoughts.latents.split([6, 1], dim=1)
    assert_close(fed_BKD, expected["masked.latents"], "thoughts")
    assert_close(unfed_BKD, expected["masked.unfed_latent"], "unfed thought")
    assert_same_answer_logits(method, trace, examples, expected["masked.student_logits"])
    assert_same_teacher_logits(method, trace, examples, expected["masked.teacher_logits"])
    assert trace.text_taps is not None
    assert trace.written_taps is not None
    assert_close(trace.text_taps.hidden_LND, expected["masked.student_hidden"], "student")
    assert_close(trace.written_taps.hidden_LND, expected["masked.teacher_hidden"], "teacher")


# SIM-CoT on CODI


def simcot_on_codi(simcot: Case, n_latents: int, **weights: Any) -> Method:
    """With the published decoder, whose positions start at 0, and nothing between merged steps, as published."""
    method = simcot.method(codi(n_latents, "decoder", **weights))
    assert method.loop is not None
    method.loop.load_state_dict(simcot.projector())
    term = method.terms["step"]
    assert isinstance(term, StepDecoderTerm)
    term.newline = untagged([])
    theirs = simcot.model("weights_decoder125", vocab_size=125)
    method.step_decoder = term.decoder = step_decoder(theirs, method.model, first_position=0)
    return method


def simcot_examples(simcot: Case) -> list[Example]:
    """A step ends with its closing mark; the line break after it is written only."""
    assert all(step[-1] == NEWLINE for sample in simcot.facts["samples"] for step in sample["steps_tokenized"])
    return [replace(each, steps=[untagged(step.ids[:-1]) for step in each.steps]) for each in simcot.examples()]


@pytest.mark.parametrize("which", ["fixed", "row0", "row1", "row2", "empty_groups"])
def test_simcot_on_codi(
    case: Callable[[str], Case], which: str, from_hf_gpt2: Callable[..., dict[str, Tensor]]
) -> None:
    """All four losses: of the batch, of each row as the public code has it alone, and of a batch whose last groups
    nobody has a step for; and all gradients of the batch that are given, those of the decoder among them."""
    simcot = case("simcot_codi_train")
    empty = which == "empty_groups"
    method = simcot_on_codi(simcot, simcot.facts["num_latent_empty_groups" if empty else "num_latent"])
    examples = simcot_examples(simcot)
    if which.startswith("row"):
        examples = [examples[int(which[-1])]]
    _, shares = run_step(method, examples)
    expected = simcot.tensors
    assert_close(shares["answer_loss"], expected[f"{which}.ce"], "answer")
    assert_close(shares["written_loss"], expected[f"{which}.ref_ce"], "written")
    assert_close(shares["distill_loss"], expected[f"{which}.distill"], "distill")
    assert_close(shares["step_loss"], expected[f"{which}.explain"], "step")
    assert_close(shares["loss"], expected[f"{which}.loss"], "loss")
    if which != "fixed":  # of the others there are losses only
        return
    assert_same_gradients(method, expected, "fixed.grad.", from_hf_gpt2)
    theirs = from_hf_gpt2(expected, prefix="fixed.grad.decoder.")
    # They read the base's table; their own is their output head.
    theirs["head.weight"] = theirs.pop("embedding.weight")
    assert len(theirs) == sum(name.startswith("fixed.grad.decoder.") for name in expected) == 5
    assert method.step_decoder is not None
    for name, gradient in theirs.items():
        found = method.step_decoder.get_parameter(name).grad
        assert found is not None, name
        assert_close(found, gradient, name)


def test_simcot_on_codi_step_loss_alone(
    case: Callable[[str], Case], from_hf_gpt2: Callable[..., dict[str, Tensor]]
) -> None:
    simcot = case("simcot_codi_train")
    method = simcot_on_codi(simcot, simcot.facts["num_latent"], **ALONE["explain"])
    run_step(method, simcot_examples(simcot))
    assert_same_gradients(method, simcot.tensors, "fixed.grad_explain.", from_hf_gpt2)


def test_simcot_on_codi_says_the_whole_of_every_step(case: Callable[[str], Case]) -> None:
    """Thoughts, targets, and what the decoder makes of them, group by group.

    In a batch the public code trims targets while rows are being collected: those of later rows are cut to the length
    that the first row's has, and one token more; to one token where the first row has none. Its step loss is 6.01 where
    that of the whole targets is 5.43. Ours are whole.
    """
    simcot = case("simcot_codi_train")
    expected = simcot.tensors
    method = simcot_on_codi(simcot, simcot.facts["num_latent"])
    batch, shares, trace = run_traced(method, simcot_examples(simcot), "step")
    latents_BKD = trace.thoughts.latents
    assert_close(latents_BKD[:, :2], expected["fixed.latents"], "thoughts")
    assert_close(latents_BKD[:, 2:], expected["fixed.unfed_latent"], "unfed thought")

    of_steps, target_BGL = batch.terms["step"], expected["step_ids"]
    assert isinstance(of_steps, StepBatch)
    assert method.step_decoder is not None
    is_target_BGL = target_BGL != simcot.facts["token_ids"]["pad"]
    steps = of_steps.steps
    by_group_M = steps.group_M.argsort(stable=True)
    assert steps.label_M[by_group_M].tolist() == target_BGL[is_target_BGL].tolist()
    thoughts_NCD = take(latents_BKD.flatten(0, 1), of_steps.row_N).unsqueeze(1)
    hidden_MD = method.step_decoder(thoughts_NCD, method.model.embedding(steps.ids_L), steps.packing)
    logits_MV = method.step_decoder.logits(hidden_MD)[by_group_M]
    theirs = torch.stack([expected[f"group{group}.logits"][:, :-1] for group in range(3)], dim=1)
    assert_close(logits_MV, theirs[is_target_BGL], "logits")

    nll_BGL = torch.zeros(target_BGL.shape)
    nll_BGL[is_target_BGL] = F.cross_entropy(logits_MV, steps.label_M[by_group_M], reduction="none").detach()
    for group in range(3):
        n = int(expected[f"group{group}.n_tokens"])
        assert batch.totals["group_tokens_G"][group] == n
        assert_close(nll_BGL[:, group].sum() / n, expected[f"group{group}.loss"], f"group {group}")
    first_G = is_target_BGL[0].sum(-1)
    assert first_G.tolist() == [7, 8, 0]
    is_kept_BGL = is_target_BGL & (torch.arange(target_BGL.shape[2]) <= first_G.unsqueeze(1))
    is_kept_BGL[0] = is_target_BGL[0]
    cut = ((nll_BGL * is_kept_BGL).sum((0, 2)) / is_kept_BGL.sum((0, 2))).mean()
    assert_close(cut, expected["upstream_trunc.explain"], "as published")
    assert round(cut.item(), 2) == 6.01
    assert round(shares["step_loss"].item(), 2) == 5.43


# PCCoT


def pccot_projector(tensors: dict[str, Tensor], prefix: str = "prj.") -> dict[str, Tensor]:
    """PCCoT's projector has no dropout layer in front."""
    parts = {"0": "up", "2": "down", "3": "norm"}
    names = {f"{prefix}{theirs}.{kind}": f"projector.{ours}.{kind}" for theirs, ours in parts.items() for kind in
             ("weight", "bias")}  # fmt: skip
    return {ours: tensors[theirs] for theirs, ours in names.items()}


def pccot_method(pccot: Case, iterations: int, projector: bool = True) -> Method:
    latent = LatentConfig(n_latents=4, warmup=0.0, stages=0, projector_width=32 if projector else None)
    own = {"iterations": iterations, "distill_layers": "blocks"}
    config = MethodConfig(loop="jacobi", written="joint", distill=["hidden"], latent=latent, loss=LossConfig(), own=own)
    method = pccot.method(config)
    assert isinstance(method.loop, Jacobi)
    assert (method.loop.projector is not None) == projector
    if projector:
        method.loop.load_state_dict(pccot_projector(pccot.tensors), strict=False)
    # Theirs is the embedding of a token; a parameter of ours.
    method.loop.start_D.data = method.model.embedding.weight.data[pccot.facts["token_ids"]["latent"]].clone()
    return method


@pytest.mark.parametrize("which", ["T0", "T1", "T2", "T3", "T4", "T6", "noprj.T3", "row0", "row1", "row2"])
def test_pccot(case: Callable[[str], Case], which: str, from_hf_gpt2: Callable[..., dict[str, Tensor]]) -> None:
    """Losses for 0 to 6 iterations and without a projector, the thoughts of each, logits, and all gradients after 3."""
    pccot = case("pccot")
    row, iterations = which.startswith("row"), 3 if which.startswith("row") else int(which[-1])
    method = pccot_method(pccot, iterations, projector=not which.startswith("noprj"))
    examples, expected = pccot.examples(), pccot.tensors
    if row:
        examples = [examples[int(which[-1])]]
    _, shares, trace = run_traced(method, examples, "distill")
    if not row:
        assert_same_answer_logits(method, trace, examples, expected[f"{which}.answer_logits"])
        assert_same_teacher_logits(method, trace, examples, expected["teacher_logits"])
    if which.startswith("T") and iterations > 0:
        assert_close(trace.thoughts.latents, expected[f"{which}.latent_inputs"][-1], "thoughts")
    assert_close(shares["answer_loss"], expected[f"{which}.ce"], "answer")
    assert_close(shares["written_loss"], expected[f"{which}.ref_ce"], "written")
    assert_close(shares["distill_loss"], expected[f"{which}.kd"], "distill")
    assert_close(shares["loss"], expected[f"{which}.loss"], "loss")
    if which == "T3":
        assert trace.thoughts.hidden_BKD is not None
        assert_close(trace.thoughts.hidden_BKD, expected["T3.latent_hidden"][-1], "hidden states")
        assert_gradients_but_one_row(method, expected, "T3.grad.", pccot.facts["token_ids"]["latent"], from_hf_gpt2)
        assert isinstance(method.loop, Jacobi)
        for name, gradient in pccot_projector(expected, "T3.grad.prj.").items():
            found = method.loop.get_parameter(name).grad
            assert found is not None, name
            assert_close(found, gradient, name)


def assert_gradients_but_one_row(
    method: Method, expected: dict[str, Tensor], prefix: str, token: int, from_hf: Callable[..., dict[str, Tensor]]
) -> None:
    """Theirs of a token's row is the sum of ours of that row, which is none of input, and of the loop's parameter."""
    assert isinstance(method.loop, Jacobi | Looped)
    table, start = method.model.embedding.weight.grad, method.loop.start_D.grad
    assert table is not None
    if start is not None:
        table[token] += start
    theirs = from_hf({n.removeprefix(prefix): x for n, x in expected.items() if n.startswith(prefix)})
    assert len(theirs) >= 5
    for name, gradient in theirs.items():
        found = method.model.get_parameter(name).grad
        assert found is not None, name
        assert_close(found, gradient, name)


# LOTUS


def lotus_method(lotus: Case, loops: int, answer_weight: float = 1.0) -> Method:
    facts, ids = lotus.facts, lotus.facts["token_ids"]
    latent = LatentConfig(n_latents=6, latents_per_step=3, surplus="write", missing="mask", warmup=0.0, stages=0)
    loss = LossConfig(answer_weight=answer_weight, step_weight=facts["step_weight"])
    own = {"loops": loops, "own_head_end": False}
    config = MethodConfig(loop="looped", steps="own_head", latent=latent, loss=loss, own=own)
    ids = {"bot": ids["start"], "eot": ids["end"], "latent": ids["latent"]}
    method = replace(lotus, facts=facts | {"token_ids": ids}).method(config)
    assert isinstance(method.loop, Looped)
    term = method.terms["step"]
    assert isinstance(term, OwnHead)
    method.newline = term.newline = untagged([])  # nothing stands between their steps
    method.loop.start_D.data = method.model.embedding.weight.data[ids["latent"]].clone()
    return method


def lotus_examples(lotus: Case) -> list[Example]:
    return [
        Example(
            [*s["question_tokenized"], lotus.facts["token_ids"]["start"]],
            untagged([]),
            [untagged(x) for x in s["steps_tokenized"]],
            untagged(s["answer_tokenized"]),
            0,
        )
        for s in lotus.facts["samples"]
    ]


def test_lotus(case: Callable[[str], Case], from_hf_gpt2: Callable[..., dict[str, Tensor]]) -> None:
    """Losses, all gradients, and the logits that say the steps and the answer."""
    lotus = case("lotus")
    method = lotus_method(lotus, lotus.facts["R"])
    batch, shares, trace = run_traced(method, lotus_examples(lotus), "step")
    expected, thoughts = lotus.tensors, trace.thoughts
    assert_close(shares["answer_loss"], expected["answer_ce"], "answer")
    assert_close(shares["step_loss"], expected["step_ce"], "step")
    assert_close(shares["loss"], expected["loss"], "loss")
    assert batch.totals["step_tokens"] == expected["n_step_tokens"].item()
    assert_close(shares["step_loss"] * batch.totals["step_tokens"], expected["step_ce_sum"], "sum over step tokens")
    assert_gradients_but_one_row(method, expected, "grad.", lotus.facts["token_ids"]["latent"], from_hf_gpt2)
    assert thoughts.bot_BD is not None
    assert thoughts.hidden_BKD is not None
    states_BKD = torch.cat((thoughts.bot_BD.unsqueeze(1), thoughts.hidden_BKD), dim=1)
    assert_close(method.model.logits(states_BKD), expected["latent_logits"], "logits of thoughts")
    lengths = (expected["labels"] != -100).sum(1).tolist()  # each is predicted by the position before
    theirs = torch.cat([row[:length] for row, length in zip(expected["suffix_logits"], lengths, strict=True)])
    assert_close(method.model.logits(trace.hidden_AD), theirs, "answer logits")


@pytest.mark.parametrize("loops", [0, 1, 2])
def test_lotus_passes(case: Callable[[str], Case], loops: int) -> None:
    """What comes out of each pass."""
    lotus = case("lotus")
    _, _, trace = run_traced(lotus_method(lotus, loops), lotus_examples(lotus), "step")
    assert_close(trace.thoughts.latents, lotus.tensors["latent_hidden"][loops], "hidden states")


def test_lotus_step_loss_alone(case: Callable[[str], Case], from_hf_gpt2: Callable[..., dict[str, Tensor]]) -> None:
    lotus = case("lotus")
    method = lotus_method(lotus, lotus.facts["R"], answer_weight=0.0)
    run_step(method, lotus_examples(lotus))
    latent = lotus.facts["token_ids"]["latent"]
    assert_gradients_but_one_row(method, lotus.tensors, "grad_step.", latent, from_hf_gpt2)


def test_lotus_writes_as_published(case: Callable[[str], Case]) -> None:
    """Greedy; all samples as one batch here, each alone there."""
    lotus = case("lotus")
    method = lotus_method(lotus, lotus.facts["R"]).eval()
    checkpoint = Checkpoint(
        method.model,
        None,
        method.tokenizer,
        {},
        answers=AnswerFormat(thinks=True, question_end=""),
        loop=method.loop,
        stage=method.last_stage,
        groups=method.groups,
    )
    questions = [" ".join(map(str, sample["question_tokenized"])) for sample in lotus.facts["samples"]]
    written = [[int(word) for word in each.text.split()] for each in generate(checkpoint, questions, 8)]
    assert written == [lotus.tensors[f"greedy{row}"].tolist() for row in range(3)]


# CoLaR


def colar_method(colar: Case, r: int, distance: str) -> Method:
    """Trained at r alone, so that it is drawn; its vector is their token's embedding."""
    latent = LatentConfig(n_latents=32, warmup=0.0, stages=0)
    own = {
        "compressions": [r],
        "compression": r,
        "embedding_std": 0.12,
        "head_width": 48,
        "embedding_distance": distance,
    }
    config = MethodConfig(
        loop="compressed", steps="compressed", latent=latent, loss=LossConfig(step_weight=1.0), own=own
    )
    ids = {"bot": colar.facts["separator"], "eot": colar.facts["separator"]}
    method = replace(colar, facts=colar.facts | {"token_ids": colar.facts["token_ids"] | ids}).method(config)
    assert isinstance(method.loop, Compressed)
    parts = {"fc.0": "first", "fc.2": "second", "fc.3": "norm", "mean": "mean", "log_std": "log_std"}
    weights = {
        f"head.{ours}.{kind}": colar.tensors[f"latent_policy.{theirs}.{kind}"]
        for theirs, ours in parts.items()
        for kind in ("weight", "bias")
    }
    weights["speeds.weight"] = method.model.embedding.weight.data[14 + r].unsqueeze(0).clone()
    method.loop.load_state_dict(weights)
    return method


def colar_batch(colar: Case, method: Method, r: int, rows: list[int]) -> ThoughtBatch:
    """A batch with the tokens and the noise that the fixture gives."""
    samples = [colar.facts["samples"][row] for row in rows]
    steps = [[untagged(step) for step in sample["steps_tokenized"]] for sample in samples]
    separator = colar.facts["separator"]
    examples = [
        Example(
            [*sample["question_tokenized"], separator],
            concatenate(its),
            its,
            untagged(sample["answer_tokenized"][1:]),
        )
        for sample, its in zip(samples, steps, strict=True)
    ]
    batch = method.collate(examples, method.last_stage)
    assert isinstance(batch, ThoughtBatch)
    tensors = [{name: colar.tensors[f"r{r}.row{row}.{name}"] for name in ("eps", "slot_labels")} for row in rows]
    labels = [[*x["slot_labels"][1:].tolist(), separator] for x in tensors]
    label_M = [*(int(x["slot_labels"][0]) for x in tensors), *firsts_first(labels)]
    assert len(label_M) == len(batch.terms["step"].label_M)
    batch.terms["step"] = replace(
        batch.terms["step"],
        label_M=torch.tensor(label_M),
        noise_SD=torch.stack(firsts_first([list(x["eps"]) for x in tensors])),
    )
    return batch


@pytest.mark.parametrize("r", [1, 2, 3])
@pytest.mark.parametrize("distance", ["mse", "nll"])
@pytest.mark.parametrize("which", ["batch", "row0", "row1", "row2"])
def test_colar(case: Callable[[str], Case], r: int, distance: str, which: str) -> None:
    """All losses: of the batch, and of each row alone."""
    colar = case("colar")
    method = colar_method(colar, r, distance)
    rows = [0, 1, 2] if which == "batch" else [int(which[-1])]
    batch = colar_batch(colar, method, r, rows)
    shares = method(batch, batch.totals)
    prefix = f"r{r}." if which == "batch" else f"r{r}.{which}."
    expected = {name.removeprefix(prefix): x for name, x in colar.tensors.items() if name.startswith(prefix)}
    assert_close(shares["answer_loss"] + shares["token_loss"], expected["ce"], "ce")
    assert_close(shares["embedding_loss"], expected[distance], distance)
    assert_close(shares["thought_entropy"], expected["entropy"], "entropy")
    if which == "batch":
        assert_close(shares["loss"], expected[f"total_{distance}"], "total")
    else:
        assert batch.totals["weights"] == expected["n_labels"].item()


@pytest.mark.parametrize("r", [1, 2, 3])
def test_colar_thoughts_and_predictions(case: Callable[[str], Case], r: int) -> None:
    """What is read, what the head says, and logits, of each row."""
    colar = case("colar")
    method = colar_method(colar, r, "mse").eval()
    for row in range(3):
        batch = colar_batch(colar, method, r, [row])
        loop, model, given = method.loop, method.model, batch.given
        assert isinstance(loop, Compressed)
        assert given is not None
        with torch.no_grad():
            questions_PD, texts_AD = model.embedding(batch.question_ids_P), model.embedding(batch.text_ids_A)
            given_LD = model.embedding(given.ids_L)
            thoughts, text_AD = loop.read_given(model, questions_PD, given, given_LD, texts_AD, batch.texts)
            mean_SD, log_std_SD = loop.head(thoughts.states_MD[1:])
        expected = {
            name.rpartition(".")[2]: x for name, x in colar.tensors.items() if name.startswith(f"r{r}.row{row}.")
        }
        assert_close(thoughts.latents_BKD[0], expected["slot_embeds"][1:], "thoughts")
        assert_close(mean_SD, expected["mean"], "mean")
        assert_close(log_std_SD.exp(), expected["std"], "std")
        logits = model.logits(torch.cat((thoughts.states_MD, text_AD)))
        # Theirs are of all positions, the question's and that of the end token among them.
        assert_close(logits, expected["logits"][-1 - len(logits) : -1], "logits")


def test_colar_gradients(case: Callable[[str], Case], from_hf_gpt2: Callable[..., dict[str, Tensor]]) -> None:
    colar = case("colar")
    r = colar.facts["grad_factor"]
    method = colar_method(colar, r, "mse")
    batch = colar_batch(colar, method, r, [0, 1, 2])
    method(batch, batch.totals)["loss"].backward()
    assert isinstance(method.loop, Compressed)
    table, speeds = method.model.embedding.weight.grad, method.loop.speeds.weight.grad
    assert table is not None
    assert speeds is not None
    table[14 + r] += speeds[0]  # theirs of that row is the sum
    prefix = f"r{r}.grad."
    expected = {name.removeprefix(prefix): x for name, x in colar.tensors.items() if name.startswith(prefix)}
    ours = {name: method.model.get_parameter(name).grad for name in from_hf_gpt2(expected)}
    theirs = from_hf_gpt2(expected)
    parts = {"fc.0": "first", "fc.2": "second", "fc.3": "norm", "mean": "mean", "log_std": "log_std"}
    for name, gradient in expected.items():
        if name.startswith("latent_policy."):
            part, _, kind = name.removeprefix("latent_policy.").rpartition(".")
            theirs[name] = gradient
            ours[name] = method.loop.get_parameter(f"head.{parts[part]}.{kind}").grad
    assert len(theirs) == len(expected) == 8
    for name, gradient in theirs.items():
        found = ours[name]
        assert found is not None, name
        assert_close(found, gradient, name)


# KaVa


@pytest.mark.parametrize("row", range(3))
def test_kava_selects_as_its_listing_does(case: Callable[[str], Case], row: int) -> None:
    kava = case("kava_thirdparty")
    x = {k.removeprefix(f"row{row}."): v for k, v in kava.tensors.items() if k.startswith(f"row{row}.")}
    k_LBGNE = x["keys"].unsqueeze(1)
    N, E = x["keys"].shape[2:]
    has_step_BN = torch.ones(1, N, dtype=torch.bool)
    has_answer_BA = torch.ones(1, x["scores"].shape[2], dtype=torch.bool)
    # Queries whose scaled scores are theirs.
    q_LHAE = x["scores"] @ torch.linalg.pinv(x["keys"].mT) * E**0.5
    I_LBGN = importance(q_LHAE.unsqueeze(1), k_LBGNE, has_step_BN, has_answer_BA)
    R_LBGN = non_redundancy(k_LBGNE, has_step_BN)
    torch.testing.assert_close(I_LBGN[:, 0], x["paper.I"], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(R_LBGN[:, 0], x["paper.R"], atol=1e-6, rtol=1e-5)
    S_LBGN = 0.1 * I_LBGN + 0.9 * R_LBGN
    torch.testing.assert_close(S_LBGN[:, 0], x["paper.S"], atol=1e-5, rtol=1e-4)
    M = kava.facts["M"]
    index = select(S_LBGN, has_step_BN, torch.tensor([M]), M)[:, 0]
    assert (index == x["paper.idx"]).all()


@pytest.mark.parametrize(
    ("distance", "norm"), [("l1", "none"), ("mse", "none"), ("smooth_l1", "none"), ("mse", "std"), ("smooth_l1", "std")]
)
def test_kava_distance(case: Callable[[str], Case], distance: str, norm: str) -> None:
    """Its value and what it pulls the student by."""
    tensors = case("kava_thirdparty").tensors
    key = distance if norm == "none" else f"{distance}_teacherstd"
    is_pair_BM = tensors["slot_mask"].bool()
    found = torch.zeros(())
    students = {kind: tensors[f"student_{kind}"].requires_grad_() for kind in ("keys", "values")}
    for kind, student in students.items():
        student_LBGME, teacher_LBGME = student.movedim(1, 0), tensors[f"teacher_{kind}"].movedim(1, 0)
        _, _, G, _, E = student_LBGME.shape
        distance_L = pair_distance_L(student_LBGME, teacher_LBGME, is_pair_BM, distance, norm)
        found = found + 0.5 * distance_L.mean() / (G * E * is_pair_BM.sum())
    assert_close(found, tensors[f"{key}.loss"], key)
    found.backward()
    for kind, student in students.items():
        assert student.grad is not None
        torch.testing.assert_close(student.grad, tensors[f"{key}.grad_student_{kind}"], atol=1e-7, rtol=1e-5)
