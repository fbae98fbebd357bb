"""Feature replay from a generator: features of earlier classes are made by a conditional autoencoder; no row is kept.

Source: Liu et al. 2020, "Generative Feature Replay for Class-Incremental Learning" (arXiv 2004.09199), whose generator is a
GAN, with the variational autoencoder of van de Ven, Siegelmann & Tolias 2020, "Brain-Inspired Replay for Continual Learning
with Artificial Neural Networks" (Nature Communications 11:4069), which replays hidden values as well. One generator serves
all classes. At the end of an experience a copy of it is trained on the experience's features and on features that the old
one makes, with t experiences met by the loss 1/t · current + (1 − 1/t) · made, and takes its place.

Departures: the backbone must be steady, so features of earlier classes stay valid; the mean of each feature over the first
experience is taken away and all are divided by one deviation; what is replayed is drawn from p(x|z,y), noise and all, not its
mean; a generator whose features the head does not recognise is refused (``quality.py``).

Training is done in one go when an experience ends: a run that is cut off meanwhile does it again from the same draws. The
generator holds no row, so there is none to erase; what it has learnt of a row stays until it is trained without it.

Letters: B rows, N rows of an experience, R rows drawn, D features, Z latent values.
"""

from __future__ import annotations

import copy
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field, PositiveFloat, PositiveInt
from torch import Tensor

from continual.errors import TrainingError
from continual.models.vae import ConditionalVAE
from continual.objective import mask_logits
from continual.parts.head.class_sums import features_model, sweep
from continual.parts.part import Context
from continual.parts.passes import as_at_test
from continual.parts.replay.cycle import Cycle
from continual.parts.replay.drawn import DrawnFeatures, DrawnSettings, head_of
from continual.parts.replay.quality import Quality
from continual.spec import Spec
from continual.streams.experience import Experience
from continual.table import Batch


class FeatureVAESettings(DrawnSettings):
    """Settings of :class:`FeatureVAE`.

    Attributes:
        share: part of the rows of a step that are drawn (:class:`~continual.parts.replay.drawn.DrawnSettings`).
        hidden, latent: of the autoencoder (:class:`~continual.models.vae.ConditionalVAE`).
        lr: its learning rate (Adam).
        epochs: its passes over the rows of an experience, at the end of it.
        batch_size: rows of the experience in one step, and as many made by the old generator.
        threshold: smallest share, over the classes, of made features that the head recognises; 0 asks for nothing.
        check_rows: rows of each class made for the check.
    """

    kind: Literal["feature-vae"] = "feature-vae"
    hidden: Annotated[tuple[PositiveInt, ...], Field(min_length=1)] = (256,)
    latent: PositiveInt = 32
    lr: PositiveFloat = 1e-3
    epochs: PositiveInt = 30
    batch_size: PositiveInt = 32
    threshold: float = Field(0.5, ge=0, le=1)
    check_rows: PositiveInt = 100


class FeatureVAE(DrawnFeatures):
    """Trains the head on features that a conditional autoencoder makes of earlier classes (see :class:`FeatureVAESettings`).

    Attributes:
        generator: frozen; None before the end of the first experience.
        scale: mean of each of the first experience's features, and the deviation of all about theirs, float32 (2, D).
    """

    Settings: ClassVar[type[Spec]] = FeatureVAESettings
    settings: FeatureVAESettings

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.generator: ConditionalVAE | None = None
        self.scale = torch.zeros(2, 0)
        self.quality = Quality(self.settings.threshold, self.settings.check_rows)

    def attach(self, context: Context) -> None:
        super().attach(context)
        self.scale = self.scale.to(context.device)
        if self.generator is not None:
            self.generator.to(context.device)

    def begin(self, context: Context, experience: Experience) -> None:
        """Look whether features and generator are as they should be.

        Raises:
            CompositionError: the backbone trains, and something has been learnt of its features already.
            TrainingError: the head does not recognise what the generator makes.
        """
        super().begin(context, experience)
        self.quality.require(self.name)

    def known(self) -> int:
        return len(self.quality.classes)

    def draw(self, rows: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        assert self.generator is not None, "there is something to draw"
        known = torch.tensor(self.quality.classes)
        labels_R = known[torch.randint(len(known), (rows,), generator=generator)].to(
            self.scale.device, non_blocking=True
        )
        mean_D, deviation_D = self.scale
        return mean_D + deviation_D * self._made(self.generator, labels_R, generator), labels_R

    def end(self, context: Context, experience: Experience) -> None:
        """Train the generator, and see how good it is; features of all rows of the experience are in memory meanwhile.

        Of a single row nothing is learnt while there is no scale.

        Raises:
            TrainingError: weights that are not finite.
        """
        features_ND, labels_N = self._gathered(context, experience)
        if not self.scale.shape[1] or not len(labels_N):
            return
        learning = self._trained(context, features_ND, labels_N, f"experience '{experience.name}'")
        classes: list[int] = torch.unique(labels_N).tolist()
        classes = [*self.quality.classes, *(label for label in classes if label not in self.quality.classes)]
        self.generator = learning.requires_grad_(False)
        self._look_at_quality(context, self.generator, classes)

    def report(self) -> str | None:
        """One sentence where the generator is not good enough for the next experience."""
        return self.quality.report()

    def state_dict(self) -> dict[str, Any]:
        generator = self.generator
        return {
            "generator": None
            if generator is None
            else {name: one.clone() for name, one in generator.state_dict().items()},
            "scale": self.scale,
            "classes": list(self.quality.classes),
            "shares": list(self.quality.shares),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from ``state``."""
        device, weights = self.scale.device, state["generator"]
        self.scale = state["scale"].to(device, torch.float32, copy=True)
        self.quality.classes = [int(label) for label in state["classes"]]
        self.quality.shares = [float(share) for share in state["shares"]]
        self.generator = None
        if weights is not None:
            made = self._make(self.scale.shape[1], len(weights["seen_by_encoder"]), torch.Generator())
            made.load_state_dict(weights)
            self.generator = made.requires_grad_(False).to(device)

    def _make(self, features: int, classes: int, draws: torch.Generator) -> ConditionalVAE:
        own = self.settings
        return ConditionalVAE(
            features,
            classes,
            hidden=own.hidden,
            latent=own.latent,
            likelihood="gaussian",
            label_std=1.0,
            generator=draws,
        )

    def _made(self, vae: ConditionalVAE, labels_B: Tensor, draws: torch.Generator) -> Tensor:
        """Standardised features drawn from p(x|z,y), float32 (B, D)."""
        noise_BZ = torch.randn(len(labels_B), self.settings.latent, generator=draws)
        return self._around(vae, labels_B, noise_BZ, torch.randn(len(labels_B), vae.inputs, generator=draws))

    def _around(self, vae: ConditionalVAE, labels_B: Tensor, noise_BZ: Tensor, noise_BD: Tensor) -> Tensor:
        device = labels_B.device
        mean_BD = vae.sample(labels_B, noise_BZ.to(device, non_blocking=True))
        assert vae.log_variance is not None
        return mean_BD + (0.5 * vae.log_variance.detach()).exp() * noise_BD.to(device, non_blocking=True)

    def _gathered(self, context: Context, experience: Experience) -> tuple[Tensor, Tensor]:
        """Standardised features float32 (N, D) of rows that have a class, and the labels, int64 (N,)."""
        found: list[Tensor] = []
        labels: list[Tensor] = []

        def take(features_BD: Tensor, batch: Batch) -> None:
            counted_B = batch["labels"] >= 0
            found.append(features_BD[counted_B].float())
            labels.append(batch["labels"][counted_B])

        sweep(context, experience.train, take)
        width = features_model(context, self.name).feature_size
        assert width is not None
        features_ND = torch.cat([torch.zeros(0, width, device=context.device), *found])
        labels_N = torch.cat([torch.zeros(0, dtype=torch.int64, device=context.device), *labels])
        if not self.scale.shape[1] and len(features_ND) > 1:
            self.scale = _scale(features_ND)
        if self.scale.shape[1]:
            features_ND = (features_ND - self.scale[0]) / self.scale[1]
        return features_ND, labels_N

    def _trained(self, context: Context, features_ND: Tensor, labels_N: Tensor, what: str) -> ConditionalVAE:
        own, cycle, old = self.settings, Cycle(), self.generator
        draws, outputs = context.randomness.generator("feature-vae"), int(labels_N.max()) + 1
        if old is None:
            learning = self._make(features_ND.shape[1], outputs, draws).to(context.device)
        else:
            learning = copy.deepcopy(old).requires_grad_(True)
            learning.grow_to(outputs, draws)
        optimizer = torch.optim.Adam(learning.parameters(), lr=own.lr, fused=True)
        rows, met = min(own.batch_size, len(labels_N)), context.experience_index + 1
        known = torch.tensor(self.quality.classes)
        for _ in range(own.epochs * -(-len(labels_N) // rows)):
            index_B = cycle.draw(rows, len(labels_N), draws).to(context.device, non_blocking=True)
            loss = self._loss(learning, features_ND[index_B], labels_N[index_B], draws)
            if old is not None:
                labels_R = known[torch.randint(len(known), (own.batch_size,), generator=draws)]
                labels_R = labels_R.to(context.device, non_blocking=True)
                made = self._loss(learning, self._made(old, labels_R, draws), labels_R, draws)
                loss = loss / met + (1 - 1 / met) * made
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        if not all(bool(parameter.isfinite().all()) for parameter in learning.parameters()):
            raise TrainingError(
                f"the weights of the generator of {self.name} are not finite after {what}: lower replay.lr, or look for "
                "features that are far from all others."
            )
        return learning

    def _loss(self, vae: ConditionalVAE, features_BD: Tensor, labels_B: Tensor, draws: torch.Generator) -> Tensor:
        noise_BZ = torch.randn(len(labels_B), self.settings.latent, generator=draws)
        missing_B, kl_B = vae.terms(features_BD, labels_B, noise_BZ.to(labels_B.device, non_blocking=True))
        loss: Tensor = (missing_B + kl_B).mean()
        return loss

    @torch.no_grad()
    def _look_at_quality(self, context: Context, vae: ConditionalVAE, classes: list[int]) -> None:
        head, draws = head_of(context, self.name), context.randomness.generator("feature-vae check")
        mean_D, deviation_D = self.scale

        def right(labels_B: Tensor, noise_BZ: Tensor) -> Tensor:
            noise_BD = torch.randn(len(labels_B), vae.inputs, generator=draws)
            features_BD = mean_D + deviation_D * self._around(vae, labels_B, noise_BZ, noise_BD)
            guess_B = mask_logits(head(features_BD), context.active({"labels": labels_B})).argmax(1)
            right_B: Tensor = (guess_B == labels_B) & features_BD.isfinite().all(1)
            return right_B

        with as_at_test(context.model):
            self.quality.look(classes, self.settings.latent, context.device, draws, right)


def _scale(features_ND: Tensor) -> Tensor:
    """Mean of each feature and the deviation of all about theirs, float32 (2, D), of two rows or more."""
    variance_D, mean_D = torch.var_mean(features_ND, 0)
    deviation = variance_D.mean().sqrt()
    return torch.stack([mean_D, torch.where(deviation > 0, deviation, 1.0).expand_as(mean_D)])
