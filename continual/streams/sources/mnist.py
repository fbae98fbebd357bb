"""MNIST (LeCun et al. 1998) in the layout that torchvision writes: ``MNIST/raw/train-images-idx3-ubyte`` and so on.

The files are read with numpy; torchvision is needed only to download them.
"""

from __future__ import annotations

import gzip
import importlib
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import numpy.typing as npt
import torch
from pydantic import Field

from continual.errors import StreamError
from continual.kinds import Objective
from continual.spec import Spec
from continual.streams.folders import Place, cache_folder
from continual.streams.sources.digits import hold_out
from continual.streams.sources.rows import Part, Raw, Rows, assemble
from continual.table import TensorTable

_RAW = Path("MNIST") / "raw"
_FILES = {"train": "train", "test": "t10k"}


class MnistSource(Spec):
    """Settings of the source ``mnist``: 60 000 training rows and the official 10 000 test rows, pixels in [0, 1].

    Attributes:
        flatten: inputs are float32 (N, 784); otherwise (N, 1, 28, 28).
        valid_share: share of the training rows set aside for choosing the model.
        download: fetch the files into the cache where they are nowhere else (needs torchvision).
    """

    kind: Literal["mnist"] = "mnist"
    flatten: bool = True
    valid_share: Annotated[float, Field(ge=0, lt=1)] = 0.0
    download: bool = False

    def load(self, place: Place, objective: Objective) -> Rows:
        """The rows.

        Raises:
            StreamError: the files are nowhere, or are not MNIST.
        """
        folder = self._folder(place)
        raws: dict[Part, Raw] = {}
        raws |= hold_out(self._read(folder, "train"), self.valid_share)
        raws["test"] = self._read(folder, "test")
        return assemble(raws, objective, "the source 'mnist'", trusted=True)

    def _read(self, folder: Path, part: str) -> Raw:
        images = read_idx(folder / f"{_FILES[part]}-images-idx3-ubyte", 3)
        labels = read_idx(folder / f"{_FILES[part]}-labels-idx1-ubyte", 1)
        if len(images) != len(labels):
            raise StreamError(
                f"'{folder}' has {len(images)} images and {len(labels)} labels for {part}: fetch it again."
            )
        pixels = torch.from_numpy(images).to(torch.float32).div_(255)
        shape = (len(images), -1) if self.flatten else (len(images), 1, *images.shape[1:])
        return Raw(TensorTable({"inputs": pixels.reshape(shape)}), torch.from_numpy(labels).to(torch.int64))

    def _folder(self, place: Place) -> Path:
        found = place.find(_RAW, _is_raw) or place.find(Path("raw"), _is_raw)
        if found is not None:
            return found
        if not self.download:
            looked = ", ".join(f"'{path}'" for path in place.candidates(_RAW))
            raise StreamError(
                f"MNIST was not found (looked in {looked}): name its folder with --data or the environment variable "
                "CONTINUAL_DATA, or set 'download: true' in the source."
            )
        try:
            mnist = importlib.import_module("torchvision.datasets").MNIST
        except (ImportError, AttributeError) as error:
            raise StreamError(
                "'download: true' needs torchvision: install it, or name a folder with --data."
            ) from error
        root = place.data or cache_folder()
        try:
            mnist(str(root), download=True)
        except (OSError, RuntimeError) as error:
            raise StreamError(f"MNIST could not be downloaded ({error}): name a folder with --data.") from error
        return root / _RAW


def read_idx(path: Path, dimensions: int) -> npt.NDArray[np.uint8]:
    """An IDX file of bytes, plain or gzipped (``.gz``).

    Raises:
        StreamError: it is not there, has another form, or is cut short.
    """
    zipped = path.with_name(path.name + ".gz")
    try:
        content = path.read_bytes() if path.is_file() else gzip.decompress(zipped.read_bytes())
    except (OSError, EOFError) as error:
        raise StreamError(f"'{path}' could not be read ({error}): fetch MNIST again.") from error
    header = np.frombuffer(content[: 4 * (dimensions + 1)], dtype=">u4")
    if len(header) != dimensions + 1 or header[0] != 0x800 + dimensions:
        raise StreamError(f"'{path}' is not an IDX file of {dimensions} dimensions: fetch MNIST again.")
    shape = [int(size) for size in header[1:]]
    body = np.frombuffer(content, dtype=np.uint8, offset=4 * (dimensions + 1))
    if body.size != int(np.prod(shape)):
        raise StreamError(f"'{path}' is cut short ({body.size} of {int(np.prod(shape))} bytes): fetch MNIST again.")
    return body.reshape(shape).copy()


def _is_raw(folder: Path) -> bool:
    first = folder / "train-images-idx3-ubyte"
    return first.is_file() or first.with_name(first.name + ".gz").is_file()
