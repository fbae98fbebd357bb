"""Our model as Avalanche calls it: inputs in, logits out, with the classes that do not compete masked.

Letters: B rows, K classes, D features.
"""

from __future__ import annotations

from typing import Any

import torch
from avalanche.models import MultiTaskModule
from torch import Tensor, nn

from continual.models.model import Model
from continual.objective import Competition

MASKED = -1000.0
"""Logit of a class that does not compete, as in Avalanche's own classifiers: finite, and 0 after a softmax in float32."""


class Competing:
    """Which classes compete; all copies that strategies make of a model share it.

    Attributes:
        owner_K: int64 (K,), the experience that a class belongs to, -1 for one not yet met.
        masks: off while the model answers for rows that are measured, which has masks of its own.
    """

    def __init__(self, competition: Competition) -> None:
        self.competition = competition
        self.owner_K = torch.empty(0, dtype=torch.int64)
        self.masks = True

    def __deepcopy__(self, memo: dict[int, Any]) -> Competing:
        return self

    def masked(self, logits_BK: Tensor, task: Tensor | int | None = None) -> Tensor:
        """Logits in which only the classes that compete for a task (or one for each row) do."""
        if not self.masks or self.competition == "all":
            return logits_BK
        if self.competition == "experience" and task is not None:
            tasks_B = torch.as_tensor(task, device=logits_BK.device).reshape(-1, 1)
            return logits_BK.masked_fill(self.owner_K != tasks_B, MASKED)
        return logits_BK.masked_fill(self.owner_K < 0, MASKED)


class Logits(nn.Module):
    """The model where there are no tasks."""

    def __init__(self, model: Model, competing: Competing) -> None:
        super().__init__()
        self.model, self.competing = model, competing

    def forward(self, x: Tensor) -> Tensor:
        """Logits (B, K) of inputs (B, ...)."""
        logits_BK: Tensor = self.model({"inputs": x}).logits
        return self.competing.masked(logits_BK)


class TaskLogits(MultiTaskModule):  # type: ignore[misc]
    """The model with task labels: one head whose classes each belong to a task, which is the same as one head for each."""

    def __init__(self, model: Model, competing: Competing) -> None:
        super().__init__()
        self.model, self.competing = model, competing

    def forward(self, x: Tensor, task_labels: Tensor | int | None) -> Any:
        """Logits (B, K) of inputs (B, ...) and tasks (B,); without tasks a dict of them by each task met so far."""
        logits_BK: Tensor = self.model({"inputs": x}).logits
        if task_labels is not None:
            return self.competing.masked(logits_BK, task_labels)
        return {task: self.competing.masked(logits_BK, task) for task in sorted(self.known_train_tasks_labels)}


class Features(nn.Module):
    """The backbone alone."""

    def __init__(self, model: Model) -> None:
        super().__init__()
        self.backbone = model.backbone

    def forward(self, x: Tensor) -> Tensor:
        """Features (B, D) of inputs (B, ...)."""
        features_BD: Tensor = self.backbone({"inputs": x})
        return features_BD
