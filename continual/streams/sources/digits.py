"""The 1797 handwritten digits that come with scikit-learn (Alpaydin & Kaynak 1998, UCI): 8 × 8 pixels, ten classes."""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from pydantic import Field

from continual.kinds import Objective
from continual.spec import Spec
from continual.streams.folders import Place
from continual.streams.sources.rows import Part, Raw, Rows, assemble, stratified, take
from continual.table import TensorTable

_SPLIT_SEED = 20240229


class DigitsSource(Spec):
    """Settings of the source ``digits``: inputs float32 (N, 64) in [0, 1]; 25 % of every class are test rows.

    Attributes:
        valid_share: share of the training rows set aside for choosing the model.
    """

    kind: Literal["digits"] = "digits"
    valid_share: Annotated[float, Field(ge=0, lt=1)] = 0.0

    def load(self, place: Place, objective: Objective) -> Rows:
        """The rows; the split is the same on every machine and for every seed."""
        from sklearn.datasets import load_digits

        pixels, digits = load_digits(return_X_y=True)
        labels = torch.from_numpy(digits).to(torch.int64)
        whole = Raw(TensorTable({"inputs": torch.from_numpy(pixels).to(torch.float32) / 16}), labels)
        test = stratified(labels, 0.25, _SPLIT_SEED)
        raws: dict[Part, Raw] = {"test": take(whole, test.nonzero().flatten())}
        raws |= hold_out(take(whole, (~test).nonzero().flatten()), self.valid_share)
        return assemble(raws, objective, "the source 'digits'", trusted=True)


def hold_out(train: Raw, valid_share: float) -> dict[Part, Raw]:
    """``train``, and ``valid`` where a share of every class is set aside."""
    if valid_share == 0:
        return {"train": train}
    assert isinstance(train.labels, torch.Tensor)
    valid = stratified(train.labels, valid_share, _SPLIT_SEED + 1)
    return {"train": take(train, (~valid).nonzero().flatten()), "valid": take(train, valid.nonzero().flatten())}
