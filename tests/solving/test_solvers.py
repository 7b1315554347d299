"""Solvers against direct float64 computations on the activations themselves."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from toast_onnx.errors import ConfigError
from toast_onnx.importance.attention import select_qk_second_order, select_vo_second_order
from toast_onnx.importance.ffn import select_ffn_second_order, variance_scores
from toast_onnx.importance.moments import Moments
from toast_onnx.importance.selection import top_k
from toast_onnx.solving.ffn import (
    solve_fc1_inputs,
    solve_ffn,
)
from toast_onnx.solving.linear_algebra import ridge_solve
from toast_onnx.solving.qk import (
    solve_qk_cosine,
    solve_qk_index,
    solve_qk_subspace,
)
from toast_onnx.solving.vo import solve_vo_index, solve_vo_subspace

C, H, D = 10, 2, 6


class Attention:
    """A small attention layer over random tokens; `rank` plants heads of that rank."""

    def __init__(self, rank: int = D, seed: int = 0, tokens: int = 40) -> None:
        rng = np.random.default_rng(seed)
        thin = rng.standard_normal((3, H, D, rank)) @ rng.standard_normal((3, H, rank, D)) if rank < D else None
        mix = np.broadcast_to(np.eye(D), (3, H, D, D)) if thin is None else thin
        full = rng.standard_normal((3, C, H, D))
        bias = rng.standard_normal((3, H, D))
        self.wq, self.wk, self.wv = np.einsum("pchd,phde->pche", full, mix)
        self.bq, self.bk, self.bv = np.einsum("phd,phde->phe", bias, mix)
        self.wo, self.bo = rng.standard_normal((H, D, C)), rng.standard_normal(C)
        self.x = rng.standard_normal((tokens, C)) @ rng.standard_normal((C, C))
        self.q, self.k = self.heads(self.wq, self.bq), self.heads(self.wk, self.bk)
        self.v = self.heads(self.wv, self.bv)
        # any attention whose rows sum to one serves to test V with the output projection
        weights = rng.random((H, tokens, tokens))
        self.p = weights / weights.sum(axis=-1, keepdims=True)

    def heads(self, w: np.ndarray, b: np.ndarray) -> np.ndarray:
        return np.einsum("nc,chd->hnd", self.x, w) + b[:, None]

    @property
    def s_qq(self) -> np.ndarray:
        return np.einsum("hne,hnf->hef", self.q, self.q) / len(self.x)

    @property
    def s_kk(self) -> np.ndarray:
        centred = self.k - self.k.mean(axis=1, keepdims=True)
        return np.einsum("hne,hnf->hef", centred, centred) / len(self.x)

    def scores(self, wq: np.ndarray, bq: np.ndarray, wk: np.ndarray, bk: np.ndarray) -> np.ndarray:
        """Attention scores up to what softmax ignores: a constant along the keys."""
        raw = np.einsum("hie,hje->hij", self.heads(wq, bq), self.heads(wk, bk))
        return raw - raw.mean(axis=-1, keepdims=True)

    def branch(self, wv: np.ndarray, bv: np.ndarray, wo: np.ndarray, bo: np.ndarray) -> np.ndarray:
        context = np.einsum("hij,hje->hie", self.p, self.heads(wv, bv))
        return np.einsum("hie,hec->ic", context, wo) + bo

    @property
    def context(self) -> np.ndarray:
        return np.einsum("hij,hje->ihe", self.p, self.v).reshape(len(self.x), -1)

    def qk(self) -> tuple[np.ndarray, ...]:
        return self.wq, self.bq, self.wk, self.bk

    def vo(self) -> tuple[np.ndarray, ...]:
        return self.wv, self.bv, self.wo, self.bo


def error(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


def test_qk_subspace_reaches_the_error_eckart_and_young_promise() -> None:
    layer = Attention()
    solved = solve_qk_subspace(*layer.qk(), layer.s_qq, layer.s_kk, 3)
    got = layer.scores(solved.wq, solved.bq, solved.wk, solved.bk)
    dense = layer.scores(*layer.qk())
    for h in range(H):
        singular = np.linalg.svd(dense[h], compute_uv=False)
        assert np.linalg.norm(got[h] - dense[h]) == pytest.approx(np.linalg.norm(singular[3:]), rel=1e-8)


def test_qk_at_the_true_rank_is_lossless() -> None:
    layer = Attention(rank=4)
    dense = layer.scores(*layer.qk())
    basis = solve_qk_subspace(*layer.qk(), layer.s_qq, layer.s_kk, 4)
    kept = select_qk_second_order(layer.s_qq, layer.s_kk, 4)
    index = solve_qk_index(*layer.qk(), layer.s_qq, kept)
    for solved in (basis, index):
        assert error(layer.scores(solved.wq, solved.bq, solved.wk, solved.bk), dense) < 1e-6


def test_qk_index_keeps_query_columns_and_folds_by_least_squares() -> None:
    layer = Attention()
    kept = np.array([[0, 2, 5], [1, 2, 3]])
    solved = solve_qk_index(*layer.qk(), layer.s_qq, kept, ridge=0.0)
    for h in range(H):
        np.testing.assert_array_equal(solved.wq[:, h], layer.wq[:, h, kept[h]])
        prediction = np.linalg.lstsq(layer.q[h][:, kept[h]], layer.q[h], rcond=None)[0]  # (r, d)
        np.testing.assert_allclose(solved.wk[:, h], layer.wk[:, h] @ prediction.T, rtol=1e-6, atol=1e-8)
        np.testing.assert_allclose(solved.bk[h], layer.bk[h] @ prediction.T, rtol=1e-6, atol=1e-8)


def test_qk_without_compensation_is_plain_removal() -> None:
    layer = Attention()
    kept = np.array([[0, 2, 5], [1, 2, 3]])
    solved = solve_qk_index(*layer.qk(), layer.s_qq, kept, "none")
    for h in range(H):
        np.testing.assert_array_equal(solved.wk[:, h], layer.wk[:, h, kept[h]])


def test_cosine_basis_is_common_and_orthogonal() -> None:
    layer = Attention(rank=6)
    shared = np.linalg.qr(np.random.default_rng(1).standard_normal((D, D)))[0][:, :4]
    project = shared @ shared.T  # queries and keys live in one common subspace of four dimensions
    wq, bq, wk, bk = (a @ project for a in layer.qk())
    s_qq, s_kk = (np.einsum("hne,hnf->hef", x, x) for x in (layer.heads(wq, bq), layer.heads(wk, bk)))
    solved = solve_qk_cosine(wq, bq, wk, bk, s_qq, s_kk, 4)

    def cosine(wq: np.ndarray, bq: np.ndarray, wk: np.ndarray, bk: np.ndarray) -> np.ndarray:
        q, k = layer.heads(wq, bq), layer.heads(wk, bk)
        unit_q, unit_k = (x / np.linalg.norm(x, axis=-1, keepdims=True) for x in (q, k))
        return np.einsum("hie,hje->hij", unit_q, unit_k)

    assert error(cosine(solved.wq, solved.bq, solved.wk, solved.bk), cosine(wq, bq, wk, bk)) < 1e-10


def test_vo_subspace_without_other_heads_is_the_truncated_svd() -> None:
    layer = Attention(seed=3)
    alone = slice(0, 1)
    wv, bv, wo = layer.wv[:, alone], layer.bv[alone], layer.wo[alone]
    context = layer.context[:, :D]
    solved = solve_vo_subspace(wv, bv, wo, layer.bo, Moments.of(context), 3, ridge=0.0)
    layer.p = layer.p[alone]
    dense, got = layer.branch(wv, bv, wo, layer.bo), layer.branch(solved.wv, solved.bv, solved.wo, solved.bo)
    singular = np.linalg.svd(dense - dense.mean(axis=0), compute_uv=False)
    assert np.linalg.norm(got - dense) == pytest.approx(np.linalg.norm(singular[3:]), rel=1e-6)


def test_vo_sweeps_over_the_heads_lower_the_error() -> None:
    layer = Attention(seed=4)
    dense = layer.branch(*layer.vo())

    def loss(sweeps: int) -> float:
        solved = solve_vo_subspace(*layer.vo(), Moments.of(layer.context), 2, sweeps=sweeps)
        return error(layer.branch(solved.wv, solved.bv, solved.wo, solved.bo), dense)

    assert loss(1) < loss(0)
    assert loss(3) <= loss(1) * (1 + 1e-9)


def test_vo_sweep_ends_at_the_reduced_rank_regression_of_the_last_head() -> None:
    """Given the first head's basis, no basis of the second does better; computed from the tokens, not from moments."""
    layer, rank = Attention(seed=6), 2
    dense = layer.branch(*layer.vo())
    context = layer.context
    solved = solve_vo_subspace(*layer.vo(), Moments.of(context), rank, ridge=0.0, sweeps=1)
    first = layer.p[0] @ layer.heads(solved.wv, solved.bv)[0]  # (tokens, r)
    design = np.column_stack([first, np.ones(len(first))])

    def left(a: np.ndarray) -> np.ndarray:
        return a - design @ np.linalg.lstsq(design, a, rcond=None)[0]

    own, target = left(context[:, D:]), left(dense)
    fitted = own @ np.linalg.lstsq(own, target, rcond=None)[0]
    tail = np.linalg.svd(fitted, compute_uv=False)[rank:]
    expected = np.sqrt(np.linalg.norm(target - fitted) ** 2 + np.linalg.norm(tail) ** 2)
    got = layer.branch(solved.wv, solved.bv, solved.wo, solved.bo)
    assert np.linalg.norm(got - dense) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("compensation", ["none", "bias", "ridge"])
def test_vo_subspace_at_the_true_rank_is_lossless(compensation: str) -> None:
    layer = Attention(rank=4)
    solved = solve_vo_subspace(*layer.vo(), Moments.of(layer.context), 4, compensation)
    assert error(layer.branch(solved.wv, solved.bv, solved.wo, solved.bo), layer.branch(*layer.vo())) < 1e-6


def test_vo_index_at_the_true_rank_is_lossless() -> None:
    layer = Attention(rank=4)
    moments = Moments.of(layer.context)
    kept = select_vo_second_order(moments, layer.wo, 4)
    solved = solve_vo_index(*layer.vo(), kept, moments)
    assert error(layer.branch(solved.wv, solved.bv, solved.wo, solved.bo), layer.branch(*layer.vo())) < 1e-6


def test_vo_index_is_least_squares_over_all_heads() -> None:
    layer = Attention(seed=5)
    kept = np.array([[0, 1, 4], [2, 3, 5]])
    flat = np.concatenate([kept[0], kept[1] + D])
    solved = solve_vo_index(*layer.vo(), kept, Moments.of(layer.context), ridge=0.0)
    design = np.column_stack([layer.context[:, flat], np.ones(len(layer.x))])
    expected = np.linalg.lstsq(design, layer.branch(*layer.vo()), rcond=None)[0]
    np.testing.assert_allclose(solved.wo.reshape(-1, C), expected[:-1], rtol=1e-6, atol=1e-8)
    np.testing.assert_allclose(solved.bo, expected[-1], rtol=1e-6, atol=1e-8)
    for h in range(H):
        np.testing.assert_array_equal(solved.wv[:, h], layer.wv[:, h, kept[h]])


def hidden_units(tokens: int = 400, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Activations with one dead unit, one duplicated and two linearly dependent on others: rank 8 of 12."""
    rng = np.random.default_rng(seed)
    h = np.maximum(rng.standard_normal((tokens, 12)), -0.5) + 0.3
    h[:, 3] = 0
    h[:, 7] = h[:, 1]
    h[:, 9] = h[:, 0] - 2 * h[:, 5]
    h[:, 11] = 0.5 * h[:, 4] + h[:, 6] + 0.25 * h[:, 2]
    return h, rng.standard_normal((12, 5)), rng.standard_normal(5)


def test_ffn_at_the_true_rank_is_lossless() -> None:
    h, w2, b2 = hidden_units()
    moments = Moments.of(h)
    kept = select_ffn_second_order(moments, w2, 8)
    solved = solve_ffn(kept, w2, b2, moments)
    assert error(h[:, kept] @ solved.w2 + solved.b2, h @ w2 + b2) < 1e-6
    short = solve_ffn(kept[:7], w2, b2, moments)
    assert error(h[:, kept[:7]] @ short.w2 + short.b2, h @ w2 + b2) > 1e-3  # seven are really too few


def test_ffn_ridge_is_ridge_regression_towards_the_old_weights() -> None:
    rng = np.random.default_rng(8)
    h, w2, b2 = rng.standard_normal((500, 6)) @ rng.standard_normal((6, 6)) + 1, rng.standard_normal((6, 3)), np.ones(3)
    kept, gone = np.array([0, 2, 3, 5]), [1, 4]
    solved = solve_ffn(kept, w2, b2, Moments.of(h), ridge=0.1)
    centred = h - h.mean(axis=0)
    strength = 0.1 * (centred[:, kept] ** 2).mean(axis=0).mean() * len(h)
    design = np.concatenate([centred[:, kept], np.sqrt(strength) * np.eye(4)])
    target = np.concatenate([centred[:, gone] @ w2[gone], np.zeros((4, 3))])
    expected = w2[kept] + np.linalg.lstsq(design, target, rcond=None)[0]
    np.testing.assert_allclose(solved.w2, expected, rtol=1e-8)
    np.testing.assert_allclose((h[:, kept] @ solved.w2 + solved.b2).mean(axis=0), (h @ w2 + b2).mean(axis=0))


def test_ffn_bias_moves_the_mean_of_the_dropped() -> None:
    h, w2, b2 = hidden_units()
    kept = np.array([0, 1, 2, 4])
    solved = solve_ffn(kept, w2, b2, Moments.of(h), "bias")
    gone = np.setdiff1d(np.arange(12), kept)
    np.testing.assert_array_equal(solved.w2, w2[kept])
    np.testing.assert_allclose(solved.b2, b2 + h[:, gone].mean(axis=0) @ w2[gone])
    plain = solve_ffn(kept, w2, b2, compensation="none")
    np.testing.assert_array_equal(plain.b2, b2)


def test_variance_ranks_by_output_variance() -> None:
    h, w2, _ = hidden_units()
    expected = np.argsort(-(h.var(axis=0) * (w2**2).sum(axis=1)))[:5]
    assert top_k(variance_scores(Moments.of(h), w2), 5).tolist() == sorted(expected.tolist())


def test_fc1_inputs_fold_into_both_entries_of_a_gated_ffn() -> None:
    rng = np.random.default_rng(2)
    x = rng.standard_normal((300, 5)) @ rng.standard_normal((5, 8)) + 2  # eight channels, rank five
    w1 = (rng.standard_normal((8, 6)), rng.standard_normal((8, 6)))
    b1 = (rng.standard_normal(6), np.zeros(6))
    moments = Moments.of(x)
    kept = select_ffn_second_order(moments, np.concatenate(w1, axis=1), 5)
    solved = solve_fc1_inputs(kept, w1, b1, moments)
    for i in range(2):
        assert error(x[:, kept] @ solved.w1[i] + solved.b1[i], x @ w1[i] + b1[i]) < 1e-6


@settings(max_examples=10, deadline=None)
@given(dtype=st.sampled_from([np.float16, np.float32, np.float64]), seed=st.integers(0, 1000))
def test_keeping_everything_returns_the_same_bits(dtype: type, seed: int) -> None:
    layer = Attention(seed=seed)
    qk, vo = [a.astype(dtype) for a in layer.qk()], [a.astype(dtype) for a in layer.vo()]
    everything = np.tile(np.arange(D), (H, 1))
    moments = Moments.of(layer.context)
    for solved in (
        solve_qk_subspace(*qk, layer.s_qq, layer.s_kk, D),
        solve_qk_index(*qk, layer.s_qq, everything),
        solve_qk_cosine(*qk, layer.s_qq, layer.s_kk, D),
    ):
        for got, given_ in zip((solved.wq, solved.bq, solved.wk, solved.bk), qk, strict=True):
            assert got.tobytes() == given_.tobytes()
    for solved_vo in (solve_vo_subspace(*vo, moments, D), solve_vo_index(*vo, everything, moments)):
        for got, given_ in zip((solved_vo.wv, solved_vo.bv, solved_vo.wo, solved_vo.bo), vo, strict=True):
            assert got.tobytes() == given_.tobytes()
    w2 = layer.wo.reshape(-1, C).astype(dtype)
    ffn = solve_ffn(np.arange(H * D), w2, vo[3], moments)
    assert ffn.w2.tobytes() == w2.tobytes()
    inputs = solve_fc1_inputs(np.arange(H * D), w2, vo[3], moments)
    assert inputs.w1[0].tobytes() == w2.tobytes()


def test_results_come_back_in_the_dtype_that_went_in() -> None:
    layer = Attention()
    half = [a.astype(np.float16) for a in layer.vo()]
    solved = solve_vo_subspace(*half, Moments.of(layer.context), 3)
    assert {a.dtype for a in (solved.wv, solved.bv, solved.wo, solved.bo)} == {np.dtype(np.float16)}


def test_negative_ridge_and_missing_moments_are_refused() -> None:
    with pytest.raises(ConfigError, match="negative"):
        ridge_solve(np.eye(2), np.eye(2), -1.0)
    with pytest.raises(ValueError, match="needs moments"):
        solve_ffn(np.array([0]), np.ones((2, 2)), np.zeros(2), compensation="ridge")
