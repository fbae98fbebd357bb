"""Docstrings of installed packages as a text stream that is on every machine: the class is the package.

The files are found through the package's metadata and read with ``ast``; no package is imported. A text is the first
paragraphs of a docstring, on one line, with the package's own names masked. The same text is never in two classes nor
twice in one. Which part a text belongs to depends on its own hash alone.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.metadata
import importlib.util
import json
import re
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from continual.disk import write_text
from continual.errors import StateError, StreamError, quoted
from continual.kinds import Objective
from continual.spec import Spec
from continual.streams.folders import Place, cache_folder
from continual.streams.sources.rows import PARTS, Part, Raw, Rows, assemble
from continual.table import TensorTable

PACKAGES = (
    "numpy", "scipy", "scikit-learn", "matplotlib", "torch", "transformers", "pandas", "networkx", "sympy",
)  # fmt: skip
MASK = "this package"

_MODULES = {"scikit-learn": "sklearn", "pyyaml": "yaml", "pillow": "PIL"}
_ALIASES = {
    "numpy": ("np",), "matplotlib": ("mpl", "pyplot", "plt"), "pandas": ("pd",), "networkx": ("nx",),
    "torch": ("pytorch", "aten"), "transformers": ("hugging face", "huggingface"), "scikit-learn": ("scikit learn",),
}  # fmt: skip
_FORMAT = 1
_SPARE = 1.25
_SKIPPED = {"tests", "testing", "test", "_vendor", "vendored", "extern", "externals", "vendor", "__pycache__"}
_HEADING = re.compile(
    r"^\s*(>>>|[-=~^]{3,}\s*$|:param|@|\.\. |"
    r"(args|arguments|parameters|params|returns?|examples?|notes?|raises)\s*:?\s*$)",
    re.IGNORECASE,
)


class RowLimits(Spec):
    """Rows of each class in each part, at most."""

    train: Annotated[int, Field(ge=1)] = 60
    valid: Annotated[int, Field(ge=0)] = 0
    test: Annotated[int, Field(ge=0)] = 40

    @property
    def total(self) -> int:
        return self.train + self.valid + self.test


class DocstringsSource(Spec):
    """Settings of the source ``docstrings``.

    Attributes:
        packages: distributions, in order; None: those of numpy, scipy, scikit-learn, matplotlib, torch, transformers,
            pandas, networkx and sympy that are installed.
        rows_per_class: how many rows of each package at most.
        min_words: shorter texts are left out.
        max_chars: longer texts are cut at a word.
    """

    kind: Literal["docstrings"] = "docstrings"
    packages: list[str] | None = None
    rows_per_class: RowLimits = RowLimits()
    min_words: Annotated[int, Field(ge=1)] = 6
    max_chars: Annotated[int, Field(ge=20)] = 200

    def load(self, place: Place, objective: Objective) -> Rows:
        """The rows, from the cache where they were read before.

        Raises:
            StreamError: a named package is not installed, is named twice, or gives no text.
        """
        names = self._installed()
        texts = {name: self._texts(name) for name in names}
        owners: dict[str, int] = {}
        for found in texts.values():
            for text in found:
                owners[text] = owners.get(text, 0) + 1
        columns: dict[Part, tuple[list[str], list[str]]] = {part: ([], []) for part in PARTS}
        for name, found in texts.items():
            room = {part: getattr(self.rows_per_class, part) for part in PARTS}
            for text in found:
                part = self._part(text)
                if owners[text] == 1 and room[part] > 0:
                    room[part] -= 1
                    columns[part][0].append(text)
                    columns[part][1].append(name)
        raws: dict[Part, Raw] = {
            part: Raw(TensorTable({"text": list(t)}), labels) for part, (t, labels) in columns.items()
        }
        return assemble(raws, objective, "the source 'docstrings'")

    def _installed(self) -> list[str]:
        if self.packages is None:
            return [name for name in PACKAGES if _package_folder(name) is not None]
        if len(set(self.packages)) < len(self.packages):
            raise StreamError(
                f"the source 'docstrings' names a package twice ({quoted(self.packages)}): name each once."
            )
        for name in self.packages:
            if _package_folder(name) is None:
                raise StreamError(
                    f"the package '{name}' is not installed here: install it or leave it out of 'packages'."
                )
        return list(self.packages)

    def _part(self, text: str) -> Part:
        limits = self.rows_per_class
        point = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") / 2**64 * limits.total
        return "test" if point < limits.test else "valid" if point < limits.test + limits.valid else "train"

    def _texts(self, name: str) -> list[str]:
        settings = f"{_FORMAT}/{self.rows_per_class}/{self.min_words}/{self.max_chars}"
        mark = hashlib.sha256(settings.encode()).hexdigest()[:12]
        path = cache_folder() / "docstrings" / f"{name}-{_version(name)}-{mark}.jsonl"
        cached = _read_cache(path)
        if cached is not None:
            return cached
        texts = self._collect(name)
        lines = [json.dumps({"rows": len(texts)}), *(json.dumps({"text": text}) for text in texts)]
        try:
            write_text(path, "\n".join(lines) + "\n")
        except StateError as error:
            warnings.warn(f"the docstrings are not cached: {error}", stacklevel=2)
        return texts

    def _collect(self, name: str) -> list[str]:
        folder = _package_folder(name)
        assert folder is not None
        mask = _mask_pattern(name)
        wanted = {part: getattr(self.rows_per_class, part) * _SPARE for part in PARTS}
        texts: dict[str, None] = {}
        for path in _files(folder):
            for docstring in _docstrings(path):
                text = clean(docstring, mask, self.max_chars)
                if len(text.split()) >= self.min_words and text not in texts:
                    texts[text] = None
                    wanted[self._part(text)] -= 1
            if all(left <= 0 for left in wanted.values()):
                break
        if not texts:
            raise StreamError(f"the package '{name}' has no docstrings that can be used: leave it out of 'packages'.")
        return list(texts)


def clean(docstring: str, mask: re.Pattern[str], max_chars: int) -> str:
    """The first paragraphs up to ``max_chars`` on one line: no markup, no sections, the package's own names masked."""
    kept: list[str] = []
    for line in docstring.strip().splitlines():
        if _HEADING.match(line):
            if kept and not line.strip().startswith((">>>", ":", "@", "..")) and set(line.strip()) <= set("-=~^"):
                kept.pop()
            break
        kept.append(line)
    text = " ".join(" ".join(kept).split())
    text = re.sub(r":[a-z:]+:`~?([^`]*)`", r"\1", text)
    text = mask.sub(MASK, re.sub(r"[`*]+", "", text))
    if len(text) > max_chars:
        text = text[: max_chars + 1].rsplit(" ", 1)[0]
    return text.strip()


def _mask_pattern(name: str) -> re.Pattern[str]:
    names = {name, _module(name), name.replace("-", "_"), *_ALIASES.get(name, ())}
    long = [re.escape(n) for n in sorted(names, key=len, reverse=True) if len(n) > 3]
    short = [rf"\b{re.escape(n)}\b" for n in sorted(names) if len(n) <= 3]
    return re.compile("|".join([*(rf"[\w.]*{n}[\w]*(?:\.\w+)*" for n in long), *short]), re.IGNORECASE)


def _module(name: str) -> str:
    return _MODULES.get(name.lower(), name.replace("-", "_"))


def _package_folder(name: str) -> Path | None:
    module = _module(name)
    if "." in module or not module.isidentifier():
        return None
    spec = importlib.util.find_spec(module)
    locations: Sequence[str] = (spec.submodule_search_locations or ()) if spec is not None else ()
    return next((Path(location) for location in locations if Path(location).is_dir()), None)


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "0"


def _files(folder: Path) -> Iterator[Path]:
    """The package's files in an order that depends on their names alone and mixes its subpackages."""
    paths = [path for path in folder.rglob("*.py") if not _SKIPPED & set(path.relative_to(folder).parts[:-1])]
    own = [path for path in paths if not path.name.startswith(("test_", "conftest"))]
    return iter(sorted(own, key=lambda p: hashlib.sha256(p.relative_to(folder).as_posix().encode()).digest()))


def _docstrings(path: Path) -> list[str]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(path.read_bytes())
    except (OSError, SyntaxError, ValueError, RecursionError):
        return []
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    nodes = [node for node in ast.walk(tree) if isinstance(node, kinds)]
    public = [node for node in nodes if isinstance(node, ast.Module) or not node.name.startswith("_")]
    return [found for node in public if (found := ast.get_docstring(node))]


def _read_cache(path: Path) -> list[str] | None:
    try:
        header, *lines = path.read_text(encoding="utf-8").splitlines()
        texts = [str(json.loads(line)["text"]) for line in lines]
        return texts if json.loads(header)["rows"] == len(texts) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None
