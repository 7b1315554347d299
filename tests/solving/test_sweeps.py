"""The sweeps over the heads against the residual of all contexts, taken anew for every head."""

from __future__ import annotations

import numpy as np
import pytest

from toast_onnx.importance.moments import Moments
from toast_onnx.solving.linear_algebra import STRENGTHS, ridge_solve
from toast_onnx.solving.vo import solve_vo_subspace


def root(s: np.ndarray) -> np.ndarray:
    values, vectors = np.linalg.eigh(s)
    return np.asarray(vectors * np.sqrt(np.clip(values, 0, None)) @ vectors.T)


def leading(s: np.ndarray, w: np.ndarray, rank: int) -> np.ndarray:
    """Orthonormal basis (d, r) of the contexts with the most variance after w."""
    return np.linalg.qr(w @ np.linalg.svd(root(s) @ w)[2][:rank].T)[0]


def shift_of(s: np.ndarray, c: np.ndarray, tokens: float, energy: float) -> float:
    """Generalized cross-validation by its definition, twenty tokens counting as one; with plenty the least strength."""
    mean, scores = np.trace(s) / len(s), {}
    if tokens >= 80 * len(s):
        return float(STRENGTHS[0] * mean)
    for strength in STRENGTHS:
        inverse = np.linalg.inv(s + strength * mean * np.eye(len(s)))
        hat = inverse + strength * mean * inverse @ inverse
        left = energy - 2 * np.trace(c.T @ hat @ c) + np.trace(c.T @ hat @ s @ hat @ c)
        freedom = 1 - 20 * (1 + np.trace(hat @ s)) / tokens
        scores[strength] = left / freedom**2 if freedom > 0 else np.inf
    return float(mean * min(k for k, score in scores.items() if score <= 1.01 * min(scores.values())))


def swept(s: np.ndarray, w: np.ndarray, heads: int, rank: int, tokens: float) -> np.ndarray:
    """Projectors (H, d, d) on the bases after two sweeps, the ridge's strength being that of the first regression."""
    d = len(s) // heads
    at = [slice(h * d, h * d + d) for h in range(heads)]
    bases = [leading(s[a, a], w[a], rank) for a in at]
    strength = None
    for h in list(range(heads)) * 2:
        mix = np.zeros((len(s), 0))
        for g in range(heads):
            if g != h:
                column = np.zeros((len(s), rank))
                column[at[g]] = bases[g]
                mix = np.hstack([mix, column])
        cross = mix.T @ s
        among = cross @ mix
        mean = np.trace(among) / len(among)
        strength = strength or shift_of(among, cross, tokens, float(np.trace(s))) / mean
        inverse = np.linalg.inv(among + strength * mean * np.eye(len(among)))
        left = s - cross.T @ (inverse + strength * mean * inverse @ inverse) @ cross
        own, energy = left[at[h], at[h]], float(np.trace(w.T @ left @ w))
        bases[h] = leading(own, ridge_solve(own, left[at[h]] @ w, tokens=tokens, energy=energy), rank)
    return np.stack([b @ b.T for b in bases])


@pytest.mark.parametrize("tokens", [300.0, 500.0, 1e6])
def test_bases_are_those_of_the_whole_residual(tokens: float) -> None:
    heads, d, rank, outputs = 4, 6, 3, 15
    rng = np.random.default_rng(1)
    mixed = np.geomspace(3, 0.03, heads * d)[:, None] * rng.standard_normal((heads * d, heads * d))
    x = rng.standard_normal((300, heads * d)) @ mixed  # with 500 tokens not every head would have the same strength
    moments = Moments.known(np.zeros(heads * d), x.T @ x / 300)
    moments = Moments(moments.count, moments.total, moments.gram, tokens)
    wo, values = rng.standard_normal((heads, d, outputs)), np.eye(d)[:, None].repeat(heads, axis=1)
    found = solve_vo_subspace(values, np.zeros((heads, d)), wo, np.zeros(outputs), moments, rank)
    bases = np.moveaxis(found.wv, 0, 1)  # (H, d, r): the values were the identity
    reference = swept(moments.covariance, wo.reshape(heads * d, -1), heads, rank, tokens)
    np.testing.assert_allclose(bases @ np.swapaxes(bases, 1, 2), reference, atol=1e-7)


@pytest.mark.parametrize("outputs", [0, 2])
def test_bases_wider_than_what_is_read_lose_nothing(outputs: int) -> None:
    """Of more dimensions than outputs any completion will do; a read-out of zeros has nothing but that."""
    heads, d, rank = 2, 6, 4
    rng = np.random.default_rng(2)
    moments = Moments.of(rng.standard_normal((400, heads * d)) @ rng.standard_normal((heads * d, heads * d)))
    wo = np.concatenate([rng.standard_normal((heads, d, outputs)), np.zeros((heads, d, 3 - outputs))], axis=2)
    values = np.eye(d)[:, None].repeat(heads, axis=1)
    found = solve_vo_subspace(values, np.zeros((heads, d)), wo, np.zeros(3), moments, rank, "none")
    bases = np.moveaxis(found.wv, 0, 1)
    np.testing.assert_allclose(np.swapaxes(bases, 1, 2) @ bases, np.eye(rank)[None].repeat(heads, axis=0), atol=1e-12)
    np.testing.assert_allclose(bases @ found.wo, wo, atol=1e-6)
