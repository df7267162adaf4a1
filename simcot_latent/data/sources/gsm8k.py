"""GSM8K: grade-school word problems with solutions written by people (https://arxiv.org/abs/2110.14168)."""

from dataclasses import dataclass
from typing import ClassVar

from simcot_latent.data.sources.files import Row, WrittenSolutions


@dataclass
class GSM8K(WrittenSolutions):
    """Rows of `{question, answer}`, where the answer is the written solution and ends in `#### 72`."""

    hub_id: str = "openai/gsm8k"
    hub_config: str | None = "main"

    suffixes: ClassVar[tuple[str, ...]] = (".jsonl", ".json", ".parquet")
    shape: ClassVar[str] = 'an object with "question" and "answer"'

    def read(self, row: Row) -> tuple[str, str]:
        return self.text(row, "question"), self.text(row, "answer")
