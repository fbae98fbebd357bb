"""The conditional autoencoder: its bound, its classes, its samples."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.distributions import Bernoulli, Normal, kl_divergence

from continual.models.vae import ConditionalVAE, Likelihood


def made(likelihood: Likelihood = "bernoulli", inputs: int = 6, hidden: tuple[int, ...] = (8, 7)) -> ConditionalVAE:
    generator = torch.Generator().manual_seed(0)
    return ConditionalVAE(inputs, 2, hidden=hidden, latent=3, likelihood=likelihood, generator=generator)


def two_kinds(rows: int) -> tuple[Tensor, Tensor]:
    """Class 0 lights pixels on the left, class 1 on the right: even or odd ones, which the class does not tell."""
    labels, odd = torch.arange(rows) % 2, torch.arange(rows) // 2 % 2
    pixel = torch.arange(24)
    lit = ((pixel >= 12) == (labels == 1)[:, None]) & (pixel % 2 == odd[:, None])
    return lit.float(), labels


@pytest.mark.parametrize("likelihood", ["bernoulli", "gaussian"])
def test_the_terms_are_those_of_the_distributions(likelihood: Likelihood) -> None:
    vae = made(likelihood)
    if vae.log_variance is not None:
        vae.log_variance.data.fill_(-0.7)
    rows, labels = torch.rand(5, 6).round(), torch.tensor([0, 1, 1, 0, 1])
    noise = torch.randn(5, 3)
    missing_B, kl_B = vae.terms(rows, labels, noise)
    for place in range(5):
        row, label = rows[place : place + 1], labels[place : place + 1]
        mean, log_variance = vae.encode(row, label)
        q = Normal(mean, (0.5 * log_variance).exp())
        out = vae.decode(mean + noise[place] * q.stddev, label)
        p = Bernoulli(logits=out) if likelihood == "bernoulli" else Normal(out, torch.tensor(-0.35).exp())
        torch.testing.assert_close(missing_B[place], -p.log_prob(row).sum())
        torch.testing.assert_close(kl_B[place], kl_divergence(q, Normal(torch.zeros(3), torch.ones(3))).sum())


def test_new_classes_change_nothing_for_those_that_are_there() -> None:
    vae, generator = made(), torch.Generator().manual_seed(2)
    rows, labels, noise = torch.rand(4, 6), torch.tensor([0, 1, 0, 1]), torch.randn(4, 3)
    before = vae.terms(rows, labels, noise)
    vae.grow_to(5, generator)
    vae.grow_to(3, generator)
    assert vae.classes == 5
    for old, new in zip(before, vae.terms(rows, labels, noise), strict=True):
        assert torch.equal(old, new)
    assert not torch.equal(vae.sample(torch.tensor([3]), noise[:1]), vae.sample(torch.tensor([4]), noise[:1]))


def test_initial_weights_come_from_the_generator_alone() -> None:
    torch.manual_seed(3)
    state = torch.get_rng_state()
    one, other = made(), made()
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))
    bound = 1 / 6**0.5
    weight = one.encoder[0].weight.detach()  # type: ignore[operator, union-attr]
    assert 0.8 * bound < float(weight.abs().max()) <= bound


@pytest.mark.parametrize("likelihood", ["bernoulli", "gaussian"])
def test_trained_it_makes_rows_of_the_class_asked_for_and_uses_its_latent_values(likelihood: Likelihood) -> None:
    vae, generator = made(likelihood, 24, (32, 24)), torch.Generator().manual_seed(4)
    optimizer = torch.optim.Adam(vae.parameters(), lr=1e-2)
    rows, labels = two_kinds(64)
    bounds = []
    for _ in range(400):
        missing_B, kl_B = vae.terms(rows, labels, torch.randn(64, 3, generator=generator))
        bounds.append(float((missing_B + kl_B).mean().detach()))
        optimizer.zero_grad()
        (missing_B + kl_B).mean().backward()
        optimizer.step()
    assert bounds[-1] < bounds[0] - 5.0
    assert float(kl_B.mean().detach()) > 0.5
    asked = torch.arange(200) % 2
    samples = vae.sample(asked, torch.randn(200, 3, generator=generator))
    assert not samples.requires_grad
    assert torch.equal(samples[:, :12].sum(1) < samples[:, 12:].sum(1), asked == 1)
    odd = samples[:, 1::2].sum(1) > samples[:, ::2].sum(1)
    assert 0.2 < float(odd.float().mean()) < 0.8
    if likelihood == "bernoulli":
        assert float(samples.min()) >= 0 and float(samples.max()) <= 1
    else:
        assert vae.log_variance is not None and float(vae.log_variance.detach()) < -1


@pytest.mark.parametrize("likelihood", ["bernoulli", "gaussian"])
def test_the_likelihood_is_the_mean_of_importance_weights_in_blocks_of_any_size(
    likelihood: Likelihood, monkeypatch: pytest.MonkeyPatch
) -> None:
    vae = made(likelihood)
    if vae.log_variance is not None:
        vae.log_variance.data.fill_(-0.7)
    rows, labels, noise = torch.rand(5, 6), torch.tensor([0, 1, 1, 0, 1]), torch.randn(9, 3)
    found_B = vae.log_likelihood(rows, labels, noise)
    for place in range(5):
        row, label = rows[place : place + 1], labels[place : place + 1]
        mean, log_variance = vae.encode(row, label)
        q, prior = Normal(mean, (0.5 * log_variance).exp()), Normal(torch.zeros(3), torch.ones(3))
        weights = []
        for s in range(9):
            z = mean + noise[s] * q.stddev
            out = vae.decode(z, label)
            if likelihood == "bernoulli":
                fits = (row * torch.sigmoid(out).log() + (1 - row) * torch.sigmoid(-out).log()).sum()
            else:
                fits = Normal(out, torch.tensor(-0.35).exp()).log_prob(row).sum()
            weights.append((fits + prior.log_prob(z).sum() - q.log_prob(z).sum()).exp())
        torch.testing.assert_close(found_B[place], torch.stack(weights).mean().log(), rtol=1e-4, atol=1e-4)
    monkeypatch.setattr("continual.models.vae.BLOCK", 6 * 5 * 2)
    torch.testing.assert_close(vae.log_likelihood(rows, labels, noise), found_B)


def test_the_likelihood_is_the_integral_over_the_latent_values() -> None:
    """With one latent value the integral is a sum over a fine grid."""
    generator = torch.Generator().manual_seed(0)
    vae = ConditionalVAE(4, 1, hidden=(5,), latent=1, generator=generator)
    rows, labels = torch.rand(3, 4, generator=generator).round(), torch.zeros(3, dtype=torch.int64)
    grid, width = torch.linspace(-8, 8, 4001)[:, None], 16 / 4000
    wanted = []
    for row in rows:
        log_p = Bernoulli(logits=vae.decode(grid, torch.zeros(4001, dtype=torch.int64))).log_prob(row).sum(1)
        wanted.append((log_p + Normal(0.0, 1.0).log_prob(grid[:, 0])).exp().sum() * width)
    found_B = vae.log_likelihood(rows, labels, torch.randn(20_000, 1, generator=generator))
    torch.testing.assert_close(found_B, torch.stack(wanted).log().detach(), rtol=0, atol=0.02)
