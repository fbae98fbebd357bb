"""A data set of the Hugging Face Hub, or a folder that ``datasets`` wrote with ``save_to_disk``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from continual.errors import StreamError, quoted
from continual.kinds import Objective
from continual.streams.folders import Place
from continual.streams.sources.files import PART_NAMES, Shares, split_off
from continual.streams.sources.rows import Part, Raw, Rows, assemble
from continual.streams.sources.tabular import TabularSource, decodable, quiet

if TYPE_CHECKING:
    import datasets


class HubSource(TabularSource):
    """Settings of the source ``hub``; the columns are those of :class:`TabularSource`.

    Attributes:
        name: of the data set on the Hub, or a folder written by ``save_to_disk``; a folder is taken first.
        config: which of several data sets under that name.
        revision: commit or tag on the Hub.
        splits: what the parts are called there, where it is not ``train``, ``valid`` (``validation``, ``val``,
            ``dev``), ``test``.
        shares: parts taken from the training rows.
    """

    kind: Literal["hub"] = "hub"
    name: str
    config: str | None = None
    revision: str | None = None
    splits: dict[Part, str] = Field(default_factory=dict)
    shares: Shares = Shares()

    def load(self, place: Place, objective: Objective) -> Rows:
        """The rows.

        Raises:
            StreamError: the data set cannot be had, a part or column is missing, or a row cannot be used.
        """
        with decodable(f"'{self.name}'"):
            return self._rows(place, objective)

    def _rows(self, place: Place, objective: Objective) -> Rows:
        found = self._dataset(place)
        raws: dict[Part, Raw] = {}
        for part, aliases in PART_NAMES.items():
            names = [self.splits[part]] if part in self.splits else [name for name in aliases if name in found]
            if part in self.splits and names[0] not in found:
                raise StreamError(f"'{self.name}' has no split '{names[0]}': it has {quoted(found)}.")
            if names:
                raws[part] = self.raw(found[names[0]], objective, f"'{self.name}', {names[0]}")
        if "train" not in raws:
            raise StreamError(
                f"'{self.name}' has no training split: name it in 'splits.train'; it has {quoted(found)}."
            )
        for part in ("valid", "test"):
            if getattr(self.shares, part) and part in raws:
                raise StreamError(f"'{self.name}' has {part} rows and 'shares.{part}' as well: use one of them.")
        raws |= split_off(raws["train"], self.shares)
        return assemble(raws, objective, f"'{self.name}'", overlap=self.overlap)

    def _dataset(self, place: Place) -> dict[str, datasets.Dataset]:
        import datasets

        folder = place.find(Path(self.name), _is_saved)
        try:
            with quiet():
                if folder is not None:
                    found = datasets.load_from_disk(str(folder))
                else:
                    found = datasets.load_dataset(self.name, self.config, revision=self.revision)
        except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
            reason = " ".join(str(error).split())
            raise StreamError(
                f"the data set '{self.name}' could not be loaded ({reason}): check the name and the connection, or "
                "name a folder written by save_to_disk."
            ) from error
        return dict(found) if isinstance(found, dict) else {"train": found}


def _is_saved(folder: Path) -> bool:
    return (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file()
