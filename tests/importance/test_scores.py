"""The table of scores: every entry ranks as it chooses, an unknown name is refused, and wanda is what it says."""

from __future__ import annotations

import numpy as np
import pytest

from toast_onnx.errors import ConfigError
from toast_onnx.importance.moments import Moments
from toast_onnx.importance.scores import (
    ATTENTION_SCORES,
    FFN_SCORES,
    Channels,
    QueriesKeys,
    Values,
    attention_score,
    ffn_score,
)

N, M, H, D = 12, 7, 2, 6
RNG = np.random.default_rng(5)
X = RNG.normal(size=(400, N)) * RNG.uniform(0.2, 3, N) + RNG.normal(size=N)
W = RNG.normal(size=(N, M))


def channels(writers: bool) -> Channels:
    made = (RNG.normal(size=(5, N)),) if writers else ()
    return Channels(made, W, Moments.of(X), lambda: np.abs(X).mean(axis=0))


@pytest.mark.parametrize("name", FFN_SCORES)
@pytest.mark.parametrize("writers", [True, False])
def test_channels_that_stay_are_the_first_in_rank(name: str, writers: bool) -> None:
    """Elimination one at a time has the same order as its curve, where no stop lies between."""
    ranking, subject = ffn_score(name).ranking, channels(writers)
    ranks = ranking.ranks(subject)
    assert ranks.shape == (N,)
    for kept in (1, 5, N):
        assert ranking.keep(subject, kept).tolist() == sorted(np.argsort(-ranks, kind="stable")[:kept].tolist())


@pytest.mark.parametrize("name", ATTENTION_SCORES)
def test_dimensions_of_every_head_are_ranked_and_kept(name: str) -> None:
    score = attention_score(name)
    wq, wk, wv = RNG.normal(size=(3, 10, H, D))
    moments = Moments.of(RNG.normal(size=(300, H * D)))
    own = np.stack([np.cov(RNG.normal(size=(D, 90))) for _ in range(H)])
    pairs, values = QueriesKeys(wq, wk, own, own, "coupled"), Values(wv, wv.transpose(1, 2, 0), moments, "coupled")
    for ranks, kept in (
        (score.qk.ranks(pairs), score.qk.keep(pairs, 3)),
        (score.vo.ranks(values), score.vo.keep(values, 3)),
    ):
        assert ranks.shape == (H, D)
        assert kept.shape == (H, 3)
    shared = score.keep_shared(pairs, 4, np.array([[0, 3], [1, 4], [2, 5]]))
    assert shared.shape == (H, 4)
    assert (shared[0] == shared[1]).all()


def test_wanda_adds_up_weight_magnitude_times_input_norm() -> None:
    """Sun et al.: |W_oj| ||X_j||_2, here over tokens' root mean square, summed over what reads the channel."""
    norms = np.array([np.sqrt((column**2).mean()) for column in X.T])
    expected = np.array([sum(abs(w) * norms[j] for w in W[j]) for j in range(N)])
    assert ffn_score("wanda").ranking.ranks(channels(True)) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("ask", [attention_score, ffn_score])
def test_an_unknown_name_is_refused(ask: object) -> None:
    with pytest.raises(ConfigError, match=r"unknown .* score 'magic'; choose one of"):
        ask("magic")  # type: ignore[operator]
