"""Generative replay: rows of earlier experiences are made by a generator, none is stored.

Source: Shin et al. 2017, "Continual Learning with Deep Generative Replay" (arXiv 1705.08690), with the variational
autoencoder and the loss 1/t · current + (1 − 1/t) · replayed of van de Ven & Tolias 2018 (arXiv 1809.10635), t
experiences met. While an experience is learnt, rows come from the generator as it was before it; a copy is trained on
current and made rows by the same weights, one step for each batch, and takes its place at the end.

Departures: the generator is conditional on the class (``models/vae.py``), so that as many rows are made of each. A made row has the
class that was asked for; with ``labels: teacher`` the one that the classifier gives it as it was when the experience began, as in
the papers, among the classes met before (``task``: those of the experience that was asked for, where van de Ven et al. train the
heads of all earlier experiences on every made row). The generator's optimiser begins anew in each experience. And a
generator is used only when its rows are good: at the end of an experience the classifier must recognise a share
``threshold`` of the rows made for every class, else the next experience is refused.

It holds no row, so there is none to erase; what a generator has learnt of a row stays until it is trained without it.

Letters: B rows of a batch, G classes known, M rows made, Z latent values.
"""

from __future__ import annotations

import copy
import math
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field, PositiveFloat, PositiveInt
from torch import Tensor

from continual.errors import CompositionError, quoted
from continual.kinds import Objective
from continual.models.output import Output
from continual.models.vae import ConditionalVAE, Likelihood
from continual.objective import mask_logits
from continual.parts.part import Context, Part, Slot
from continual.parts.passes import as_at_test
from continual.parts.replay.mix import ExperienceWeights, join, replay_count
from continual.parts.replay.quality import Quality
from continual.parts.teacher import Teacher
from continual.spec import Spec
from continual.streams.experience import Experience
from continual.table import Batch


class GenerativeSettings(Spec):
    """Settings of :class:`GenerativeReplay`.

    Attributes:
        share: part of the rows of a full batch that are made, in (0, 1).
        labels: of made rows: the class that was ``asked`` for, or what the old classifier, the ``teacher``, makes of it.
        hidden, latent: of the autoencoder (:class:`~continual.models.vae.ConditionalVAE`).
        likelihood: ``bernoulli`` for inputs in [0, 1], ``gaussian`` for any.
        lr: learning rate of the generator (Adam).
        threshold: smallest share, over the classes, of made rows that the classifier recognises; 0 asks for nothing.
        check_rows: rows of each class made for the check.
    """

    kind: Literal["generative"] = "generative"
    share: float = Field(0.5, gt=0, lt=1)
    labels: Literal["asked", "teacher"] = "asked"
    hidden: Annotated[tuple[PositiveInt, ...], Field(min_length=1)] = (400, 400)
    latent: PositiveInt = 100
    likelihood: Likelihood = "bernoulli"
    lr: PositiveFloat = 1e-3
    threshold: float = Field(0.5, ge=0, le=1)
    check_rows: PositiveInt = 100


class GenerativeReplay(Part):
    """Replays rows that a conditional autoencoder makes; for its settings see :class:`GenerativeSettings`."""

    slot: ClassVar[Slot] = "replay"
    Settings: ClassVar[type[Spec]] = GenerativeSettings
    objectives: ClassVar[tuple[Objective, ...]] = ("classification",)
    excludes: ClassVar[dict[str, str]] = {
        "replay": "made rows would be trained on as if they were current ones: leave the other one out.",
    }
    settings: GenerativeSettings

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.generator: ConditionalVAE | None = None
        self.learning: ConditionalVAE | None = None
        self.optimizer: torch.optim.Optimizer | None = None
        self.known: list[int] = []
        """Classes in order of arrival."""
        self.quality = Quality(self.settings.threshold, self.settings.check_rows)
        """Of those that ``generator`` knows."""
        self.weights = ExperienceWeights()
        self.teacher = Teacher()
        self._shape: list[int] = []

    def attach(self, context: Context) -> None:
        super().attach(context)
        for model in (self.generator, self.learning):
            if model is not None:
                model.to(context.device)

    def begin(self, context: Context, experience: Experience) -> None:
        """Begin to train a copy of the generator, with the classes of this experience as well.

        Raises:
            CompositionError: rows that cannot be made.
            TrainingError: the classifier does not recognise what the generator makes.
        """
        classes, shape = self._look_at(context, experience)
        if self.generator is not None and shape != self._shape:
            raise CompositionError(
                f"{self.name} makes inputs of shape {tuple(self._shape)}, and those of experience '{experience.name}' have "
                f"shape {tuple(shape)}: give every experience inputs of one shape."
            )
        self._shape = shape
        self.quality.require(self.name)
        draws = context.randomness.generator("generator")
        if self.generator is None:
            self.learning = self._make(math.prod(self._shape), max(classes) + 1, draws).to(context.device)
        else:
            self.learning = copy.deepcopy(self.generator).requires_grad_(True)
            self.learning.grow_to(max(classes) + 1, draws)
        self.known += [label for label in classes if label not in self.known]
        self.optimizer = self._make_optimizer(self.learning)
        if self.generator is not None and self.settings.labels == "teacher":
            self.teacher.copy(context)

    def extend(self, batch: Batch) -> Batch:
        """The batch with made rows after its own (``row`` −1), of classes drawn evenly from those met before."""
        context, met = self.context, self.context.experience_index + 1
        count = replay_count(context.full_rows, self.settings.share)
        if self.generator is None or not count:
            return batch
        draws, device = context.randomness.generator("generative replay"), batch["labels"].device
        old = torch.tensor(self.quality.classes)
        labels_M = old[torch.randint(len(old), (count,), generator=draws)].to(device, non_blocking=True)
        made = self._rows_of(self.generator, labels_M, torch.randn(count, self.settings.latent, generator=draws))
        if self.teacher:
            made["labels"] = self._named_by_teacher(made, old.to(device, non_blocking=True))
        joined = join(batch, made)
        joined["weight"] = self.weights.of(joined, len(batch["labels"]), met)
        return joined

    def after_step(self, batch: Batch, output: Output) -> None:
        """One step of the generator on the batch."""
        assert self.learning is not None and self.optimizer is not None, "begin comes first"
        rows_BI = batch["inputs"].flatten(1).float()
        draws = self.context.randomness.generator("generator noise")
        noise_BZ = torch.randn(len(rows_BI), self.settings.latent, generator=draws).to(rows_BI.device)
        missing_B, kl_B = self.learning.terms(rows_BI, batch["labels"], noise_BZ)
        weight_B, loss_B = batch.get("weight"), missing_B + kl_B
        loss = loss_B.mean() if weight_B is None else (weight_B * loss_B).sum() / weight_B.sum()
        self.optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()

    def end(self, context: Context, experience: Experience) -> None:
        """Replay from what was learnt, from now on, and see how good it is."""
        assert self.learning is not None, "begin comes first"
        self.generator = self.learning.requires_grad_(False)
        self.learning = self.optimizer = None
        self.teacher = Teacher()
        self._look_at_quality(context, self.generator)

    def report(self) -> str | None:
        """One sentence where the generator is not good enough for the next experience."""
        return self.quality.report()

    def state_dict(self) -> dict[str, Any]:
        optimizer, learning = self.optimizer, self.learning
        moments = {}
        if optimizer is not None and learning is not None:
            named = learning.named_parameters()
            moments = {name: {key: v.clone() for key, v in optimizer.state[p].items()} for name, p in named}
        return {
            "generator": _state(self.generator),
            "learning": _state(learning),
            "optimizer": moments,
            "known": list(self.known),
            "shares": list(self.quality.shares),
            "shape": list(self._shape),
            "teacher": self.teacher.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from ``state``."""
        self.known = [int(label) for label in state["known"]]
        shares = [float(share) for share in state["shares"]]
        self.quality.classes, self.quality.shares = self.known[: len(shares)], shares
        self._shape = [int(size) for size in state["shape"]]
        self.teacher.load_state_dict(state["teacher"])
        self.generator, self.learning = self._loaded(state["generator"]), self._loaded(state["learning"])
        if self.generator is not None:
            self.generator.requires_grad_(False)
        self.optimizer = None
        if self.learning is not None:
            self.optimizer = self._make_optimizer(self.learning)
            for name, parameter in self.learning.named_parameters():
                saved = state["optimizer"].get(name)
                if saved:
                    self.optimizer.state[parameter] = {key: v.to(parameter.device) for key, v in saved.items()}

    def _look_at(self, context: Context, experience: Experience) -> tuple[list[int], list[int]]:
        """The classes among the rows, and the shape of a row, where both can be made."""
        labels: list[Tensor] = []
        ranges: list[Tensor] = []
        shape: list[int] = []
        for batch in context.batches(experience.train):
            others = batch.keys() - {"inputs", "labels", "row", "weight"}
            inputs = batch.get("inputs")
            if others or inputs is None or not inputs.is_floating_point():
                raise CompositionError(
                    f"{self.name} makes rows of floating-point 'inputs' alone, and these rows have the columns "
                    f"{quoted(sorted(batch))}: take replay/rehearsal, which stores rows of any kind."
                )
            shape = list(inputs.shape[1:])
            ranges += inputs.aminmax()
            labels.append(batch["labels"])
        low, high = (float(value) for value in torch.stack(ranges).aminmax())
        if self.settings.likelihood == "bernoulli" and (low < 0 or high > 1):
            raise CompositionError(
                f"{self.name} with likelihood: bernoulli makes inputs in [0, 1], and these lie in [{low:g}, {high:g}]: take "
                "likelihood: gaussian, or scale them."
            )
        classes: list[int] = torch.unique(torch.cat(labels)).tolist()
        if classes[0] < 0:
            raise CompositionError(
                f"{self.name} needs one class a row and some rows have none (a label below 0): take replay/rehearsal."
            )
        return classes, shape

    @torch.no_grad()
    def _look_at_quality(self, context: Context, generator: ConditionalVAE) -> None:
        def right(labels_B: Tensor, noise_BZ: Tensor) -> Tensor:
            made = self._rows_of(generator, labels_B, noise_BZ)
            guess_B = mask_logits(context.forward(made).logits, context.active(made)).argmax(1)
            return (guess_B == labels_B) & made["inputs"].flatten(1).isfinite().all(1)

        draws = context.randomness.generator("generator check")
        with as_at_test(context.model):
            self.quality.look(self.known, self.settings.latent, context.device, draws, right)

    def _rows_of(self, generator: ConditionalVAE, labels_M: Tensor, noise_MZ: Tensor) -> Batch:
        rows_MI = generator.sample(labels_M, noise_MZ.to(labels_M.device, non_blocking=True))
        return {
            "inputs": rows_MI.view(len(labels_M), *self._shape),
            "labels": labels_M,
            "row": torch.full_like(labels_M, -1),
        }

    def _named_by_teacher(self, made: Batch, old_G: Tensor) -> Tensor:
        """What the old classifier makes of the rows, of the classes in ``old_G`` that compete, int64 (M,)."""
        logits_MK = self.teacher(self.context, made).logits
        known_K = torch.zeros(logits_MK.shape[1], dtype=torch.bool, device=logits_MK.device)
        known_K[old_G] = True
        competing = self.context.active(made)
        return mask_logits(logits_MK, known_K if competing is None else known_K & competing).argmax(1)

    def _make(self, inputs: int, classes: int, generator: torch.Generator) -> ConditionalVAE:
        own = self.settings
        return ConditionalVAE(
            inputs, classes, hidden=own.hidden, latent=own.latent, likelihood=own.likelihood, generator=generator
        )

    def _make_optimizer(self, model: ConditionalVAE) -> torch.optim.Optimizer:
        return torch.optim.Adam(model.parameters(), lr=self.settings.lr, fused=True)

    def _loaded(self, saved: dict[str, Any] | None) -> ConditionalVAE | None:
        if saved is None:
            return None
        model = self._make(int(saved["inputs"]), int(saved["classes"]), torch.Generator())
        model.load_state_dict(saved["weights"])
        return model.to(self.context.device) if hasattr(self, "context") else model


def _state(model: ConditionalVAE | None) -> dict[str, Any] | None:
    if model is None:
        return None
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    return {"inputs": model.inputs, "classes": model.classes, "weights": weights}
