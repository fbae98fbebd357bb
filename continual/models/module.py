"""A module of the user's that gives logits itself, called in the way its ``forward`` asks for.

Letters: B rows, K classes or outputs, T tokens, V vocabulary.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from continual.errors import ModelError
from continual.kinds import Objective
from continual.table import Batch

DIMENSIONS: dict[Objective, tuple[tuple[int, ...], str]] = {
    "classification": ((2,), "(rows, classes)"),
    "regression": ((1, 2), "(rows,) or (rows, outputs)"),
    "causal-lm": ((3,), "(rows, tokens, vocabulary)"),
    "seq2seq": ((3,), "(rows, tokens, vocabulary)"),
}
"""What logits must look like, by objective."""


class UserModule(nn.Module):
    """Calls ``module`` with the columns that its ``forward`` names and takes the logits out of what it returns.

    A ``forward`` that names ``input_ids`` gets it by keyword, with ``attention_mask`` where it names that too; one that
    takes anything (``*args, **kwargs``) gets tokens by keyword where the rows have them; every other one gets
    ``batch["inputs"]`` as its first argument.

    Args:
        module: returns a tensor, an object with ``logits``, or a mapping with ``"logits"``.
        objective: decides which shapes its logits may have.
        columns: in place of all that, it gets those of these columns that the rows have, by keyword.
    """

    holds = "module"

    def __init__(self, module: nn.Module, objective: Objective, columns: tuple[str, ...] = ()) -> None:
        super().__init__()
        self.module, self.objective, self.columns = module, objective, columns
        parameters = inspect.signature(module.forward).parameters
        kinds = {parameter.kind for parameter in parameters.values()}
        self._anything = all(parameter.kind.name.startswith("VAR_") for parameter in parameters.values())
        self._tokens = "input_ids" in parameters or (self._anything and inspect.Parameter.VAR_KEYWORD in kinds)
        self._mask = "attention_mask" in parameters or self._anything

    def forward(self, batch: Batch) -> Tensor:
        """Logits (B, K), or (B, T, V) for a language model.

        Raises:
            ModelError: the rows lack the column it reads, or it returns something else.
        """
        if self.columns:
            returned = self.module(**{name: batch[name] for name in self.columns if name in batch})
        elif self._tokens and "input_ids" in batch:
            columns = {"input_ids": batch["input_ids"]}
            if self._mask and "attention_mask" in batch:
                columns["attention_mask"] = batch["attention_mask"]
            returned = self.module(**columns)
        elif "inputs" in batch and (self._anything or not self._tokens):
            try:
                returned = self.module(batch["inputs"])
            except RuntimeError as error:
                if "dtype" in str(error):
                    raise ModelError(
                        f"{type(self.module).__name__} cannot take inputs of {batch['inputs'].dtype} "
                        f"({' '.join(str(error).split())}): call .float() on it; half precision is the business of training.precision."
                    ) from error
                if "shape" not in str(error) and "size" not in str(error):
                    raise
                raise ModelError(
                    f"{type(self.module).__name__} cannot take inputs of shape {tuple(batch['inputs'].shape[1:])} a row "
                    f"({' '.join(str(error).split())}): give it rows of the shape that it was made for."
                ) from error
        else:
            wanted = "input_ids" if self._tokens else "inputs"
            raise ModelError(
                f"{type(self.module).__name__} reads the column '{wanted}', and these rows have "
                f"{', '.join(sorted(batch))}: give it rows with that column, or another model."
            )
        return self._logits(returned, len(next(iter(batch.values()))))

    def _logits(self, returned: Any, rows: int) -> Tensor:
        logits = returned.get("logits") if isinstance(returned, Mapping) else getattr(returned, "logits", returned)
        dimensions, shape = DIMENSIONS[self.objective]
        if not isinstance(logits, Tensor):
            raise ModelError(
                f"{type(self.module).__name__} returns {type(returned).__name__} without logits: let it return a "
                f"tensor {shape}, or something with '.logits'."
            )
        if logits.dim() not in dimensions or logits.shape[0] != rows:
            raise ModelError(
                f"{type(self.module).__name__} returns logits of shape {tuple(logits.shape)} for {rows} rows: "
                f"{self.objective} needs {shape}."
            )
        return logits
