"""What holds for every loop of the table: one that is added is asked the same.

The reference of each computes the whole sequence of one row anew wherever something comes to be known, without cache,
batch or packing, from the papers' definitions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from simcot_latent.config import LatentConfig, LossConfig, MethodConfig, RunConfig
from simcot_latent.curricula.base import Stage
from simcot_latent.data.batch import Seeds
from simcot_latent.data.problem import Problem
from simcot_latent.data.tokenizer import Tokenizer
from simcot_latent.distributed import autocast
from simcot_latent.generate import generate, think_about
from simcot_latent.loops.base import ThoughtLoop, Thoughts, go_on
from simcot_latent.loops.given import GivenLoop
from simcot_latent.loops.jacobi import Jacobi, JacobiConfig
from simcot_latent.loops.sequential import Sequential, SequentialConfig
from simcot_latent.method import Method, ThoughtBatch, make_loop
from simcot_latent.model.cache import StaticCaches
from simcot_latent.model.gpt import GPT
from simcot_latent.model.linear import gathered_gradients
from simcot_latent.model.losses import add_up
from simcot_latent.model.taps import Taps
from simcot_latent.parts import PARTS
from simcot_latent.training.saving import as_checkpoint

WIDTH, MOST = 32, 5
QUESTIONS = [[7, 3, 22, 9, 41, 60], [5, 60], [60], [50, 11, 8, 60], [4, 4, 60]]
TEXTS = [[59, 1, 2], [59, 13, 40, 6, 2], [59], [59, 4], [59, 1]]
COUNTS = [3, 0, MOST, 1, MOST]

KINDS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "compressed": ("compressed", {}, {"compressions": [1, 3, 2], "compression": 3}),
    "jacobi": ("jacobi", {}, {"iterations": 2}),
    "jacobi, once": ("jacobi", {}, {"iterations": 0}),
    "jacobi, projected": ("jacobi", {"projector_width": 24}, {"iterations": 2}),
    "looped": ("looped", {}, {"loops": 2}),
    "looped, once": ("looped", {}, {"loops": 0}),
    "pause": ("pause", {}, {}),
    "pause_multipass": ("pause_multipass", {}, {}),
    "sequential": ("sequential", {}, {}),
    "sequential, projected": ("sequential", {"projector_width": 24}, {}),
    "sequential, last not read": ("sequential", {"feeds_last": False}, {}),
    "soft": ("soft", {}, {"temperature": 0.7}),
    "soft, of few": ("soft", {}, {"top_k": 3}),
    "soft, last not read": ("soft", {"feeds_last": False}, {"top_k": 3}),
}
"""Each loop with settings under which it does all that it can: its key, settings of `latent`, settings of its own."""

every_loop = pytest.mark.parametrize("kind", KINDS)


def test_every_loop_of_the_table_is_here() -> None:
    assert {key for key, _, _ in KINDS.values()} == set(PARTS["loop"])


def config_of(kind: str, n_latents: int = MOST, **parts: Any) -> MethodConfig:
    """A method with this loop, and terms that weigh what they are told to."""
    key, latent, own = KINDS[kind]
    config = LatentConfig(**{"n_latents": n_latents, "missing": "mask", "warmup": 0.0, "stages": 0} | latent)
    own = {"distill_norm": "none"} | own  # else the loss depends on the company in the micro-batch: CODI's definition
    return MethodConfig(loop=key, latent=config, loss=LossConfig(step_weight=0.7), own=own, **parts)


@pytest.fixture
def loop(kind: str, randomise: Callable[..., None]) -> ThoughtLoop:
    """One of the kind, with weights that matter."""
    config = config_of(kind)
    loop = make_loop(config.loop, WIDTH, config)
    assert loop is not None
    randomise(loop, seed=1)
    for name, parameter in loop.named_parameters():
        if name in ("start_D", "pause_D"):
            parameter.data = torch.randn(WIDTH, generator=torch.Generator().manual_seed(5))
    return loop.eval()


# The reference


@dataclass
class Alone:
    """What a row comes to by itself: what the loop gives, and hidden states at the text.

    Attributes:
        latents: the states that the loop comes to.
        bot_D, hidden: the hidden states at `<|bot|>` and at the thoughts, where the text is read after them.
        keys, values: of these thoughts, by block.
    """

    latents: list[Tensor]
    text_AD: Tensor
    bot_D: Tensor
    hidden: list[Tensor]
    keys: list[Tensor]
    values: list[Tensor]


def alone(model: GPT, loop: ThoughtLoop, question: Sequence[int], count: int, text: Sequence[int]) -> Alone:
    """One row, a whole new pass wherever something comes to be known.

    Args:
        count: the states of the row.
    """
    table, config = model.embedding.weight, loop.config
    before = [table[i] for i in question]
    if loop.key == "compressed":  # its speed stands before `<|bot|>`
        before.insert(-1, loop.get_parameter("speeds.weight")[config.compressions.index(config.compression)])

    def read(thoughts: Sequence[Tensor]) -> Tensor:
        """The hidden states from `<|bot|>` on."""
        return model.transformer(torch.stack([*before, *thoughts]).unsqueeze(0))[0, len(before) - 1 :]

    def project(hidden: Tensor) -> Tensor:
        if getattr(config, "projector_width", None) is None:
            return hidden
        w = {name.removeprefix("projector."): p for name, p in loop.named_parameters()}
        x = F.linear(F.gelu(F.linear(hidden, w["up.weight"], w["up.bias"])), w["down.weight"], w["down.bias"])
        return F.layer_norm(x, (WIDTH,), w["norm.weight"], w["norm.bias"])

    latents: list[Tensor] = []
    read_at: list[Tensor] = []  # what stands at the thoughts where the text is read after them
    if loop.key in ("sequential", "soft", "compressed"):
        for _ in range(count):
            hidden_D = read(latents)[-1]
            if loop.key == "soft":
                logits_V, best = model.logits(hidden_D) / config.temperature, config.top_k or len(table)
                least = logits_V.sort(descending=True).values[min(best, len(table)) - 1]
                latents.append(logits_V.masked_fill(logits_V < least, -torch.inf).softmax(-1) @ table)
            elif loop.key == "compressed":
                head: Any = loop.get_submodule("head")
                x_D = head.norm(head.second(F.gelu(head.first(hidden_D))))
                latents.append(head.mean(x_D) * table.std().detach())
            else:
                latents.append(project(hidden_D))
        read_at = latents if getattr(config, "feeds_last", True) else latents[:-1]
    elif loop.key in ("pause", "pause_multipass"):
        read_at = [loop.get_parameter("pause_D")] * count
        latents = list(read(read_at)[1:])
    elif loop.key == "jacobi":
        read_at = [loop.get_parameter("start_D")] * count
        for _ in range(config.iterations):
            read_at = [project(hidden_D) for hidden_D in read(read_at)[:-1]] if count else []
        latents = read_at
    else:
        assert loop.key == "looped"
        start_D = loop.get_parameter("start_D")
        read_at = [start_D] * count
        for _ in range(config.loops):
            read_at = [start_D + hidden_D for hidden_D in read(read_at)[1:]]
        latents = list(read(read_at)[1:])
    x_TD = torch.stack([*before, *read_at, *(table[i] for i in text)])
    first, n = len(before), len(read_at)
    taps = Taps(tokens=range(first, first + n), hidden=False, keys=True, values=True)
    hidden_TD = model.transformer(x_TD.unsqueeze(0), taps=taps)[0]
    kv = [list(x) for x in (taps.keys_LNGE, taps.values_LNGE)]
    return Alone(
        latents, hidden_TD[first + n :], hidden_TD[first - 1], list(hidden_TD[first : first + n]), kv[0], kv[1]
    )


# The loop itself


def embed(model: GPT, *sections: Sequence[Sequence[int]]) -> Tensor:
    """Embeddings of all rows' first section, row by row, then of all rows' second."""
    return model.embedding(torch.tensor([i for rows in sections for row in rows for i in row], dtype=torch.long))


def together(
    model: GPT, loop: ThoughtLoop, counts: Sequence[int], tight: bool = False, caches: StaticCaches | None = None
) -> tuple[Thoughts, list[Tensor]]:
    """A batch: its thoughts, and the hidden states at each row's text."""
    silent, lengths = [ids[:-1] for ids in QUESTIONS], list(map(len, TEXTS))
    packing = loop.pack_questions(list(map(len, silent)), counts, tight)
    x_PD = embed(model, silent, [ids[-1:] for ids in QUESTIONS])
    thoughts = loop.think(model, x_PD, packing, counts, max(lengths), caches, keys=loop.gives_keys)
    hidden_AD = go_on(model, thoughts, embed(model, TEXTS), loop.pack_texts(lengths, counts))
    return thoughts, list(hidden_AD.split(lengths))


def probe_loss(*states: Tensor) -> Tensor:
    """A scalar in which every number counts, each differently."""
    parts = [(x.cumsum(0).cos() * x).sum() for x in states if x.numel()]
    return torch.stack(parts).sum()


@every_loop
@pytest.mark.parametrize("tight", [False, True], ids=["one rectangle", "several"])
def test_a_batch_is_its_rows(
    kind: str, model: GPT, loop: ThoughtLoop, tight: bool, assert_equal_gradients: Callable[..., None]
) -> None:
    """Rows with numbers of thoughts of their own, one without any; values, and gradients of all that is learned."""
    with gathered_gradients(model, loop):
        thoughts, hidden = together(model, loop, COUNTS, tight)
    ours, theirs = torch.zeros(()), torch.zeros(())
    assert thoughts.latents.shape == (len(COUNTS), MOST, WIDTH)
    for row, count in enumerate(COUNTS):
        expected = alone(model, loop, QUESTIONS[row], count, TEXTS[row])
        latents_KD = torch.stack(expected.latents) if count else torch.zeros(0, WIDTH)
        pairs = [(thoughts.latents[row, :count], latents_KD), (hidden[row], expected.text_AD)]
        assert not thoughts.latents[row, count:].any()
        if loop.gives_hidden:
            assert thoughts.bot_BD is not None
            assert thoughts.hidden_BKD is not None
            assert not thoughts.hidden_BKD[row, count:].any()
            pairs += [(thoughts.bot_BD[row], expected.bot_D)]
            pairs += [(thoughts.hidden_BKD[row, k], expected.hidden[k]) for k in range(count)]
        if loop.gives_keys and count:
            assert thoughts.keys_LBKGE is not None
            assert thoughts.values_LBKGE is not None
            pairs += list(zip(thoughts.keys_LBKGE[:, row, :count], expected.keys, strict=True))
            pairs += list(zip(thoughts.values_LBKGE[:, row, :count], expected.values, strict=True))
        for found, wanted in pairs:
            torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)
        ours = ours + probe_loss(*(found for found, _ in pairs))
        theirs = theirs + probe_loss(*(wanted for _, wanted in pairs))
    assert_equal_gradients(ours, theirs, what_learns(model, loop), 1e-3)


def what_learns(model: GPT, loop: ThoughtLoop) -> nn.Module:
    """All but an output head of its own, which hidden states do not know, and a deviation, which they do not either."""
    own = {name.replace(".", "_"): p for name, p in loop.named_parameters() if "log_std" not in name}
    return nn.ModuleList([model.embedding, model.transformer, nn.ParameterDict(own)])


@pytest.mark.parametrize("width", [None, 24], ids=["plain", "projected"])
@pytest.mark.parametrize("more", [0, 2])
def test_jacobi_with_enough_iterations_is_sequential(
    model: GPT,
    width: int | None,
    more: int,
    randomise: Callable[..., None],
    assert_equal_gradients: Callable[..., None],
) -> None:
    """T >= K, https://arxiv.org/abs/2506.18582, section 3: values and gradients; where it starts does not matter."""
    jacobi = Jacobi(WIDTH, JacobiConfig(iterations=MOST + more, projector_width=width))
    sequential = Sequential(WIDTH, SequentialConfig(projector_width=width))
    randomise(jacobi)
    sequential.load_state_dict({name: x for name, x in jacobi.state_dict().items() if name != "start_D"})
    (ours, our_text), (theirs, their_text) = (together(model, loop, COUNTS) for loop in (jacobi, sequential))
    torch.testing.assert_close(ours.latents, theirs.latents, atol=1e-4, rtol=1e-4)
    for found, expected in zip(our_text, their_text, strict=True):
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    losses = probe_loss(ours.latents, *our_text), probe_loss(theirs.latents, *their_text)
    assert_equal_gradients(*losses, nn.ModuleList([model.embedding, model.transformer]), 1e-3)
    projectors = [dict(loop.named_parameters()) for loop in (jacobi, sequential)]
    for name, parameter in projectors[1].items():
        losses = probe_loss(*together(model, jacobi, COUNTS)[1]), probe_loss(*together(model, sequential, COUNTS)[1])
        (found,) = torch.autograd.grad(losses[0], projectors[0][name])
        (expected,) = torch.autograd.grad(losses[1], parameter)
        torch.testing.assert_close(found, expected, atol=1e-3 * expected.abs().max().item(), rtol=1e-3)
    start = torch.autograd.grad(probe_loss(*together(model, jacobi, COUNTS)[1]), jacobi.start_D)[0]
    assert start.abs().max() < 1e-5


# In training


@pytest.fixture
def make_method(
    make_model: Callable[..., GPT], make_run: Callable[..., RunConfig], randomise: Callable[..., None],
    tokenizer: Tokenizer,
) -> Callable[..., Method]:  # fmt: skip
    """`make_method(kind, steps=None, family="llama")`: a method of random weights with every term that the loop allows,
    its step loss by a decoder, unless another is asked for."""

    def make(kind: str, steps: str | None = None, family: str = "llama") -> Method:
        key = KINDS[kind][0]
        steps = steps or ("compressed" if key == "compressed" else "decoder")
        distill = ["hidden", "kv"] if key in ("jacobi", "looped", "pause") else ["hidden"]
        config = config_of(kind, steps=steps, distill=distill, written="joint")
        model = make_model(family, vocab_size=tokenizer.n_vocab, context_length=256)
        method = Method(model, tokenizer, make_run(rationale="equations", max_new_tokens=8), config)
        for seed, (name, module) in enumerate(method.named_children(), start=1):
            if name == "step_decoder":
                randomise(module.get_submodule("transformer"), seed)
            elif name != "model":
                randomise(module, seed)
        for name, parameter in method.named_parameters():
            if name in ("loop.start_D", "loop.pause_D"):
                parameter.data = torch.randn(WIDTH, generator=torch.Generator().manual_seed(5))
        return method

    return make


def stages_for(method: Method, problems: Sequence[Problem]) -> list[Stage]:
    """Rows that think about nothing, some of their steps, and all; of a loop that is given its thoughts, the last.

    Theirs differ by themselves: so many as the steps of each row take.
    """
    if isinstance(method.loop, GivenLoop):
        return [method.last_stage] * len(problems)
    most = method.config.latent.n_latents
    return [Stage(n, first_written=n if n < most else None) for n in (2, most, 0, 1, most)]


Step = tuple[dict[str, Tensor], dict[str, Tensor]]


def run_step(method: Method, problems: Sequence[Problem], cuts: Sequence[Sequence[int]], dtype: Any = None) -> Step:
    """Shares and gradients of an optimizer step, whose rows are cut into these micro-batches."""
    examples, stages = [method.encode(problem) for problem in problems], stages_for(method, problems)
    batches = [
        method.collate([examples[i] for i in cut], [stages[i] for i in cut], Seeds(3, [10 + i for i in cut]))
        for cut in cuts
    ]
    totals = add_up([batch.totals for batch in batches])
    method.zero_grad()
    shares: list[dict[str, Tensor]] = []
    for batch in batches:
        assert isinstance(batch, ThoughtBatch)
        with autocast(torch.device("cpu"), dtype or torch.float32):
            found = method(batch, totals)
        found["loss"].backward()
        shares.append({key: value.detach() for key, value in found.items()})
    gradients = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in method.named_parameters()}
    return add_up(shares), {name: gradient.clone() for name, gradient in gradients.items()}


def steps_by(kind: str) -> list[str]:
    """Who may say the steps of its thoughts."""
    key = KINDS[kind][0]
    if key == "compressed":
        return ["compressed"]
    return ["decoder", "own_head"] if key in ("jacobi", "looped", "pause", "pause_multipass") else ["decoder"]


@every_loop
def test_a_step_is_the_same_in_any_order_and_cut(
    kind: str, make_method: Callable[..., Method], problems: list[Problem]
) -> None:
    """Rows of different stages: all losses and gradients of one batch, of the same in another order, and of a batch per
    row. That a draw belongs to its row is among it."""
    for steps in steps_by(kind):
        method = make_method(kind, steps)
        whole, gradients = run_step(method, problems, [range(5)])
        names = {"loss", "answer_loss", "step_loss", "written_loss", "distill_loss"}
        assert whole.keys() >= (names | {"kv_loss"} if "kv" in method.config.distill else names)
        assert all(value > 0 for key, value in whole.items() if key.endswith("_loss")), whole
        for cuts in ([[3, 0, 4, 2, 1]], [[0], [1], [2], [3], [4]], [[4, 1], [2, 0, 3]]):
            shares, found = run_step(method, problems, cuts)
            assert shares.keys() == whole.keys()
            for key, value in whole.items():
                torch.testing.assert_close(
                    shares[key], value, atol=2e-5, rtol=2e-5, msg=lambda text, k=key: f"{k}: {text}"
                )
            for name, expected in gradients.items():
                scale = expected.abs().max().item()
                assert scale > 0, name
                torch.testing.assert_close(
                    found[name], expected, atol=5e-4 * scale, rtol=5e-4, msg=lambda text, n=name: f"{n}: {text}"
                )


# Afterwards

IN_WORDS = [
    "How many?",
    "Ann has 3 pears and eats 2 of them. How many are left?",
    "2+2?",
    "Half of 30?",
    "Bo?",
    "What is left of $20 after 4 pens at $3?",
]


def answering(method: Method, kind: str) -> Method:
    """A method that ends its answers, and its thoughts where it may, now sooner, now later."""
    method = method.eval()
    with torch.no_grad():
        method.model.output_table[method.tokenizer.end_id] *= 6
        if KINDS[kind][0] == "compressed":
            method.model.output_table[method.tokenizer.eot_id] *= 3
    return method


@every_loop
@torch.no_grad()
def test_answers_are_those_of_each_question_alone_and_computed_anew(
    kind: str, make_method: Callable[..., Method]
) -> None:
    """In batches of 6, of 1, with static caches; against a whole new pass for each token."""
    method = answering(make_method(kind), kind)
    model, tokenizer, loop = method.model, method.tokenizer, method.loop
    assert loop is not None
    checkpoint = as_checkpoint(method, method.last_stage, {}, 0)
    batch = generate(checkpoint, IN_WORDS, 8)
    assert len({generation.n_tokens for generation in batch}) > 1, "too much alike to prove anything"
    static = generate(checkpoint, IN_WORDS, 8, caches=StaticCaches(model.config.context_length))
    for question, found, other in zip(IN_WORDS, batch, static, strict=True):
        (single,) = generate(checkpoint, [question], 8)
        assert single == found == other
        prompt, written = [*tokenizer.encode(question), tokenizer.bot_id], list[int]()
        states = loop.states(found.n_thoughts)
        while len(written) < 8 and tokenizer.end_id not in written:
            expected = alone(model, loop, prompt, states, [tokenizer.eot_id, *written])
            written.append(int(model.logits(expected.text_AD[-1]).argmax()))
        assert found.text == tokenizer.decode(written)
        assert found.n_tokens == found.n_thoughts + len(written)
        latents_KD = torch.stack(alone(model, loop, prompt, states, [tokenizer.eot_id]).latents) if states else None
        for each in (single, found, other):
            assert each.latents_KD is not None
            assert len(each.latents_KD) == states
            if latents_KD is not None:
                torch.testing.assert_close(each.latents_KD, latents_KD, atol=1e-4, rtol=1e-4)


@every_loop
def test_thoughts_of_training_are_those_of_answering(
    kind: str, make_method: Callable[..., Method], problems: list[Problem], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Questions lie in several rectangles there, and gradients are gathered. A loop that is given its thoughts reads
    them as if it had come to them one by one, with a cache."""
    method = make_method(kind)
    loop, model, tokenizer = method.loop, method.model, method.tokenizer
    assert loop is not None
    seen: list[Thoughts] = []
    name = "read_given" if isinstance(loop, GivenLoop) else "think"
    real = getattr(loop, name)

    def spy(*arguments: Any, **named: Any) -> Any:
        found = real(*arguments, **named)
        seen.append(found[0] if isinstance(found, tuple) else found)
        return found

    examples = [method.encode(problem) for problem in problems]
    batch = method.collate(examples, method.last_stage)  # without seeds: at the compression that it answers with
    assert isinstance(batch, ThoughtBatch)
    with monkeypatch.context() as patch:
        patch.setattr(loop, name, spy)
        method(batch, batch.totals)["loss"].backward()
    (training,) = seen
    checkpoint = as_checkpoint(method.eval(), method.last_stage, {}, 0)
    prompts = [example.question for example in examples]
    if not isinstance(loop, GivenLoop):
        with torch.no_grad():
            answering = think_about(checkpoint, prompts)
        assert training.latents.requires_grad
        assert not answering.latents.requires_grad
        torch.testing.assert_close(answering.latents, training.latents.detach(), atol=1e-4, rtol=1e-4)
        return
    text = [[tokenizer.eot_id]] * len(prompts)
    given, latents_BKD = batch.given, training.latents.detach()
    assert given is not None
    k = 0

    def say(hidden_RD: Tensor) -> tuple[Tensor, Tensor]:
        """The head, were it always right: it is asked for the k-th thought of the rows that have one."""
        nonlocal k
        thought_RD = latents_BKD[[row for row, count in enumerate(given.counts) if count > k], k]
        k += 1
        return thought_RD / model.embedding.weight.std(), torch.zeros_like(thought_RD)

    lengths = [len(prompt) - 1 for prompt in prompts]
    x_PD = embed(model, [ids[:-1] for ids in prompts], [ids[-1:] for ids in prompts])
    with torch.no_grad(), monkeypatch.context() as patch:
        patch.setattr(loop.get_submodule("head"), "forward", say)
        thoughts = loop.think(model, x_PD, loop.pack_questions(lengths, given.counts), given.counts, 1)
        found_BD = go_on(model, thoughts, embed(model, text), loop.pack_texts([1] * len(prompts), given.counts))
        torch.testing.assert_close(thoughts.latents, latents_BKD, atol=1e-4, rtol=1e-4)
        packing = loop.pack_given(lengths, given, [1] * len(prompts))
        _, expected_BD = loop.read_given(model, x_PD, given, model.embedding(given.ids_L), embed(model, text), packing)
    torch.testing.assert_close(found_BD, expected_BD, atol=1e-4, rtol=1e-4)


# In bfloat16

NEAR = {"loss": 0.01, "gradient": 0.999, "thoughts": 0.998}
"""By which share losses are off at most (0.5% as measured), and the least cosine between gradients, all numbers of them
taken as one vector, and between thoughts."""

NEAR_MIXED = 0.9
"""The same between mixtures of embeddings, on average: at the edge of the few that are mixed another token may come
in, and what comes after that is another thought."""


@every_loop
def test_bfloat16_is_near(kind: str, make_method: Callable[..., Method], problems: list[Problem]) -> None:
    """Losses and gradient of a step, and thoughts; and it answers. Attention is in float32 on a CPU all the same."""
    for steps in steps_by(kind):
        method = make_method(kind, steps, "gpt2")
        exact, gradients = run_step(method, problems, [range(5)])
        rough, found = run_step(method, problems, [range(5)], torch.bfloat16)
        assert not torch.equal(rough["answer_loss"], exact["answer_loss"]), "is computed in float32"
        for key, value in exact.items():
            if key.endswith("loss"):
                assert rough[key] == pytest.approx(value.item(), rel=NEAR["loss"]), key
        ours, theirs = (torch.cat([x.flatten() for x in each.values()]) for each in (found, gradients))
        assert F.cosine_similarity(ours, theirs, dim=0) > NEAR["gradient"]
    method = make_method(kind, family="gpt2").eval()
    assert method.loop is not None
    checkpoint = as_checkpoint(method, method.last_stage, {}, 0)
    prompts = [method.encode(problem).question for problem in problems]
    with torch.no_grad():
        exact = think_about(checkpoint, prompts).latents
        with autocast(torch.device("cpu"), torch.bfloat16):
            rough = think_about(checkpoint, prompts).latents
            assert all(generation.n_tokens > 0 for generation in generate(checkpoint, IN_WORDS, 4))
    cosine_BK = F.cosine_similarity(exact, rough.float(), dim=-1)
    if method.loop.key == "soft":
        assert cosine_BK.mean() > NEAR_MIXED
    else:
        assert cosine_BK.min() > NEAR["thoughts"]
