"""Which group of thoughts says which step."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from simcot_latent.config import LatentConfig, MethodConfig, RunConfig
from simcot_latent.curricula.base import Stage
from simcot_latent.data.format import AnswerFormat
from simcot_latent.data.problem import Problem
from simcot_latent.data.tokenizer import Tokenizer
from simcot_latent.errors import UserError
from simcot_latent.method import Method, ThoughtBatch
from simcot_latent.model.gpt import GPT
from simcot_latent.terms.step_decoder import StepBatch
from simcot_latent.terms.steps import StepGroups, holds_step

LAST = Stage(3, first_written=None)


@pytest.mark.parametrize(
    ("steps", "surplus", "missing", "groups"),
    [
        # As many steps as groups: the other two choices make no difference.
        ("abc", "merge", "mask", ["a", "b", "c"]),
        ("abc", "merge", "answer", ["a", "b", "c"]),
        ("abc", "drop", "mask", ["a", "b", "c"]),
        ("abc", "drop", "answer", ["a", "b", "c"]),
        # More.
        ("abcde", "merge", "mask", ["a", "b", "cde"]),
        ("abcde", "merge", "answer", ["a", "b", "cde"]),
        ("abcde", "drop", "mask", ["a", "b", "c"]),
        ("abcde", "drop", "answer", ["a", "b", "c"]),
        # Fewer.
        ("a", "merge", "mask", ["a", None, None]),
        ("a", "merge", "answer", ["a", "!", "!"]),
        ("a", "drop", "mask", ["a", None, None]),
        ("a", "drop", "answer", ["a", "!", "!"]),
        # None.
        ("", "merge", "mask", [None, None, None]),
        ("", "merge", "answer", ["!", "!", "!"]),
        ("", "drop", "mask", [None, None, None]),
        ("", "drop", "answer", ["!", "!", "!"]),
        # A single group.
        ("abc", "merge", "mask", ["abc"]),
        ("abc", "drop", "answer", ["a"]),
        ("", "merge", "answer", ["!"]),
    ],
)
def test_alignment(steps: str, surplus: str, missing: str, groups: list[str | None]) -> None:
    """Both flavours of SIM-CoT and the two between them; `!` is the answer."""
    found = StepGroups(1, surplus, missing).targets(list(steps), "!", len(groups), LAST)
    assert found == [None if group is None else list(group) for group in groups]


@pytest.mark.parametrize("surplus", ["merge", "drop"])
@pytest.mark.parametrize(
    ("steps", "missing", "groups"),
    [
        ("abcde", "mask", ["a", "b"]),
        ("abcde", "answer", ["a", "b"]),
        ("ab", "answer", ["a", "b"]),
        ("a", "mask", ["a", None]),
        ("a", "answer", ["a", "!"]),
        ("", "mask", [None, None]),
    ],
)
def test_steps_that_are_still_written_are_nobodys(
    steps: str, surplus: str, missing: str, groups: list[str | None]
) -> None:
    """Of the stage in which thoughts replace two steps: those that follow are text, not surplus."""
    found = StepGroups(1, surplus, missing).targets(list(steps), "!", 2, Stage(2, first_written=2))
    assert found == [None if group is None else list(group) for group in groups]


@pytest.mark.parametrize("missing", ["mask", "answer"])
def test_no_groups_say_nothing(missing: str) -> None:
    """A row of the stage without thoughts, among others; and, were no step written either, no group to merge into."""
    for stage in (Stage(), Stage(0, first_written=None)):
        assert StepGroups(1, "merge", missing).targets(list("abc"), "!", 0, stage) == []


@pytest.mark.parametrize(("per_step", "states", "groups"), [(1, 0, 0), (1, 3, 3), (2, 6, 3), (5, 10, 2)])
def test_so_many_states_make_so_many_groups(per_step: int, states: int, groups: int) -> None:
    assert StepGroups(per_step).count(states) == groups


def test_what_is_to_be_said_as_text(problems: list[Problem]) -> None:
    """A step per line; the answer with its mark, or nothing."""
    two, none, _, four, _ = problems
    answers = AnswerFormat(thinks=True, answer_mark="Answer:")
    says, masks = StepGroups(1, "merge", "answer"), StepGroups(1, "drop", "mask")
    assert says.gold(two, 3, LAST, answers) == ["<<3*4=12>>", "<<12-2=10>>", "Answer: 10"]
    assert masks.gold(two, 3, LAST, answers) == ["<<3*4=12>>", "<<12-2=10>>", None]
    assert says.gold(none, 2, LAST, answers) == ["Answer: 4", "Answer: 4"]
    assert says.gold(four, 3, LAST, answers) == ["<<5*7=35>>", "<<35-12=23>>", "<<23*2=46>>\n<<46-6=40>>"]
    assert masks.gold(four, 3, LAST, answers) == ["<<5*7=35>>", "<<35-12=23>>", "<<23*2=46>>"]
    assert says.gold(four, 1, Stage(1, first_written=1), answers) == ["<<5*7=35>>"]


def test_the_last_step_is_left_out(
    make_model: Callable[..., GPT], make_run: Callable[..., RunConfig], tokenizer: Tokenizer, problems: list[Problem]
) -> None:
    """By the written pass, the decoder and gold alike; what else is written stays."""
    latent = LatentConfig(n_latents=2, missing="mask", drop_last_step=True)
    config = MethodConfig.simcot(latent, curriculum="none", written="joint")
    model = make_model("llama", vocab_size=tokenizer.n_vocab)
    method = Method(model, tokenizer, make_run(rationale="equations"), config)
    golds = [method.groups.gold(problem, 2, LAST, AnswerFormat(thinks=True)) for problem in problems]
    assert golds == [
        ["<<3*4=12>>", None],  # of two steps
        [None, None],  # of none
        [None, None],  # of one
        ["<<5*7=35>>", "<<35-12=23>>\n<<23*2=46>>"],
        ["<<1+1=2>>", "<<2+1=3>>"],
    ]
    batch = method.collate([method.encode(problem) for problem in problems], method.last_stage)
    assert isinstance(batch, ThoughtBatch)
    assert batch.written is not None
    steps = ["<<3*4=12>>\n", "", "", "<<5*7=35>>\n<<35-12=23>>\n<<23*2=46>>\n", "<<1+1=2>>\n<<2+1=3>>\n"]
    written = "".join(f"{text}#### {problem.answer}" for text, problem in zip(steps, problems, strict=True))
    labels = [token for token in batch.written.targets.label_M.tolist() if token != tokenizer.end_id]
    assert tokenizer.decode(labels) == written
    taught = batch.terms["step"]
    assert isinstance(taught, StepBatch)
    said = [text for gold in golds for text in gold if text is not None]
    assert tokenizer.decode(taught.steps.ids_L.tolist()) == "".join(said)
    with pytest.raises(UserError, match=r"rationale=natural: must be equations with latent\.drop_last_step=true"):
        Method(model, tokenizer, make_run(rationale="natural"), config)
    with pytest.raises(UserError, match=r"latent\.missing=answer: must be mask with latent\.drop_last_step=true"):
        LatentConfig(missing="answer", drop_last_step=True)


def test_which_groups_hold_a_step(problems: list[Problem]) -> None:
    """The others say the answer, or nothing."""
    assert [[holds_step(problem, group) for group in range(3)] for problem in problems] == [
        [True, True, False],
        [False, False, False],
        [True, False, False],
        [True, True, True],
        [True, True, True],
    ]


@pytest.mark.parametrize(
    ("key", "value", "right"),
    [
        ("latents_per_step", 0, "at least 1"),
        ("surplus", "keep", "merge"),
        ("missing", "question", "answer"),
    ],
)
def test_impossible_groups_are_refused(key: str, value: object, right: str) -> None:
    with pytest.raises(UserError, match=rf"groups\.{key}={value}: must be .*{right}"):
        StepGroups(**{key: value})  # type: ignore[arg-type]
