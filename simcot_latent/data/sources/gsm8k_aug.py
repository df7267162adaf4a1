"""GSM8K-Aug: 385,620 machine-written variations of GSM8K's training problems, steps only, from the authors of iCoT
(https://arxiv.org/abs/2405.14838, https://github.com/da03/Internalize_CoT_Step_by_Step)."""

from dataclasses import dataclass
from typing import ClassVar

from simcot_latent.data.problem import ANSWER_MARK
from simcot_latent.data.sources.files import Row, WrittenSolutions


@dataclass
class GSM8KAug(WrittenSolutions):
    """Lines of `question||<<..>> <<..>> #### answer`, or rows of `{question, steps, answer}`.

    In a row, the steps may also be one text under `cot`, and the answer may be a number or have its `####` in front:
    so do the copies on the hub (`zen-E/GSM8k-Aug`, `whynlp/gsm8k-aug`). The rationale is the steps as they are written,
    joined by a space.
    """

    hub_id: str = "zen-E/GSM8k-Aug"

    suffixes: ClassVar[tuple[str, ...]] = (".txt", ".jsonl", ".json", ".parquet")
    shape: ClassVar[str] = '"question||<<..>> <<..>> #### answer", or an object with "question", "steps" and "answer"'

    def read(self, row: Row) -> tuple[str, str]:
        if not isinstance(row.value, str):
            return self._object(row)
        question, mark, solution = row.value.rpartition("||")
        if not mark:
            raise self.broken(row, 'no "||" after the question')
        return question, solution

    def _object(self, row: Row) -> tuple[str, str]:
        fields = self.fields(row)
        if "steps" in fields:
            steps = fields["steps"]
            if not isinstance(steps, list) or not all(isinstance(step, str) for step in steps):
                raise self.broken(row, '"steps" is not a list of texts')
            rationale = " ".join(steps)
        elif "cot" in fields:
            rationale = self.text(row, "cot")
        else:
            raise self.broken(row, 'no "steps"')
        answer = fields.get("answer")
        if isinstance(answer, int | float) and not isinstance(answer, bool):
            answer = str(answer)
        else:
            answer = self.text(row, "answer").rpartition(ANSWER_MARK)[2]
        return self.text(row, "question"), f"{rationale} {ANSWER_MARK} {answer}"
