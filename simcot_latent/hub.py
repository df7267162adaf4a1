"""Folders from and to the Hugging Face hub. What is in them is for others to know."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelHubMixin, snapshot_download
from huggingface_hub.errors import (
    HFValidationError,
    HTTPError,  # pyright: ignore[reportPrivateImportUsage]  # of whichever network library its version uses
)

from simcot_latent.config import one_line
from simcot_latent.errors import UserError

CARD = """---
{{ card_data }}
---

# {{ title }}

{{ summary }}

```python
import simcot_latent as sl

checkpoint = sl.Checkpoint.from_pretrained("{{ title }}")
question = (
    "Eva wins 6 marbles. She wins 3 more marbles. Then she buys 2 more marbles. "
    "How many marbles does Eva have in the end?"
)
print(sl.answer(checkpoint, [question]))
```
"""


class HubFolder(
    ModelHubMixin,
    library_name="simcot_latent",
    pipeline_tag="text-generation",
    tags=["latent-reasoning"],
    model_card_template=CARD,
):
    """A model folder in `huggingface_hub`'s hands; see
    https://huggingface.co/docs/huggingface_hub/guides/integrations.

    Args:
        write: writes the folder's files.
        summary: what the model card says of them.
    """

    # Where there is none, the mixin makes a configuration of the constructor's arguments.
    _hub_mixin_config = {}  # noqa: RUF012

    def __init__(self, write: Callable[[Path], None], summary: str) -> None:
        self.write, self.summary = write, summary

    def _save_pretrained(self, save_directory: Path) -> None:
        self.write(save_directory)

    def generate_model_card(self, *args: Any, **kwargs: Any) -> ModelCard:
        return super().generate_model_card(*args, summary=self.summary, **kwargs)

    def save(self, folder: str | Path) -> None:
        """Writes what `push` uploads."""
        self.save_pretrained(folder, model_card_kwargs={"title": Path(folder).name})

    def push(self, repo_id: str, **options: Any) -> str:
        """Uploads the files and a model card; the address of the commit. See `Checkpoint.push_to_hub`."""
        with hub_errors(f"repo_id={repo_id}: cannot be pushed to the hub"):
            return self.push_to_hub(repo_id, model_card_kwargs={"title": repo_id}, **options)


def download(source: str, files: Sequence[str], **options: Any) -> Path:
    """The folder of a repository (`owner/name`) with those of its files that match a pattern.

    Args:
        options: of `huggingface_hub.snapshot_download`.

    Raises:
        UserError: there is none, or the hub cannot be reached.
    """
    with hub_errors(f"source={source}: neither a checkpoint folder nor (as owner/name) one that the hub gives"):
        return Path(snapshot_download(source, allow_patterns=list(files), **options))


@contextmanager
def hub_errors(what: str) -> Iterator[None]:
    """Turns whatever goes wrong on the way to the hub into a `UserError` of one line."""
    try:
        yield
    except (OSError, HTTPError, HFValidationError) as error:
        raise UserError(f"{what} ({one_line(str(error))})") from error
