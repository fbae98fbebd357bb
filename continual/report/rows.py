"""The final score of every test row, as a run left it in ``scores.safetensors``.

Letters: C cells, one for each test row of each experience.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from continual.errors import StateError
from continual.report.load import SCORES, Result


@dataclass(frozen=True)
class FinalScores:
    """After the last update, in the order of the row ids.

    Attributes:
        rows: row ids, int64 (C,).
        scores: float64; the final score of the run is the sum of ``weights * scores``.
        weights: one over experiences × rows of the experience, float64 (C,).
    """

    rows: NDArray[np.int64]
    scores: NDArray[np.float64]
    weights: NDArray[np.float64]


def final_scores(run: Result) -> FinalScores | None:
    """The scores of a run; None where it left none, or not of every experience after its last update.

    Raises:
        StateError: the file is damaged.
    """
    path = None if run.folder is None else run.folder / SCORES
    if path is None or not path.is_file():
        return None
    last, count = len(run.matrix) - 1, len(run.experiences)
    rows, scores, weights = [], [], []
    try:
        with safe_open(path, "numpy") as file:
            names = set(file.keys())
            for place in range(count):
                if not {f"{place}/rows", f"{place}/{last}/{run.score}"} <= names:
                    return None
                rows.append(file.get_tensor(f"{place}/rows").astype(np.int64))
                scores.append(file.get_tensor(f"{place}/{last}/{run.score}").astype(np.float64))
                if not len(rows[-1]) or rows[-1].shape != scores[-1].shape:
                    return None
                weights.append(np.full(len(rows[-1]), 1 / (count * len(rows[-1]))))
    except (OSError, ValueError, SafetensorError) as error:
        raise StateError(f"'{path}' is damaged ({error}): run it again.") from error
    rows_C = np.concatenate(rows)
    order_C = np.argsort(rows_C, kind="stable")
    return FinalScores(rows_C[order_C], np.concatenate(scores)[order_C], np.concatenate(weights)[order_C])
