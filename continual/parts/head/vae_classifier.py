"""A generative classifier: one small autoencoder for each class, and Bayes' rule over what they make of a row.

Source: van de Ven, Li & Tolias 2021, "Class-Incremental Learning with Generative Classifiers" (arXiv 2104.10093):

    y = argmax over k of p(x|k) p(k),    p(k) the same for all classes,

with p(x|k) of a variational autoencoder that saw the rows of class k alone, estimated with ``samples`` importance samples
(``models/vae.py``). The defaults are those of the authors' repository for Split MNIST: 85-85 units, 5 latent values, 1000
iterations with 128 rows of a class each, Adam with a rate of 1e-3. Classes are learnt apart, so nothing is forgotten.

Departures: 50 importance samples by default, where the paper takes 10 000; and every row and class shares the same draws, so that
measuring draws nothing. A class of several experiences (in ``domain``) gets an autoencoder in each of them, where the paper has
none such; p(x|k) is then their mixture, by rows learnt. The class vector of :class:`~continual.models.vae.ConditionalVAE` stands
beside a bias and adds nothing.

Training is done in one go when an experience ends: a run that is cut off meanwhile does it again from the same draws.

Letters: B rows, N rows of a class, D features or inputs, K classes (or outputs), S importance samples, Z latent values.
"""

from __future__ import annotations

import math
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field, PositiveFloat, PositiveInt
from torch import Tensor, nn

from continual.errors import CompositionError, TrainingError, quoted
from continual.kinds import Objective
from continual.models.vae import ConditionalVAE, Likelihood
from continual.parts.head.class_sums import check_steady, features_model, sweep
from continual.parts.head.closed_form import UNKNOWN
from continual.parts.part import Context, Part, Slot
from continual.parts.replay.cycle import Cycle
from continual.spec import Spec
from continual.streams.experience import Experience
from continual.table import Batch

_APART = "each class is learnt by an autoencoder of its own, which never trains again"


class VaeClassifierSettings(Spec):
    """Settings of :class:`VaeClassifierHead`.

    Attributes:
        reads: the rows' own ``inputs``, past the backbone, or the ``features`` of a frozen one.
        hidden, latent: of each autoencoder (:class:`~continual.models.vae.ConditionalVAE`).
        likelihood: ``bernoulli`` for values in [0, 1], ``gaussian`` for any.
        lr: learning rate (Adam).
        iterations: steps for each class in each experience that brings it.
        batch_size: rows of the class in one step; all where there are fewer.
        samples: importance samples of the likelihood.
    """

    kind: Literal["vae-classifier"] = "vae-classifier"
    reads: Literal["inputs", "features"] = "inputs"
    hidden: Annotated[tuple[PositiveInt, ...], Field(min_length=1)] = (85, 85)
    latent: PositiveInt = 5
    likelihood: Likelihood = "bernoulli"
    lr: PositiveFloat = 1e-3
    iterations: PositiveInt = 1000
    batch_size: PositiveInt = 128
    samples: PositiveInt = 50


class Likelihoods(nn.Module):
    """The head's module: log p(x|k) by the autoencoders of each class.

    Attributes:
        vaes: in order of arrival, frozen; ``classes`` and ``rows`` say of which class each is, and how many rows it saw.
        noise: the draws of the importance samples, float32 (S, Z).
    """

    noise: Tensor

    def __init__(self, reads_inputs: bool) -> None:
        super().__init__()
        self.reads_inputs, self.outputs = reads_inputs, 0
        self.vaes = nn.ModuleList()
        self.classes: list[int] = []
        self.rows: list[int] = []
        self.register_buffer("noise", torch.empty(0, 0), persistent=False)

    def forward(self, features_BD: Tensor) -> Tensor:
        """log p(x|k), float32 (B, K), computed in float32 also under autocast; :data:`UNKNOWN` for a class without rows."""
        with torch.autocast(features_BD.device.type, enabled=False):
            rows_BD = features_BD.float()
            logits_BK = rows_BD.new_full((len(rows_BD), self.outputs), UNKNOWN)
            for label in sorted(set(self.classes)):
                own = [place for place, known in enumerate(self.classes) if known == label]
                total = sum(self.rows[place] for place in own)
                shares = [self._of(place, rows_BD) + math.log(self.rows[place] / total) for place in own]
                logits_BK[:, label] = torch.stack(shares).logsumexp(0)
            return logits_BK

    def familiarity(self, features_BD: Tensor) -> Tensor:
        """log p(x) over the classes known, float32 (B,); :data:`UNKNOWN` while there is none."""
        known = sorted(set(self.classes))
        if not known:
            return features_BD.new_full((len(features_BD),), UNKNOWN, dtype=torch.float32)
        found: Tensor = self(features_BD)[:, known].logsumexp(1) - math.log(len(known))
        return found

    def _of(self, place: int, rows_BD: Tensor) -> Tensor:
        vae = self.vaes[place]
        assert isinstance(vae, ConditionalVAE)
        return vae.log_likelihood(rows_BD, rows_BD.new_zeros(len(rows_BD), dtype=torch.int64), self.noise)


class VaeClassifierHead(Part):
    """Learns an autoencoder of each class at the end of the experience that brings it, from its rows alone.

    It keeps no row, so there is none to erase: what an autoencoder has learnt of a row stays.
    """

    slot: ClassVar[Slot] = "head"
    Settings: ClassVar[type[Spec]] = VaeClassifierSettings
    objectives: ClassVar[tuple[Objective, ...]] = ("classification",)
    needs_head: ClassVar[bool] = True
    needs_steady_features: ClassVar[bool] = True
    excludes: ClassVar[dict[str, str]] = {
        "replay": f"{_APART}, so nothing would learn from replayed rows: leave replay out, or take head/linear",
        "penalty": f"{_APART}, so there is nothing to hold: leave the penalty out, or take head/linear",
        "distillation": f"{_APART}, so there is nothing to hold: leave it out, or take head/linear",
        "projection": f"{_APART}, so there is nothing to protect: leave it out, or take head/linear",
        "adapter": "it reads the rows themselves, or the features of a backbone that never changed: leave the adapter out, "
        "or take head/ridge",
    }
    settings: VaeClassifierSettings

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.module = Likelihoods(self.settings.reads == "inputs")
        self._width = 0

    def attach(self, context: Context) -> None:
        """Set the head of the model.

        Raises:
            CompositionError: the model gives logits itself.
        """
        super().attach(context)
        features_model(context, self.name).head = self.module.to(context.device)

    def begin(self, context: Context, experience: Experience) -> None:
        """Add outputs for classes that arrive first; they become known at the end.

        Raises:
            CompositionError: rows without inputs, or of another size, where it reads those; a backbone that trains.
        """
        if self.module.reads_inputs and "inputs" not in experience.train.names:
            raise CompositionError(
                f"{self.name} reads the column 'inputs', and these rows have {quoted(sorted(experience.train.names))}: set "
                "head.reads: features (with likelihood: gaussian)."
            )
        first = experience.train[torch.zeros(1, dtype=torch.int64)]
        width = first["inputs"].numel() if self.module.reads_inputs else self._width
        if self.module.vaes and width != self._width:
            raise CompositionError(
                f"{self.name} learnt rows of {self._width} values, and those of experience '{experience.name}' have {width}: "
                "give every experience inputs of one shape."
            )
        check_steady(context, self.name)
        if not len(self.module.noise):
            draws = context.randomness.generator("importance samples")
            noise_SZ = torch.randn(self.settings.samples, self.settings.latent, generator=draws)
            self.module.noise = noise_SZ.to(context.device)
        self.grow_to(max(experience.classes, default=-1) + 1, context)

    def grow_to(self, classes: int, context: Context) -> None:
        """Have at least ``classes`` outputs."""
        self.module.outputs = max(self.module.outputs, classes)

    def end(self, context: Context, experience: Experience) -> None:
        """Train an autoencoder on the rows of each class; all rows of the experience are in memory meanwhile.

        Raises:
            CompositionError: values outside of [0, 1] with ``bernoulli``.
            TrainingError: a loss that is not finite.
        """
        rows_ND, labels_N = self._gathered(context, experience)
        draws = context.randomness.generator("vae-classifier")
        for label in range(self.module.outputs):
            own_ND = rows_ND[labels_N == label]
            if len(own_ND):
                vae = self._trained(own_ND, draws, f"class {label} of experience '{experience.name}'")
                self.module.vaes.append(vae)
                self.module.classes.append(label)
                self.module.rows.append(len(own_ND))

    def state_dict(self) -> dict[str, Any]:
        module = self.module
        return {
            "width": self._width,
            "outputs": module.outputs,
            "classes": list(module.classes),
            "rows": list(module.rows),
            "noise": module.noise,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Rebuild the autoencoders; their weights belong to the model and are loaded there."""
        module, device = self.module, self.module.noise.device
        self._width, module.outputs = int(state["width"]), int(state["outputs"])
        module.classes, module.rows = [int(k) for k in state["classes"]], [int(n) for n in state["rows"]]
        module.noise = state["noise"].to(device, torch.float32, copy=True)
        made = [self._make(torch.Generator()).requires_grad_(False).to(device) for _ in module.classes]
        module.vaes = nn.ModuleList(made)

    def _make(self, draws: torch.Generator) -> ConditionalVAE:
        own = self.settings
        return ConditionalVAE(
            self._width, 1, hidden=own.hidden, latent=own.latent, likelihood=own.likelihood, generator=draws
        )

    def _gathered(self, context: Context, experience: Experience) -> tuple[Tensor, Tensor]:
        """What the autoencoders are to learn, float32 (N, D), and the labels, int64 (N,)."""
        found: list[Tensor] = []
        labels: list[Tensor] = []

        def take(features_BD: Tensor, batch: Batch) -> None:
            found.append(features_BD.float())
            labels.append(batch["labels"])

        sweep(context, experience.train, take)
        rows_ND = torch.cat(found)
        low, high = (float(value) for value in rows_ND.aminmax())
        if self.settings.likelihood == "bernoulli" and not (low >= 0 and high <= 1):
            raise CompositionError(
                f"{self.name} with likelihood: bernoulli learns {self.settings.reads} in [0, 1], and those of experience "
                f"'{experience.name}' lie in [{low:g}, {high:g}]: take likelihood: gaussian, or scale them."
            )
        self._width = rows_ND.shape[1]
        return rows_ND, torch.cat(labels)

    def _trained(self, rows_ND: Tensor, draws: torch.Generator, what: str) -> ConditionalVAE:
        own, cycle = self.settings, Cycle()
        vae = self._make(draws).to(rows_ND.device)
        optimizer = torch.optim.Adam(vae.parameters(), lr=own.lr, fused=True)
        rows = min(own.batch_size, len(rows_ND))
        zeros_B = torch.zeros(rows, dtype=torch.int64, device=rows_ND.device)
        for _ in range(own.iterations):
            index_B = cycle.draw(rows, len(rows_ND), draws)
            noise_BZ = torch.randn(rows, own.latent, generator=draws).to(rows_ND.device, non_blocking=True)
            batch_BD = rows_ND[index_B.to(rows_ND.device, non_blocking=True)]
            missing_B, kl_B = vae.terms(batch_BD, zeros_B, noise_BZ)
            optimizer.zero_grad()
            (missing_B + kl_B).mean().backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        if not all(bool(parameter.isfinite().all()) for parameter in vae.parameters()):
            raise TrainingError(
                f"the weights of the autoencoder for {what} are not finite after its training: lower head.lr, or scale the "
                "values that it learns."
            )
        return vae.requires_grad_(False)
