"""Training losses of the field's methods against numbers of their public code, in `tests/reference` (its README.md).

Tiny GPT-2s with random weights. Rows that are padded on the left there are packed here; what stands on padding is not
compared.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from simcot_latent.batches import ThoughtBatch
from simcot_latent.config import LatentConfig, LossConfig, MethodConfig, RunConfig
from simcot_latent.data.format import Example, concatenate, untagged
from simcot_latent.interop.conversion import build
from simcot_latent.loops.base import ThoughtLoop
from simcot_latent.loops.compressed import Compressed
from simcot_latent.loops.jacobi import Jacobi
from simcot_latent.loops.looped import Looped
from simcot_latent.method import Method
from simcot_latent.model.gpt import GPT
from simcot_latent.terms.compressed import firsts_first
from simcot_latent.terms.keys import importance, non_redundancy, pair_distance_L, select

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

    def encode(self, text: str) -> list[int]:
        assert text == "\n"
        return [NEWLINE]


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

    def model(self) -> GPT:
        config = json.loads((self.folder / "fixtures.json").read_text(encoding="utf-8"))["config"]
        config = {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]} | config
        return build(PublishedModel(self.folder, config, load_file(self.folder / "weights_base.safetensors"))).train()

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
    scale = max(1.0, theirs.abs().max().item())
    torch.testing.assert_close(
        ours, theirs.reshape(ours.shape), atol=1e-5 * scale, rtol=1e-5, msg=lambda text: f"{what}: {text}"
    )


def run_step(method: Method, examples: list[Example]) -> tuple[ThoughtBatch, dict[str, Tensor]]:
    batch = method.collate(examples, method.last_stage)
    assert isinstance(batch, ThoughtBatch)
    shares = method(batch, batch.totals)
    shares["loss"].backward()
    return batch, shares


def assert_same_gradients(
    method: Method, expected: dict[str, Tensor], prefix: str, from_hf: Callable[..., dict[str, Tensor]]
) -> None:
    """Of every parameter of the base that they name, and of the projector."""
    ours = from_hf({name.removeprefix(prefix): x for name, x in expected.items() if name.startswith(prefix)})
    assert len(ours) > 20
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


def codi(**own: Any) -> MethodConfig:
    latent = LatentConfig(n_latents=6, feeds_last=False, projector_width=48, warmup=0.0, stages=0)
    return MethodConfig(
        loop="sequential", written="joint", distill=["hidden"], latent=latent, loss=LossConfig(), own=own
    )


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
    if projector:
        method.loop.load_state_dict(pccot_projector(pccot.tensors), strict=False)
    # Theirs is the embedding of a token; a parameter of ours.
    method.loop.start_D.data = method.model.embedding.weight.data[pccot.facts["token_ids"]["latent"]].clone()
    return method


@pytest.mark.parametrize("which", ["T0", "T1", "T2", "T3", "row0", "row1", "row2"])
def test_pccot(case: Callable[[str], Case], which: str, from_hf_gpt2: Callable[..., dict[str, Tensor]]) -> None:
    """Losses for 0 to 3 iterations, the thoughts of each, and all gradients after 3."""
    pccot = case("pccot")
    iterations = int(which[1]) if which.startswith("T") else 3
    method = pccot_method(pccot, iterations)
    examples = pccot.examples()
    if which.startswith("row"):
        examples = [examples[int(which[-1])]]
    _, shares = run_step(method, examples)
    expected = pccot.tensors
    assert_close(shares["answer_loss"], expected[f"{which}.ce"], "answer")
    assert_close(shares["written_loss"], expected[f"{which}.ref_ce"], "written")
    assert_close(shares["distill_loss"], expected[f"{which}.kd"], "distill")
    assert_close(shares["loss"], expected[f"{which}.loss"], "loss")
    if which == "T3":
        assert_gradients_but_one_row(method, expected, "T3.grad.", pccot.facts["token_ids"]["latent"], from_hf_gpt2)


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
    assert len(theirs) > 5
    for name, gradient in theirs.items():
        found = method.model.get_parameter(name).grad
        assert found is not None, name
        assert_close(found, gradient, name)


def test_lotus(case: Callable[[str], Case], from_hf_gpt2: Callable[..., dict[str, Tensor]]) -> None:
    lotus = case("lotus")
    facts = lotus.facts
    latent = LatentConfig(n_latents=6, latents_per_step=3, surplus="write", warmup=0.0, stages=0)
    config = MethodConfig(
        loop="looped",
        steps="own_head",
        latent=latent,
        loss=LossConfig(step_weight=0.05),
        own={"loops": 2, "own_head_end": False},
    )
    run = RunConfig(mode="", model={}, data={}, tokenizer={}, rationale="equations", step_weight_multiplier=1.0)
    ids = facts["token_ids"]
    method = Method(lotus.model(), FixtureTokenizer(ids["start"], ids["end"]), run, config)  # type: ignore[arg-type]
    assert isinstance(method.loop, Looped)
    method.newline = untagged([])  # nothing stands between their steps
    method.loop.start_D.data = method.model.embedding.weight.data[ids["latent"]].clone()
    examples = [
        Example(
            [*s["question_tokenized"], ids["start"]],
            untagged([]),
            [untagged(x) for x in s["steps_tokenized"]],
            untagged(s["answer_tokenized"]),
            0,
        )
        for s in facts["samples"]
    ]
    _, shares = run_step(method, examples)
    expected = lotus.tensors
    assert_close(shares["answer_loss"], expected["answer_ce"], "answer")
    assert_close(shares["step_loss"], expected["step_ce"], "step")
    assert_close(shares["loss"], expected["loss"], "loss")
    assert_gradients_but_one_row(method, expected, "grad.", ids["latent"], from_hf_gpt2)


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


@pytest.mark.parametrize("distance", ["l1", "mse", "smooth_l1"])
@pytest.mark.parametrize("norm", ["none", "std"])
def test_kava_distance(case: Callable[[str], Case], distance: str, norm: str) -> None:
    tensors = case("kava_thirdparty").tensors
    key = f"{distance}.loss" if norm == "none" else f"{distance}_teacherstd.loss"
    if key not in tensors:
        pytest.skip("no reference number")
    is_pair_BM = tensors["slot_mask"].bool()
    found = torch.zeros(())
    for kind in ("keys", "values"):
        student, teacher = (tensors[f"{who}_{kind}"].movedim(1, 0) for who in ("student", "teacher"))
        _, _, G, _, E = student.shape
        found += 0.5 * pair_distance_L(student, teacher, is_pair_BM, distance, norm).mean() / (G * E * is_pair_BM.sum())
    assert_close(found, tensors[key], key)
