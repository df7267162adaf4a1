"""The auxiliary decoder against naive loops: teacher forcing, free-running, and what it shares with the base."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from simcot_latent.checkpoint import Checkpoint, TrainerState
from simcot_latent.curricula.base import Stage
from simcot_latent.data.batch import to_device
from simcot_latent.data.format import AnswerFormat
from simcot_latent.data.tokenizer import Tokenizer
from simcot_latent.errors import UserError
from simcot_latent.loops.sequential import Sequential, SequentialConfig
from simcot_latent.model.gpt import GPT
from simcot_latent.model.linear import gathered_gradients
from simcot_latent.model.packing import Packing, take
from simcot_latent.terms.step_decoder import PackedSteps, StepDecoder
from simcot_latent.terms.steps import StepGroups
from simcot_latent.training.saving import save_checkpoint

MakeDecoder = Callable[..., StepDecoder]

END, WIDTH = 60, 32
STEPS = [[5, 8, 13, 21], [1], [40, 2, 40], []]


@pytest.fixture
def make_decoder(randomise: Callable[..., None]) -> Callable[..., StepDecoder]:
    """`make_decoder(model, n_layer=2, end_factor=1.0)`: a random decoder; a factor that makes it end its texts."""

    def make(model: GPT, n_layer: int = 2, end_factor: float = 1.0) -> StepDecoder:
        decoder = StepDecoder.from_base(model, n_layer, "random")
        randomise(decoder, seed=1)
        with torch.no_grad():
            model.embedding.weight[END] *= end_factor
        return decoder.eval()

    return make


def random_thoughts(groups: int, per_group: int, seed: int = 0) -> Tensor:
    return 2 * torch.randn(groups, per_group, WIDTH, generator=torch.Generator().manual_seed(seed))


def read(decoder: StepDecoder, thoughts_CD: Tensor, ids: list[int]) -> Tensor:
    """Hidden states of one group alone, uncached: the thoughts, then the tokens."""
    vectors = [*thoughts_CD, *(decoder.embedding.weight[i] for i in ids)]
    return decoder.transformer(torch.stack(vectors).unsqueeze(0))[0]


def teach(model: GPT, decoder: StepDecoder, thoughts_NCD: Tensor, groups: Sequence[Sequence[int]]) -> Tensor:
    """Hidden states (M, D), as in training: the base's embedding looks the tokens up."""
    steps = PackedSteps.of(groups, END, thoughts_NCD.shape[1])
    return decoder(thoughts_NCD, model.embedding(steps.ids_L), steps.packing)


@pytest.mark.parametrize("per_group", [1, 3])
@given(st.lists(st.lists(st.integers(0, END - 1), max_size=4), max_size=5))
@settings(deadline=None, max_examples=50)
def test_every_token_is_predicted_from_what_is_before_it(per_group: int, groups: list[list[int]]) -> None:
    """Packed steps, token by token: who reads what, in which order, and is to say what next."""
    steps = PackedSteps.of(groups, END, per_group)
    read: list[list[int | str]] = [[] for _ in groups]
    inputs = [f"thought {i}" for i in range(per_group) for _ in groups] + steps.ids_L.tolist()
    predicting = len(inputs) - len(steps.label_M)
    places = zip(steps.packing.row_P.tolist(), steps.packing.offset_P.tolist(), inputs, strict=True)
    said: list[list[int]] = [[] for _ in groups]
    for place, (group, offset, word) in enumerate(places):
        assert offset == len(read[group])
        read[group].append(word)
        if place >= predicting:
            assert steps.group_M[place - predicting] == group
            said[group].append(int(steps.label_M[place - predicting]))
    thoughts = [f"thought {i}" for i in range(per_group)]
    assert read == [thoughts + group for group in groups]
    assert said == [[*group, END] for group in groups]


def test_packed_steps_move_to_a_device_whole() -> None:
    moved = to_device(PackedSteps.of(STEPS, END, 2), torch.device("meta"))
    tensors = moved.ids_L, moved.packing.row_P, moved.label_M, moved.group_M
    assert {tensor.device.type for tensor in tensors} == {"meta"}


@pytest.mark.parametrize("gathers", [False, True], ids=["ordinary", "gathered"])
@pytest.mark.parametrize("per_group", [1, 3])
def test_teacher_forcing_equals_each_group_alone(
    model: GPT, make_decoder: MakeDecoder, assert_equal_gradients: Callable[..., None], per_group: int, gathers: bool
) -> None:
    """Thoughts as a prefix without labels, tokens shifted by one, steps of different lengths: forward and gradients."""
    decoder = make_decoder(model)
    thoughts_NCD = torch.nn.Parameter(random_thoughts(len(STEPS), per_group))
    both = torch.nn.ModuleList([decoder])
    both.register_parameter("thoughts", thoughts_NCD)
    with gathered_gradients(decoder) if gathers else nullcontext():
        hidden_MD = teach(model, decoder, thoughts_NCD, STEPS)
    first_ND, others_LD = hidden_MD.split((len(STEPS), sum(map(len, STEPS))))
    expected = []
    for row, (step, others) in enumerate(zip(STEPS, others_LD.split(list(map(len, STEPS))), strict=True)):
        expected_D, *expected_others = read(decoder, thoughts_NCD[row], step)[per_group - 1 :]
        torch.testing.assert_close(first_ND[row], expected_D, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(list(others), expected_others, atol=1e-5, rtol=1e-5)
        expected.append((expected_D, expected_others))
    expected_MD = torch.stack([first for first, _ in expected] + [x for _, others in expected for x in others])
    weight_MD = random_thoughts(1, len(hidden_MD), seed=1)[0]
    scalars = [(x_MD * weight_MD).sum() for x_MD in (hidden_MD, expected_MD)]
    assert_equal_gradients(*scalars, both)


@pytest.mark.parametrize("gathers", [False, True], ids=["ordinary", "gathered"])
def test_nothing_to_teach(model: GPT, make_decoder: MakeDecoder, gathers: bool) -> None:
    """A batch without any step: a loss of nothing, which goes back without harm."""
    decoder = make_decoder(model)
    latents = random_thoughts(3, 2).requires_grad_()
    with gathered_gradients(decoder) if gathers else nullcontext():
        hidden_MD = teach(model, decoder, take(latents, torch.zeros(0, dtype=torch.long)), [])
    assert hidden_MD.shape == (0, WIDTH)
    hidden_MD.sum().backward()
    gradients = [p.grad for p in (latents, *decoder.parameters())]
    assert not any(gradient is not None and gradient.any() for gradient in gradients)


@pytest.mark.parametrize("per_group", [1, 3])
@torch.no_grad()
def test_decoding_equals_a_naive_greedy_loop(model: GPT, make_decoder: MakeDecoder, per_group: int) -> None:
    """Batched and cached, groups ending one by one, against one group at a time with a whole new pass a token."""
    decoder, max_tokens = make_decoder(model, end_factor=3.0), 12
    thoughts_NCD = random_thoughts(16, per_group)
    texts, probabilities = decoder.decode(thoughts_NCD, END, max_tokens)
    for thoughts_CD, text, probability in zip(thoughts_NCD, texts, probabilities, strict=True):
        expected: list[int] = []
        product = 1.0
        while len(expected) < max_tokens and END not in expected:
            probabilities_V = decoder.logits(read(decoder, thoughts_CD, expected)[-1]).softmax(-1)
            expected.append(int(probabilities_V.argmax()))
            product *= probabilities_V.max().item()
        assert text == (expected[:-1] if expected[-1] == END else expected)
        assert probability == pytest.approx(product, rel=1e-4)
    lengths = sorted(map(len, texts))
    assert len(set(lengths)) >= 4, f"too much alike to prove anything: {lengths}"
    assert lengths[-1] == max_tokens, "some group must run into the limit"


@torch.no_grad()
def test_a_group_decodes_the_same_alone_and_in_company(model: GPT, make_decoder: MakeDecoder) -> None:
    decoder = make_decoder(model, end_factor=3.0)
    thoughts_NCD = random_thoughts(10, 2)
    texts, probabilities = decoder.decode(thoughts_NCD, END, 10)
    for row in range(10):
        alone, probability = decoder.decode(thoughts_NCD[row : row + 1], END, 10)
        assert alone == [texts[row]]
        assert probability == pytest.approx([probabilities[row]], rel=1e-4)


def test_no_groups_decode_to_nothing(model: GPT, make_decoder: MakeDecoder) -> None:
    """As in an eval's batch of problems without steps."""
    assert make_decoder(model).decode(random_thoughts(1, 2)[:0], END, 10) == ([], [])


def test_decoding_stops_where_the_context_ends(make_model: Callable[..., GPT], make_decoder: MakeDecoder) -> None:
    """A decoder that never ends its step fills its context, whatever was asked for, and does not fall over."""
    decoder = make_decoder(make_model("gpt2", context_length=10), end_factor=0.0)
    texts, _ = decoder.decode(random_thoughts(2, 2), END, max_tokens=64)
    assert [len(text) for text in texts] == [8, 8]  # two positions are thoughts


@pytest.mark.parametrize("n_layer", [1, 2])
def test_init_base_copies_the_first_blocks(model: GPT, n_layer: int) -> None:
    """Equal to the base's first blocks, positions and final norm, in memory of their own."""
    decoder = StepDecoder.from_base(model, n_layer, "base")
    base = model.transformer.state_dict()
    copied = decoder.transformer.state_dict()
    assert {name.split(".")[1] for name in copied if name.startswith("blocks.")} == {str(i) for i in range(n_layer)}
    for name, weight in copied.items():
        assert torch.equal(weight, base[name])
        assert weight.data_ptr() != base[name].data_ptr()


@pytest.mark.parametrize("n_layer", [2, None])
def test_init_base_with_every_block_is_the_base(model: GPT, n_layer: int | None) -> None:
    decoder = StepDecoder.from_base(model, n_layer, "base")
    thoughts_NCD = random_thoughts(2, 1)
    ids_NL = torch.tensor([[5, 6], [7, 8]])
    expected_NLD = model.transformer(torch.cat((thoughts_NCD, model.embedding(ids_NL)), dim=1))
    packing = Packing.of([1, 1], [2, 2])  # first labels first, as in `PackedSteps`
    hidden_MD = teach(model, decoder, thoughts_NCD, ids_NL.tolist())
    torch.testing.assert_close(packing.pad(hidden_MD), expected_NLD, atol=1e-6, rtol=1e-6)


def test_init_random_is_not_the_base(model: GPT) -> None:
    decoder = StepDecoder.from_base(model, 2, "random")
    base = model.transformer.state_dict()
    assert not any(torch.equal(w, base[name]) for name, w in decoder.transformer.state_dict().items() if w.dim() == 2)


def test_init_base_needs_as_many_blocks_in_the_base(make_model: Callable[..., GPT]) -> None:
    """decoder.n_layer and model.n_layer are a user's to set: one clear line, no KeyError."""
    model = make_model("llama")
    with pytest.raises(UserError, match=r"decoder\.n_layer=3"):
        StepDecoder.from_base(model, 3, "base")


def test_the_embedding_is_the_base_models(model: GPT, make_decoder: MakeDecoder) -> None:
    """One tensor: the step loss reaches it as input and as output table, and it is trained once."""
    decoder = make_decoder(model)
    assert decoder.embedding.weight is model.embedding.weight
    both = torch.nn.ModuleList([model, decoder])
    shared = [name for name, p in both.named_parameters() if p is model.embedding.weight]
    assert len(shared) == 1
    logits_MV = decoder.logits(teach(model, decoder, random_thoughts(1, 1), [[5, 8]]))
    F.cross_entropy(logits_MV, torch.tensor([5, 8, END])).backward()
    gradient = model.embedding.weight.grad
    assert gradient is not None
    assert (gradient.abs().sum(-1) > 0).all(), "as output table every row is reached"
    # As input table rows 5 and 8 are reached, END is not: it is the last label.
    model.embedding.weight.grad = None
    teach(model, decoder, random_thoughts(1, 1), [[5, 8]]).square().cumsum(-1).sum().backward()
    assert model.embedding.weight.grad is not None
    assert model.embedding.weight.grad.abs().sum(-1).nonzero().flatten().tolist() == [5, 8]


def test_logits_are_the_embedding_and_the_soft_cap(make_model: Callable[..., GPT], make_decoder: MakeDecoder) -> None:
    decoder = make_decoder(make_model("nanochat", logit_softcap=3.0))
    hidden = random_thoughts(2, 1)
    raw = hidden @ decoder.embedding.weight.T
    torch.testing.assert_close(decoder.logits(hidden), 3 * torch.tanh(raw / 3), atol=1e-5, rtol=1e-5)


def test_from_checkpoint(
    tmp_path: Path, tokenizer: Tokenizer, make_model: Callable[..., GPT], make_decoder: MakeDecoder
) -> None:
    """The decoder of a saved checkpoint, embedding included, decodes as the one that was saved."""
    model = make_model("llama", vocab_size=tokenizer.n_vocab)
    decoder = make_decoder(model, n_layer=1)
    saved = Checkpoint(
        model,
        decoder,
        tokenizer,
        {"seed": 0},
        answers=AnswerFormat(thinks=True),
        loop=Sequential(WIDTH, SequentialConfig()),
        stage=Stage(4, first_written=None),
        groups=StepGroups(2),
        step=3,
    )
    folder = save_checkpoint(saved, tmp_path, TrainerState({}, {}), keep=1)
    loaded = StepDecoder.from_checkpoint(folder)
    thoughts_NCD = random_thoughts(3, 2)
    assert loaded.decode(thoughts_NCD, END, 6) == decoder.decode(thoughts_NCD, END, 6)


def test_from_checkpoint_without_a_decoder(
    tmp_path: Path, tokenizer: Tokenizer, make_model: Callable[..., GPT]
) -> None:
    model = make_model("llama", vocab_size=tokenizer.n_vocab)
    written = Checkpoint(model, None, tokenizer, {"seed": 0})
    save_checkpoint(written, tmp_path, TrainerState({}, {}), keep=1)
    with pytest.raises(UserError, match="holds no auxiliary decoder"):
        StepDecoder.from_checkpoint(tmp_path)
