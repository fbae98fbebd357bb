"""A variational autoencoder that makes rows of a class asked for; the classes may grow.

Source: Kingma & Welling 2014 (arXiv 1312.6114), made conditional as in Sohn et al. 2015 (NeurIPS): the class goes into
the encoder and the decoder. Symmetric, as the generator of van de Ven & Tolias 2018 (arXiv 1809.10635).

    ELBO(x, y) = E_q(z|x,y) [log p(x|z,y)] − KL(q(z|x,y) ‖ N(0, I))

with one draw of z a row. ``bernoulli``: p(x|z,y) over values in [0, 1] (the cross-entropy, which is no density there, but
what the literature reports). ``gaussian``: a normal density around the output, with one variance for all values that is
learnt (Rybkin et al. 2021, arXiv 2006.13202).

The class enters the first layer of each side as a vector that is added, so that a new class adds a row and changes
nothing for those that are there.

The likelihood of a row itself is estimated by importance sampling (Rezende et al. 2014, arXiv 1401.4082, eq. 17 of its
appendix; Burda et al. 2016, arXiv 1509.00519):

    log p(x|y) ≈ log 1/S Σ_s p(x|z_s,y) N(z_s; 0, I) / q(z_s|x,y),    z_s drawn from q(z|x,y)

Letters: B rows, I values in a row, K classes, S importance samples, Z latent values.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Likelihood = Literal["bernoulli", "gaussian"]
BLOCK = 2**22
"""Values that are decoded at once for the likelihood of rows."""


class ConditionalVAE(nn.Module):
    """Encoder I → hidden → (mean, log-variance) of Z, decoder Z → hidden reversed → I, ReLU between layers.

    Args:
        inputs: I.
        classes: K to begin with.
        hidden: width of each hidden layer of the encoder, at least one.
        latent: Z.
        likelihood: of a row given z and its class.
        label_std: deviation of what the vectors of a new class are drawn with; None takes 1/√width. The larger, the more
            rows of different classes differ before anything is learnt.
        generator: of the initial weights, which are drawn as ``torch.nn.Linear`` draws them.
    """

    def __init__(
        self,
        inputs: int,
        classes: int,
        *,
        hidden: tuple[int, ...] = (400, 400),
        latent: int = 100,
        likelihood: Likelihood = "bernoulli",
        label_std: float | None = None,
        generator: torch.Generator,
    ) -> None:
        super().__init__()
        self.label_std = label_std
        self.inputs, self.latent, self.likelihood = inputs, latent, likelihood
        widths = (inputs, *hidden)
        self.encoder = nn.ModuleList(_linear(a, b, generator) for a, b in pairwise(widths))
        self.moments = _linear(hidden[-1], 2 * latent, generator)
        back = (latent, *reversed(hidden))
        self.decoder = nn.ModuleList(_linear(a, b, generator) for a, b in pairwise(back))
        self.out = _linear(hidden[0], inputs, generator)
        self.log_variance = nn.Parameter(torch.zeros(())) if likelihood == "gaussian" else None
        self.seen_by_encoder = nn.Parameter(torch.zeros(0, hidden[0]))
        self.seen_by_decoder = nn.Parameter(torch.zeros(0, hidden[-1]))
        self.grow_to(classes, generator)

    @property
    def classes(self) -> int:
        """K."""
        return len(self.seen_by_encoder)

    def grow_to(self, classes: int, generator: torch.Generator) -> None:
        """Have at least ``classes``; vectors of new ones are drawn with ``label_std``. Parameters that grow are new objects."""
        more = classes - self.classes
        if more > 0:
            for name in ("seen_by_encoder", "seen_by_decoder"):
                old = getattr(self, name)
                std = 1 / math.sqrt(old.shape[1]) if self.label_std is None else self.label_std
                drawn = torch.randn(more, old.shape[1], generator=generator) * std
                setattr(self, name, nn.Parameter(torch.cat([old.detach(), drawn.to(old)])))

    def encode(self, rows_BI: Tensor, labels_B: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log-variance of q(z|x,y), each (B, Z)."""
        values = self.encoder[0](rows_BI) + self.seen_by_encoder[labels_B]
        for layer in list(self.encoder)[1:]:
            values = layer(F.relu(values))
        mean_BZ, log_variance_BZ = self.moments(F.relu(values)).chunk(2, dim=1)
        return mean_BZ, log_variance_BZ

    def decode(self, latent_BZ: Tensor, labels_B: Tensor) -> Tensor:
        """Logits (``bernoulli``) or means (``gaussian``) of rows, (B, I); with more axes in front, (..., B, I)."""
        values = self.decoder[0](latent_BZ) + self.seen_by_decoder[labels_B]
        for layer in list(self.decoder)[1:]:
            values = layer(F.relu(values))
        out_BI: Tensor = self.out(F.relu(values))
        return out_BI

    def terms(self, rows_BI: Tensor, labels_B: Tensor, noise_BZ: Tensor) -> tuple[Tensor, Tensor]:
        """−log p(x|z,y) and KL of each row in nats, each (B,), with z = mean + noise · deviation; ELBO is minus their sum.

        Args:
            rows_BI: float (B, I), in [0, 1] for ``bernoulli``.
            labels_B: int64 (B,) below K.
            noise_BZ: standard normal.
        """
        mean_BZ, log_variance_BZ = self.encode(rows_BI, labels_B)
        out_BI = self.decode(mean_BZ + noise_BZ * (0.5 * log_variance_BZ).exp(), labels_B)
        missing_B = self._missing(out_BI, rows_BI)
        kl_B = 0.5 * (mean_BZ.square() + log_variance_BZ.exp() - 1 - log_variance_BZ).sum(1)
        return missing_B, kl_B

    @torch.no_grad()
    def log_likelihood(self, rows_BI: Tensor, labels_B: Tensor, noise_SZ: Tensor) -> Tensor:
        """log p(x|y) of each row in nats, (B,), by importance sampling.

        Args:
            rows_BI: float (B, I), in [0, 1] for ``bernoulli``.
            labels_B: int64 (B,) below K.
            noise_SZ: standard normal; every row has these same draws, which for the row alone are draws like any other.
        """
        mean_BZ, log_variance_BZ = self.encode(rows_BI, labels_B)
        deviation_BZ = (0.5 * log_variance_BZ).exp()
        found = []
        for noise_s1Z in torch.split(noise_SZ[:, None], max(1, BLOCK // max(rows_BI.numel(), 1))):
            latent_sBZ = mean_BZ + noise_s1Z * deviation_BZ
            ratio_sB = 0.5 * (noise_s1Z.square() + log_variance_BZ - latent_sBZ.square()).sum(-1)
            found.append(ratio_sB - self._missing(self.decode(latent_sBZ, labels_B), rows_BI))
        return torch.cat(found).logsumexp(0) - math.log(len(noise_SZ))

    @torch.no_grad()
    def sample(self, labels_B: Tensor, noise_BZ: Tensor) -> Tensor:
        """Rows of these classes, float (B, I): the mean of p(x|z,y) at z = noise."""
        out_BI = self.decode(noise_BZ, labels_B)
        return out_BI.sigmoid() if self.log_variance is None else out_BI

    def _missing(self, out_BI: Tensor, rows_BI: Tensor) -> Tensor:
        """−log p(x|z,y) of rows, (..., B), from what the decoder gives, (..., B, I)."""
        if self.log_variance is None:
            rows = rows_BI.expand_as(out_BI)
            return F.binary_cross_entropy_with_logits(out_BI, rows, reduction="none").sum(-1)
        squares_BI = (rows_BI - out_BI).square() * (-self.log_variance).exp()
        return 0.5 * (squares_BI + self.log_variance + math.log(2 * math.pi)).sum(-1)


def _linear(inputs: int, outputs: int, generator: torch.Generator) -> nn.Linear:
    layer: nn.Linear = nn.utils.skip_init(nn.Linear, inputs, outputs)  # type: ignore[no-untyped-call]
    bound = 1 / math.sqrt(inputs)
    with torch.no_grad():
        layer.weight.copy_(torch.empty(outputs, inputs).uniform_(-bound, bound, generator=generator))
        layer.bias.copy_(torch.empty(outputs).uniform_(-bound, bound, generator=generator))
    return layer
