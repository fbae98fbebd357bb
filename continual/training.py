"""How a strategy moves the parameters: the keys of its ``training``."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt, model_validator

from continual.objective import Competition, Criterion
from continual.spec import Spec


class EarlyStopping(Spec):
    """Stop when the score on ``valid`` has not risen for some epochs, and go back to the best weights."""

    patience: PositiveInt = 2
    min_delta: NonNegativeFloat = 0.0


class Training(Spec):
    """How the parameters move.

    Attributes:
        lr: learning rate of the optimiser; ``head_lr`` is that of the head where it differs.
        epochs: passes over the rows of each experience; ``iterations`` fixes the optimiser's steps instead.
        batch_size: rows of the experience in one forward pass; what replay adds comes on top.
        accumulate: forward passes in one optimiser step.
        clip: largest norm of the gradient, None for no clipping.
        schedule: of the learning rate over the steps of each experience, after ``warmup`` (a share of them).
        precision: ``fp32`` or ``bf16`` (autocast).
        active: which classes compete in training: ``seen``, ``experience``, ``all`` or ``asymmetric``
            (:func:`~continual.objective.active_classes`); None takes ``experience`` in the task scenario and ``seen``
            elsewhere.
        loss: of a classification: ``cross-entropy`` of a softmax over the classes that compete, or ``binary``, a sigmoid for
            each of them (:func:`~continual.objective.loss_rows`).
        fresh_optimizer: forget the optimiser's state at each experience.
    """

    optimizer: Literal["sgd", "adam", "adamw"] = "adamw"
    lr: PositiveFloat = 1e-3
    head_lr: PositiveFloat | None = None
    momentum: float = Field(0.0, ge=0, lt=1)
    weight_decay: NonNegativeFloat = 0.0
    epochs: PositiveInt | None = None
    iterations: PositiveInt | None = None
    batch_size: PositiveInt = 32
    accumulate: PositiveInt = 1
    clip: PositiveFloat | None = None
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    warmup: float = Field(0.0, ge=0, lt=1)
    precision: Literal["fp32", "bf16"] = "fp32"
    active: Competition | None = None
    loss: Criterion = "cross-entropy"
    fresh_optimizer: bool = False
    early_stopping: EarlyStopping | None = None

    @model_validator(mode="after")
    def _consistent(self) -> Training:
        if self.epochs is not None and self.iterations is not None:
            raise ValueError("give epochs or iterations, not both")
        if self.momentum and self.optimizer != "sgd":
            raise ValueError(f"momentum belongs to sgd; {self.optimizer} has its own, leave the key out")
        return self
