"""Memory aware synapses: weights are held by how much the output depends on them, whatever the labels.

``loss + lambda sum_p Omega_p (theta_p - theta~_p)^2`` with ``Omega_p = 1/N sum_n |d ||F(x_n)||^2 / d theta_p|`` added up
over experiences and theta~ where the last one ended (Aljundi et al. 2018, arXiv 1711.09601, eq. 3 to 5). The absolute
value is taken of each row's own gradient (:mod:`~continual.parts.penalty.rowwise`); that of a batch's mean, where the
signs of rows cancel, depends on the batch size.

F is the logits of the classes that compete. Departures: of a language model the squared norm is averaged over the
counted tokens of a row, as its loss is; of a regression F is the outputs.

Letters: B rows, K classes or outputs, T tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar, Literal

from pydantic import Field
from torch import Tensor

from continual.models.output import Output
from continual.parts.part import Context, Part, Slot
from continual.parts.penalty.fisher import Space, tracked
from continual.parts.penalty.fisher_labels import Target
from continual.parts.penalty.rowwise import Sums, Way, per_row
from continual.parts.penalty.springs import Springs, WantedSpace, check_finite, check_space
from continual.spec import Spec
from continual.streams.experience import Experience
from continual.table import IGNORED, Batch


class MASSettings(Spec):
    """Settings of :class:`MAS`.

    Attributes:
        strength: lambda ≥ 0; 0 switches the pull off.
        rows: how many rows of an experience Omega is computed from, drawn at random; null for every row.
        space: ``parameters`` holds the trainable parameters; ``weights`` the effective weights of adapted layers;
            ``auto`` takes ``weights`` where an adapter is replaced, or is AdaLoRA.
    """

    kind: Literal["mas"] = "mas"
    strength: float = Field(default=1.0, ge=0)
    rows: int | None = Field(default=None, ge=1)
    space: WantedSpace = "auto"


class MAS(Part):
    """Pulls weights back to where the last experience left them, by how much the outputs so far depend on them.

    In its first experience it does nothing.
    """

    slot: ClassVar[Slot] = "penalty"
    Settings: ClassVar[type[Spec]] = MASSettings
    settings: MASSettings

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self._springs = Springs()

    def attach(self, context: Context) -> None:
        super().attach(context)
        self._springs.release()

    def begin(self, context: Context, experience: Experience) -> None:
        """Refuse what cannot work before anything is trained.

        Raises:
            CompositionError: ``weights`` is asked for and there is no adapted layer.
        """
        self._springs.release()
        check_space(self.settings.space, context.model)

    def edit_gradients(self) -> None:
        """Add ``2 lambda Omega (theta - theta~)`` to the gradients; no sync of the device."""
        self._springs.pull(self.context, 2 * self.settings.strength)

    def end(self, context: Context, experience: Experience) -> None:
        """Add the experience's sensitivities and move the anchor here.

        Raises:
            TrainingError: a sensitivity that is not finite.
        """
        space = self._springs.settle(self.settings.space, context.model)
        generator = context.randomness.generator("mas")
        batches = context.batches(experience.train, limit=self.settings.rows, generator=generator, gradients=True)
        omega = sensitivities(context, batches, space=space)
        check_finite("sensitivity", omega)
        self._springs.quadratic.decay_and_move(omega, self._springs.points(context), 1.0)
        self._springs.release()

    def value(self) -> Tensor:
        """The penalty now, ``lambda sum Omega (theta - theta~)^2``, a scalar tensor, no sync."""
        return self._springs.value(self.context, 2 * self.settings.strength)

    def state_dict(self) -> dict[str, Any]:
        return self._springs.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._springs.load_state_dict(state)


def sensitivities(
    context: Context, batches: Iterable[Batch], *, space: Space = "parameters", way: Way = "auto"
) -> dict[str, Tensor]:
    """The mean over rows of the absolute gradient of the squared norm of the output, of what trains now.

    Returns:
        Name → float32 tensor ≥ 0, as :func:`~continual.parts.penalty.fisher.diagonal_fisher` gives a Fisher.

    Raises:
        CompositionError: an adapted layer without a low-rank form; ``way="vmap"`` where ``torch.func`` cannot follow.
        TrainingError: no rows.
    """
    parameters, layers = tracked(context, space)
    sums = Sums(1, parameters, layers)

    def wanted(batch: Batch, logits: Tensor) -> list[Target]:
        return [Target(batch, context.active(batch), measure=squared_norm)]

    return sums.mean(per_row(context, batches, wanted, sums, parameters, layers, way=way))


def squared_norm(context: Context, output: Output, batch: Batch, active: Tensor | None) -> Tensor:
    """The squared L2 norm of each row's output, (B,)."""
    logits = output.logits.float()
    if context.objective in ("classification", "regression"):
        outputs_BK = logits.reshape(logits.shape[0], -1)
        return (outputs_BK if active is None else outputs_BK.masked_fill(~active, 0.0)).square().sum(1)
    labels_BT = batch["labels"]
    if context.objective == "causal-lm":
        logits, labels_BT = logits[:, :-1], labels_BT[:, 1:]
    counted_BT = labels_BT != IGNORED
    norms_BT = logits.square().sum(2) * counted_BT
    return norms_BT.sum(1) / counted_BT.sum(1).clamp(min=1)
