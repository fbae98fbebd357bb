"""Which experience's adapter answers for a row, where each experience has one of its own.

A row of the experience that is under way goes to the adapter that trains, known by its id. In the scenario ``task`` the
task of a row is given: by its label, or by a column ``experience`` where it has none. Every other row goes by what the
frozen base, without any adapter, makes of it: to the adapter whose prototypes have the nearest one. Prototypes are the
K-means centres of the features of each experience's rows, as in S-Prompts (Wang et al. 2022, arXiv 2207.12819, sec. 3.3);
one prototype is the mean of the experience. A centre that one row has for itself is that row, and is given up with it.

The rows of a batch are put together by adapter, one forward pass a group: no hooks, no row by itself. Features of a
language model are the mean last hidden state over a row's prompt (the tokens that are not counted in its labels), since
at test nothing else is known; over all tokens where every one is counted. They are made in eval mode and outside autocast,
so that neither dropout nor precision decides where a row goes.

Letters: B rows, N rows of a table, T tokens or adapters, D features, P prototypes of all adapters, K classes.
"""

from __future__ import annotations

import warnings
from contextlib import AbstractContextManager
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from continual.errors import CompositionError, ModelError
from continual.models.module import UserModule
from continual.models.transformer import LanguageModel, pool
from continual.parts.head.class_sums import NO_ROW
from continual.parts.part import Context
from continual.parts.passes import as_at_test
from continual.streams.experience import Experience
from continual.table import IGNORED, Batch

Routing = Literal["features", "task"]
PROTOTYPES = 5
"""Of each experience, where nothing else is said."""

APART: dict[str, str] = {
    "penalty": "every experience has an adapter of its own, which later ones do not change, so there is nothing to hold.",
    "distillation": "every experience has an adapter of its own, so what the model said of new rows before teaches nothing.",
    "projection/ogd": "every experience has an adapter of its own, which later ones do not change.",
}
"""What adapters that are kept apart cannot be combined with, and why."""

_ROWS = 4096
"""Rows of an experience, at most, that its prototypes are made from."""


def check_routing(apart: bool, routing: Routing, prototypes: int) -> None:
    """Raise :class:`ValueError` for a setting that nothing would read."""
    if not apart and (routing, prototypes) != ("features", PROTOTYPES):
        raise ValueError("routing and prototypes are read by across_tasks 'separate' only: leave them out")
    if routing == "task" and prototypes != PROTOTYPES:
        raise ValueError("prototypes are read by routing 'features' only: leave them out")


class Kept(Protocol):
    """Adapters that are kept apart."""

    names: list[str]

    def only(self, name: str | None) -> AbstractContextManager[None]:
        """The model with this adapter alone, or with none."""


class Router:
    """Sends every row of a batch through the backbone with the adapter of its experience.

    Args:
        adapters: one for each experience begun, in order.
        wanted: ``features`` where the task is not given; ``task`` keeps no prototypes.
        prototypes: of each experience.
    """

    def __init__(self, adapters: Kept, wanted: Routing, prototypes: int) -> None:
        self.adapters, self.wanted, self.prototypes = adapters, wanted, prototypes
        self.prototypes_PD = torch.empty(0, 0)
        self.place_P = torch.empty(0, dtype=torch.int64)
        self.lone_P = torch.empty(0, dtype=torch.int64)
        self.experience_T = torch.empty(0, dtype=torch.int64)
        self.owner_K = torch.empty(0, dtype=torch.int64)
        self.current_N = torch.empty(0, dtype=torch.int64)

    def begin(self, context: Context, experience: Experience) -> None:
        """The last adapter is that of ``experience``: its classes, its rows, its prototypes.

        Raises:
            CompositionError: the task is to be given and is not, or the model has no features to go by.
        """
        self.check(context)
        place = len(self.adapters.names) - 1
        self.experience_T = torch.cat([self.experience_T, self.experience_T.new_tensor([experience.index])])
        if context.scenario == "task":
            more = max(experience.classes, default=-1) + 1 - len(self.owner_K)
            self.owner_K = torch.cat([self.owner_K, self.owner_K.new_full((max(more, 0),), -1)])
            self.owner_K[list(experience.classes)] = place
        table = experience.train
        self.current_N = table.column("row").cpu().sort().values if "row" in table.names else _no_ids()
        if self.wanted == "features":
            self._add_prototypes(context, experience, place)

    def check(self, context: Context) -> None:
        """Raise :class:`CompositionError` where rows could not be routed."""
        if self.wanted == "task" and context.scenario != "task":
            raise CompositionError(
                f"adapter.routing is 'task', and in the scenario '{context.scenario}' no row says what task it is of: set "
                "routing to 'features'."
            )
        backbone: Any = context.model.backbone
        if self.wanted == "features" and isinstance(backbone, UserModule):
            raise CompositionError(
                "adapter.routing is 'features', and this model gives none: take an mlp or a model of Hugging Face, or, in "
                "the scenario 'task', set routing to 'task'."
            )

    def end(self) -> None:
        """No experience is under way: its rows are looked at like all others, and their ids forgotten."""
        self.current_N = _no_ids()

    def __call__(self, backbone: nn.Module, batch: Batch) -> Tensor:
        """What ``backbone`` gives for each row with the adapter of its experience; one sync of the device, or two.

        Raises:
            ModelError: ``routing`` is ``task`` and a row's task is not given.
        """
        names = self.adapters.names
        if len(names) == 1:
            with self.adapters.only(names[0]):
                return _run(backbone, batch)
        place_B = self.choose(backbone, batch)
        sizes = torch.bincount(place_B, minlength=len(names)).tolist()
        used = [place for place, size in enumerate(sizes) if size]
        if len(used) == 1:
            with self.adapters.only(names[used[0]]):
                return _run(backbone, batch)
        order_B = place_B.argsort(stable=True)
        found = []
        for place, index_b in zip(used, torch.split(order_B, [sizes[place] for place in used]), strict=True):
            with self.adapters.only(names[place]):
                found.append(_run(backbone, {name: column[index_b] for name, column in batch.items()}))
        return torch.cat(found)[order_B.argsort()]

    def choose(self, backbone: nn.Module, batch: Batch) -> Tensor:
        """The place of each row's adapter, int64 (B,)."""
        place_B = self._known(batch)
        unknown_b = (place_B < 0).nonzero().flatten()
        if len(unknown_b):
            if self.wanted == "task":
                raise ModelError(
                    "adapter.routing is 'task' and some rows do not say what task they are of: name it, as in "
                    "predict(rows, experience=0), or set routing to 'features'."
                )
            place_B[unknown_b] = self._nearest(backbone, {name: column[unknown_b] for name, column in batch.items()})
        return place_B

    def _nearest(self, backbone: nn.Module, batch: Batch) -> Tensor | int:
        """The place of the adapter with the nearest prototype, int64 (B,); the last one where all prototypes were erased."""
        if not len(self.place_P):
            return len(self.adapters.names) - 1
        return self.place_P[torch.cdist(self.features(backbone, batch), self.prototypes_PD).argmin(1)]

    @torch.no_grad()
    def features(self, backbone: nn.Module, batch: Batch) -> Tensor:
        """What the base alone makes of each row, float32 (B, D)."""
        device = next(iter(batch.values())).device
        with as_at_test(backbone), self.adapters.only(None), torch.autocast(device.type, enabled=False):
            if not isinstance(backbone, LanguageModel):
                features_BD: Tensor = backbone(batch)
                return features_BD.float()
            ids_BT, transformer = batch["input_ids"], backbone.transformer
            mask_BT = batch.get("attention_mask")
            mask_BT = torch.ones_like(ids_BT) if mask_BT is None else mask_BT
            body: Any = transformer.get_encoder() if backbone.seq2seq else transformer.base_model  # type: ignore[operator]
            hidden_BTD = body(input_ids=ids_BT, attention_mask=mask_BT).last_hidden_state
            labels_BT = batch.get("labels")
            if labels_BT is not None and not backbone.seq2seq:
                prompt_BT = mask_BT * (labels_BT == IGNORED)
                mask_BT = torch.where(prompt_BT.any(1, keepdim=True), prompt_BT, mask_BT)
            return pool(hidden_BTD, mask_BT, "mean")

    def rows(self) -> Tensor:
        """Ids of the rows that a prototype consists of, int64 CPU."""
        return self.lone_P[self.lone_P != NO_ROW].cpu()

    def erase(self, rows: Tensor) -> int:
        """Give up the prototypes that consist of one of these rows; returns how many there were."""
        gone_P = torch.isin(self.lone_P, rows.to(self.lone_P.device)) & (self.lone_P != NO_ROW)
        for name in ("prototypes_PD", "place_P", "lone_P"):
            setattr(self, name, getattr(self, name)[~gone_P])
        return int(gone_P.sum())

    def state_dict(self) -> dict[str, Any]:
        return {
            "prototypes": self.prototypes_PD,
            "place": self.place_P,
            "lone": self.lone_P,
            "experience": self.experience_T,
            "owner": self.owner_K,
            "current": self.current_N,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.prototypes_PD, self.place_P = state["prototypes"].clone(), state["place"].clone()
        self.lone_P = state["lone"].clone()
        self.experience_T, self.owner_K = state["experience"].clone(), state["owner"].clone()
        self.current_N = state["current"].clone()

    def _to(self, device: torch.device) -> None:
        """Move what is looked up to the rows' device, once."""
        if self.place_P.device != device or self.experience_T.device != device or self.current_N.device != device:
            for name in ("prototypes_PD", "place_P", "lone_P", "experience_T", "owner_K", "current_N"):
                setattr(self, name, getattr(self, name).to(device))

    def _known(self, batch: Batch) -> Tensor:
        """The place of each row's adapter as far as it is given, int64 (B,), else -1; no sync."""
        first = next(iter(batch.values()))
        self._to(first.device)
        place_B = torch.full((len(first),), -1, dtype=torch.int64, device=first.device)
        if len(self.owner_K) and "labels" in batch:
            labels_B = batch["labels"]
            inside_B = (labels_B >= 0) & (labels_B < len(self.owner_K))
            place_B = torch.where(inside_B, self.owner_K[labels_B.clamp(0, len(self.owner_K) - 1)], -1)
        if "experience" in batch:
            given_BT = batch["experience"][:, None] == self.experience_T
            place_B = torch.where(given_BT.any(1), given_BT.int().argmax(1), place_B)
        if len(self.current_N) and "row" in batch:
            row_B = batch["row"]
            at_B = torch.searchsorted(self.current_N, row_B).clamp(max=len(self.current_N) - 1)
            place_B = torch.where(self.current_N[at_B] == row_B, len(self.adapters.names) - 1, place_B)
        return place_B

    def _add_prototypes(self, context: Context, experience: Experience, place: int) -> None:
        generator = context.randomness.generator("routing")
        backbone: Any = context.model.backbone
        found, ids = [], []
        for batch in context.batches(experience.train, limit=_ROWS, generator=generator):
            found.append(self.features(backbone, batch))
            ids.append(batch["row"] if "row" in batch else _no_ids().new_full((len(found[-1]),), NO_ROW))
        centres_pD, member_N = _centres(torch.cat(found), self.prototypes, generator)
        self._to(centres_pD.device)
        held_PD = self.prototypes_PD if len(self.prototypes_PD) else centres_pD[:0]
        self.prototypes_PD = torch.cat([held_PD, centres_pD])
        self.place_P = torch.cat([self.place_P, self.place_P.new_full((len(centres_pD),), place)])
        self.lone_P = torch.cat([self.lone_P, _lone(member_N, torch.cat(ids).to(member_N), len(centres_pD))])


def _run(backbone: nn.Module, batch: Batch) -> Tensor:
    given: Tensor = backbone(batch)
    return given


def _no_ids() -> Tensor:
    return torch.empty(0, dtype=torch.int64)


def _lone(member_N: Tensor, ids_N: Tensor, count: int) -> Tensor:
    """The id of the only row of each centre, int64 (count,); :data:`NO_ROW` where there are several."""
    lone_P = ids_N.new_empty(count).index_copy_(0, member_N, ids_N)
    return torch.where(torch.bincount(member_N, minlength=count) == 1, lone_P, NO_ROW)


def _centres(features_ND: Tensor, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """K-means centres, float32 (count, D) or one for each row where there are fewer rows; and each row's, int64 (N,)."""
    from sklearn.cluster import KMeans
    from sklearn.exceptions import ConvergenceWarning

    seed = int(torch.randint(2**31 - 1, (1,), generator=generator))
    if count == 1:
        member_N = torch.zeros(len(features_ND), dtype=torch.int64, device=features_ND.device)
        return features_ND.double().mean(0, keepdim=True).float(), member_N
    kmeans = KMeans(n_clusters=min(count, len(features_ND)), n_init=4, random_state=seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        kmeans.fit(features_ND.double().cpu().numpy())
    member_N = torch.from_numpy(kmeans.labels_).to(features_ND.device, torch.int64)
    return torch.from_numpy(kmeans.cluster_centers_).to(features_ND), member_N
