"""Losses and the learning rate against formulas written out in float64."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.special import log_softmax

from toast_onnx.finetune.losses import cross_entropy, kl_divergence, relative_mse
from toast_onnx.finetune.schedule import rate_at

RNG = np.random.default_rng(0)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_kl_divergence_is_the_sum_over_classes_and_the_mean_over_samples(temperature: float) -> None:
    student, teacher = RNG.standard_normal((2, 5, 7))
    s, t = log_softmax(student / temperature, 1), log_softmax(teacher / temperature, 1)
    want = temperature**2 * (np.exp(t) * (t - s)).sum(1).mean()
    found = kl_divergence(torch.from_numpy(student), torch.from_numpy(teacher), temperature)
    assert found.item() == pytest.approx(want, rel=1e-5)


def test_kl_divergence_of_equal_logits_up_to_a_shift_is_zero() -> None:
    logits = torch.randn(3, 4)
    assert kl_divergence(logits + 5, logits).item() == pytest.approx(0, abs=1e-6)


def test_relative_mse_is_one_for_the_channels_means() -> None:
    """A student that knows every channel's mean and nothing else has missed the whole variance."""
    teacher = torch.from_numpy(RNG.standard_normal((4, 6, 5)) + 100 * RNG.standard_normal(5))
    student = teacher.mean((0, 1), keepdim=True).expand_as(teacher)
    assert relative_mse(student, teacher).item() == pytest.approx(1, rel=1e-4)
    assert relative_mse(teacher, teacher).item() == 0


def test_relative_mse_of_a_constant_teacher_is_finite() -> None:
    assert math.isfinite(relative_mse(torch.ones(2, 3), torch.zeros(2, 3)).item())
    assert relative_mse(torch.zeros(2, 3), torch.ones(2, 3)).item() == pytest.approx(1)


def test_cross_entropy_takes_class_numbers_and_blends() -> None:
    logits = RNG.standard_normal((3, 4))
    classes = np.array([1, 0, 3])
    want = -log_softmax(logits, 1)[np.arange(3), classes].mean()
    assert cross_entropy(torch.from_numpy(logits), torch.from_numpy(classes)).item() == pytest.approx(want, rel=1e-5)
    half = 0.5 * np.eye(4)[classes] + 0.5 * np.eye(4)[[2, 2, 2]]
    want = -(half * log_softmax(logits, 1)).sum(1).mean()
    assert cross_entropy(torch.from_numpy(logits), torch.from_numpy(half).float()).item() == pytest.approx(
        want, rel=1e-5
    )


def test_rate_rises_linearly_and_falls_along_a_cosine() -> None:
    rates = [rate_at(step, 100, 0.2, 0.1) for step in range(100)]
    assert rates[:10] == pytest.approx([0.02 * (k + 1) for k in range(10)])
    assert rates[10] == 0.2
    assert rates[55] == pytest.approx(0.1)
    assert 0 < rates[99] < 1e-3
    assert rate_at(0, 1, 0.2, 0.1) == 0.2


def test_the_class_token_counts_as_often_as_it_is_told_to() -> None:
    student, teacher = RNG.standard_normal((2, 3, 5, 4))
    weight = np.array([20, 1, 1, 1, 1])[None, :, None]
    error = (weight * (student - teacher) ** 2).mean()
    spread = (weight * (teacher - teacher.mean((0, 1))) ** 2).mean()
    found = relative_mse(torch.from_numpy(student), torch.from_numpy(teacher), 20.0)
    assert found.item() == pytest.approx(error / spread, rel=1e-5)
