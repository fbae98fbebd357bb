"""JSONL, CSV and Parquet files: one for each part, or one from which shares are taken."""

from __future__ import annotations

import codecs
import hashlib
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import numpy as np
import torch
from pydantic import Field, PositiveInt, model_validator

from continual.errors import StreamError, quoted
from continual.kinds import Objective
from continual.spec import Spec
from continual.streams.content import row_keys
from continual.streams.folders import Place, cache_folder
from continual.streams.sources.cells import numbered, read_options
from continual.streams.sources.rows import PARTS, Part, Raw, Rows, assemble, take
from continual.streams.sources.several import at_most, one_of
from continual.streams.sources.tabular import TabularSource, decodable, quiet

if TYPE_CHECKING:
    import datasets

SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")
PART_NAMES: dict[Part, tuple[str, ...]] = {
    "train": ("train", "training"),
    "valid": ("valid", "val", "validation", "dev"),
    "test": ("test", "testing"),
}
_CHUNK = 2**20


class Shares(Spec):
    """Shares of the training rows that become other parts, by a hash of the row id (without one, of the content)."""

    valid: Annotated[float, Field(ge=0, lt=1)] = 0.0
    test: Annotated[float, Field(ge=0, lt=1)] = 0.0

    @model_validator(mode="after")
    def _leaves_training_rows(self) -> Shares:
        if self.valid + self.test >= 1:
            raise ValueError("the shares add up to 1 or more and leave no training rows")
        return self


class Most(Spec):
    """Rows that a part keeps at most, of each folder: those of smallest hash of their content; null keeps all."""

    train: PositiveInt | None = None
    valid: PositiveInt | None = None
    test: PositiveInt | None = None


class FilesSource(TabularSource):
    """Settings of the source ``files``; the columns are those of :class:`TabularSource`.

    Attributes:
        path: a file with all rows, or a folder with ``train``, ``valid`` (or ``val``) and ``test`` files; where it
            is not given, the folder or file named with ``--data``. A path with a suffix names one file, for which the
            files of a folder are never taken.
        train, valid, test: files of the parts, where they have other names (in the folder ``path``).
        folders: data sets that lie in a folder each, below ``path``; a row's domain is its folder then, and its class
            carries the folder's name (``agnews/World``).
        shares: parts taken from the training rows.
        most: rows of each part (of each folder) that are kept.
    """

    kind: Literal["files"] = "files"
    path: str | None = None
    train: str | None = None
    valid: str | None = None
    test: str | None = None
    folders: list[str] | None = Field(default=None, min_length=1)
    shares: Shares = Shares()
    most: Most = Most()

    @model_validator(mode="after")
    def _domain_is_the_folder(self) -> FilesSource:
        if self.folders is not None and (self.domain is not None or self.train or self.valid or self.test):
            raise ValueError(
                "with folders, a row's domain is its folder and each has its own parts: leave domain, "
                "train, valid and test out"
            )
        if self.folders is not None and len({str(Path(name)) for name in self.folders}) < len(self.folders):
            raise ValueError("folders names one twice")
        return self

    def load(self, place: Place, objective: Objective) -> Rows:
        """The rows.

        Raises:
            StreamError: a file or column is missing, or a row cannot be used.
        """
        with decodable("the source 'files'"):
            return self._rows(place, objective)

    def _rows(self, place: Place, objective: Objective) -> Rows:
        if self.folders is None:
            raws = self.parts(self._paths(place, self.path), objective)
        else:
            each = {
                str(Path(name)): self.parts(self._paths(place, self._inside(name)), objective) for name in self.folders
            }
            present = [part for part in PARTS if any(part in raws for raws in each.values())]
            raws = {
                part: one_of({name: raws[part] for name, raws in each.items() if part in raws}, objective)
                for part in present
            }
        return assemble(raws, objective, "the source 'files'", overlap=self.overlap)

    def _inside(self, folder: str) -> str:
        """A folder below ``path``, and never one outside."""
        if Path(folder).is_absolute() or ".." in Path(folder).parts:
            raise StreamError(f"the folder '{folder}' does not lie below 'path': name it by its place there.")
        return str(Path(self.path or "") / folder)

    def parts(self, paths: dict[Part, Path], objective: Objective) -> dict[Part, Raw]:
        """Each of these files as a part, with the shares taken from ``train``."""
        raws: dict[Part, Raw] = {}
        for part, path in paths.items():
            raws[part] = self.raw(read_file(path, self.string_columns(objective)), objective, f"'{path}'")
        if objective == "classification":
            raws = numbered(raws, [part for part, path in paths.items() if path.suffix == ".csv"])
        for part in ("valid", "test"):
            if part in raws and not len(raws[part].table):
                emptied = raws.pop(part)
                raws["train"] = replace(raws["train"], notes=(*raws["train"].notes, *emptied.notes))
            if getattr(self.shares, part) and part in raws:
                raise StreamError(f"the source 'files' has {part} rows and 'shares.{part}' as well: use one of them.")
        raws |= split_off(raws["train"], self.shares)
        return {
            part: at_most(raw, getattr(self.most, part), f"'{paths.get(part, paths['train'])}', {part}")
            for part, raw in raws.items()
        }

    def _paths(self, place: Place, folder: str | None) -> dict[Part, Path]:
        named = {part: getattr(self, part) for part in PARTS if getattr(self, part) is not None}
        if named:
            root = Path(self.path or "")
            found = {part: place.find(root / name, Path.is_file) for part, name in named.items()}
            for part, path in found.items():
                if path is None:
                    raise StreamError(
                        f"the {part} file '{root / named[part]}' was not found: {self._advice(place, root)}"
                    )
            if "train" not in found:
                raise StreamError("the source 'files' names no 'train' file: name one.")
            return {part: path for part, path in found.items() if path is not None}
        if folder is None and place.data is None:
            raise StreamError("the source 'files' has no 'path': name one there, or a folder with --data.")
        relative = Path(folder or "")

        def fits(found: Path) -> bool:
            whole = not relative.suffix or found.name == relative.name
            return found.is_file() or (whole and bool(_parts_in(found)))

        path = place.find(relative, fits)
        if path is None:
            raise StreamError(
                f"no training file was found for '{folder or place.data}' (a folder needs one called train, with "
                f"{quoted(SUFFIXES)}): {self._advice(place, relative)}"
            )
        return {"train": path} if path.is_file() else _parts_in(path)

    def _advice(self, place: Place, relative: Path) -> str:
        looked = quoted(dict.fromkeys(path.resolve() for path in place.candidates(relative)))
        return f"looked in {looked}; name the folder with --data or the environment variable CONTINUAL_DATA."


def split_off(train: Raw, shares: Shares) -> dict[Part, Raw]:
    """``train`` without the shares, and the parts made of them; adding rows never changes where the others go."""
    if not (shares.valid or shares.test):
        return {"train": train}
    keys = row_keys(train.table) if train.ids is None else np.asarray(train.ids).astype(np.int64)
    place_N = torch.from_numpy(_uniform(keys))
    is_test, is_valid = place_N < shares.test, place_N >= 1 - shares.valid
    raws: dict[Part, Raw] = {"train": take(train, (~is_test & ~is_valid).nonzero().flatten())}
    for part, chosen in (("valid", is_valid), ("test", is_test)):
        if bool(chosen.any()):
            raws["valid" if part == "valid" else "test"] = take(train, chosen.nonzero().flatten())
    return raws


def read_file(path: Path, strings: Collection[str] = ()) -> datasets.Dataset:
    """A JSONL, CSV or Parquet file, memory-mapped from the cache, where it is found by the SHA-256 of its content.

    Args:
        path: of the file.
        strings: columns of a CSV file (those that it has) whose cells are taken as they stand; an empty one is None.

    Raises:
        StreamError: another kind of file, or one that cannot be read.
    """
    import datasets

    readers = {
        ".jsonl": datasets.Dataset.from_json,
        ".json": datasets.Dataset.from_json,
        ".csv": datasets.Dataset.from_csv,
        ".parquet": datasets.Dataset.from_parquet,
    }
    if path.suffix not in readers:
        raise StreamError(f"'{path}' is no file that can be read: allowed are {quoted(SUFFIXES)}.")
    if path.stat().st_size == 0:
        raise StreamError(f"'{path}' is empty: give it rows.")
    try:
        content = _digest(path)
        options = read_options(path, strings) if path.suffix == ".csv" else {}
        with quiet(log=False):
            return readers[path.suffix](str(path), cache_dir=str(cache_folder() / "files" / content), **options)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise StreamError(_unreadable(path, error.__cause__ or error)) from error


def _unreadable(path: Path, error: BaseException) -> str:
    reason = " ".join(str(error).split())
    if isinstance(error, UnicodeDecodeError):
        return f"'{path}' is not UTF-8 ({error.reason}): save it as UTF-8."
    if "corresponds to no data" in reason:
        return f"'{path}' holds no rows: give it some."
    if isinstance(error, OSError) and error.errno is not None:
        return (
            f"'{path}' could not be taken into the cache '{cache_folder()}' ({reason}): free some space, or name another "
            "cache folder in the environment variable CONTINUAL_CACHE."
        )
    return f"'{path}' could not be read ({reason}): mend the file."


def _digest(path: Path) -> str:
    """SHA-256 of a file; one of text is decoded on the way, which raises UnicodeDecodeError where it is not UTF-8."""
    digest = hashlib.sha256()
    decoder = codecs.getincrementaldecoder("utf-8")() if path.suffix != ".parquet" else None
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
            if decoder is not None:
                decoder.decode(chunk)
    if decoder is not None:
        decoder.decode(b"", final=True)
    return digest.hexdigest()


def _parts_in(folder: Path) -> dict[Part, Path]:
    found: dict[Part, Path] = {}
    for part, names in PART_NAMES.items():
        for path in (folder / f"{name}{suffix}" for name in names for suffix in SUFFIXES):
            if path.is_file():
                found.setdefault(part, path)
    return found if "train" in found else {}


def _uniform(keys: np.ndarray[tuple[int], np.dtype[np.int64]]) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    """A number in [0, 1) for each key (the finaliser of SplitMix64, Steele et al. 2014)."""
    mixed = keys.astype(np.uint64)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return ((mixed ^ (mixed >> np.uint64(31))) >> np.uint64(11)).astype(np.float64) / 2.0**53
