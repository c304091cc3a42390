"""Losses against closed forms and finite differences."""

from __future__ import annotations

import math

import pytest
import torch

from train.losses import diffusion_loss, id_contrastive_loss, id_loss


def _rows(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_diffusion_loss_is_the_mean_square_of_each_sample():
    predicted, target = torch.zeros(2, 3, 4), torch.stack([torch.full((3, 4), 2.0), torch.full((3, 4), -3.0)])
    torch.testing.assert_close(diffusion_loss(predicted, target), torch.tensor([4.0, 9.0]))


@pytest.mark.parametrize("angle", [0.0, 0.3, math.pi / 2, 2.0, math.pi])
def test_id_loss_is_one_minus_the_cosine_whatever_the_lengths(angle):
    a = torch.tensor([[3.0, 0.0, 0.0]])
    b = torch.tensor([[math.cos(angle), math.sin(angle), 0.0]]) * 17
    assert id_loss(a, b).item() == pytest.approx(1 - math.cos(angle), abs=1e-6)


def test_contrastive_loss_of_orthogonal_people_is_its_closed_form():
    """g on its positive, M negatives at a right angle: -log(e^(1/tau) / (e^(1/tau) + M))."""
    for negatives, tau in ((1, 0.1), (16, 0.5), (500, 1.0)):
        g = torch.eye(600, dtype=torch.float64)[:1]
        loss = id_contrastive_loss(g, 2 * g, 5 * torch.eye(600, dtype=torch.float64)[1 : 1 + negatives], tau)
        expected = -math.log(math.exp(1 / tau) / (math.exp(1 / tau) + negatives))
        assert loss.item() == pytest.approx(expected, rel=1e-4, abs=1e-6)


def test_contrastive_loss_without_a_difference_is_the_log_of_the_count():
    same = torch.ones(3, 8)
    torch.testing.assert_close(
        id_contrastive_loss(same, same, torch.ones(31, 8)), torch.full((3,), math.log(32.0))
    )


def test_a_masked_negative_counts_for_nothing():
    g, r, n = _rows(2, 8), _rows(2, 8, seed=1), _rows(5, 8, seed=2)
    allowed = torch.tensor([[True, False, True, True, False]] * 2)
    torch.testing.assert_close(
        id_contrastive_loss(g, r, n, 0.2, allowed), id_contrastive_loss(g, r, n[[0, 2, 3]], 0.2)
    )


def test_more_negatives_never_lower_the_loss():
    g, r, n = _rows(4, 16), _rows(4, 16, seed=1), _rows(64, 16, seed=2)
    losses = [id_contrastive_loss(g, r, n[:m]) for m in (1, 4, 16, 64)]
    assert all((b >= a).all() for a, b in zip(losses, losses[1:], strict=False))


@pytest.mark.parametrize("name", ["diffusion", "id", "contrastive"])
def test_gradients_equal_finite_differences(name):
    x, y, n = _rows(2, 6).float(), _rows(2, 6, seed=1).float(), _rows(5, 6, seed=2).float()
    loss = {
        "diffusion": lambda v: diffusion_loss(v, y).sum(),
        "id": lambda v: id_loss(v, y).sum(),
        "contrastive": lambda v: id_contrastive_loss(v, y, n, 0.5).sum(),
    }[name]
    x.requires_grad_(True)
    (gradient,) = torch.autograd.grad(loss(x), x)
    step = 1e-2
    for index in ((0, 0), (0, 3), (1, 5)):
        moved = torch.zeros_like(x)
        moved[index] = step
        with torch.no_grad():
            difference = (loss(x + moved) - loss(x - moved)) / (2 * step)
        assert gradient[index].item() == pytest.approx(difference.item(), rel=2e-2, abs=2e-4)
