"""The one table of scores: what each reads, how it ranks, which channels it keeps, and its sentence for the docs.

A new score is one more entry. The ratios file's schema, calibration, selection, loss curves and docs/formats.md read
the table; a name that it lacks is an error everywhere.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Generic, Literal, TypeVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

from toast_onnx.errors import ConfigError
from toast_onnx.importance.attention import (
    qk_energy,
    qk_scores,
    select_qk_second_order,
    select_vo_second_order,
    vo_energy,
    vo_scores,
)
from toast_onnx.importance.ffn import (
    select_ffn_second_order,
    variance_scores,
    wanda_scores,
    weight_scores,
)
from toast_onnx.importance.loss_curves import elimination_order
from toast_onnx.importance.moments import Moments
from toast_onnx.importance.regular import root
from toast_onnx.importance.selection import Indices, top_k, top_k_shared

Array = NDArray[np.float64]
#: What a score reads besides the weights: nothing, moments of the activations, the paper's magnitudes of tokens, or
#: gradients of the model's answers beside the moments.
Needs = Literal["weights", "moments", "tokens", "gradients"]
S = TypeVar("S")


@dataclass(frozen=True)
class QueriesKeys:
    """What may rank the dimensions that queries and keys share.

    Attributes:
        wq: (C, H, d), and so wk.
        s_qq: E[q q^T], (H, d, d); None where only weights are read, and so s_kk, of the keys within an image.
        coupling: which weights count.
    """

    wq: ArrayLike
    wk: ArrayLike
    s_qq: Array | None
    s_kk: Array | None
    coupling: str

    def measured(self) -> tuple[Array, Array]:
        """Both second moments."""
        assert self.s_qq is not None
        assert self.s_kk is not None
        return self.s_qq, self.s_kk


@dataclass(frozen=True)
class Values:
    """What may rank the dimensions that values and the output projection share.

    Attributes:
        wv: (C, H, d).
        wo: (H, d, C_out), layer scale folded in.
        context: moments of the concatenated contexts, n = H * d; None where only weights are read.
        coupling: which weights count.
    """

    wv: ArrayLike
    wo: Array
    context: Moments | None
    coupling: str

    def measured(self) -> Moments:
        """The contexts' moments."""
        assert self.context is not None
        return self.context


@dataclass(frozen=True)
class Channels:
    """What may rank channels of a feed-forward network: fc1's inputs, or hidden units.

    Attributes:
        writers: (C, n) weights that make each channel, one array for each part of a gated form; none for fc1's inputs.
        rows: (n, m) weights that read each channel, layer scale folded in; in the metric of the model's answers where
            the score reads gradients.
        moments: of the channels; None where no moments are read.
        tokens: gives the paper's scores (n,), measured along with the moments.
    """

    writers: tuple[ArrayLike, ...]
    rows: Array
    moments: Moments | None
    tokens: Callable[[], Array]

    def measured(self) -> Moments:
        """The channels' moments."""
        assert self.moments is not None
        return self.moments


@dataclass(frozen=True)
class Ranking(Generic[S]):
    """How one kind of channel is ranked.

    Attributes:
        ranks: (..., n) numbers, the highest stay longest; loss curves follow them.
        choose: the channels that stay, for a count; None takes the highest ranks.
    """

    ranks: Callable[[S], Array]
    choose: Callable[[S, int], Indices] | None = None

    def keep(self, subject: S, kept: int) -> Indices:
        """Indices (..., kept) that stay, ascending."""
        return top_k(self.ranks(subject), kept) if self.choose is None else self.choose(subject, kept)


@dataclass(frozen=True)
class AttentionScore:
    """A score of attention dimensions.

    Attributes:
        needs: what it reads.
        qk: how it ranks dimensions of queries and keys.
        vo: how it ranks dimensions of values.
        shared: scores (H, d) of queries and keys that may be added over heads which must keep the same dimensions.
        implies_index: whether naming it asks for `select: index`.
        meaning: its sentence for the docs.
    """

    needs: Needs
    qk: Ranking[QueriesKeys]
    vo: Ranking[Values]
    shared: Callable[[QueriesKeys], Array]
    implies_index: bool
    meaning: str

    @property
    def couples(self) -> bool:
        """Whether `attention.coupling` applies: to scores that read weights alone."""
        return self.needs == "weights"

    def keep_shared(self, subject: QueriesKeys, kept: int, pairs: ArrayLike | None) -> Indices:
        """The same dimensions (H, kept) for every head, `pairs` (d / 2, 2) of them together."""
        heads, d = np.shape(subject.wq)[1:]
        return top_k_shared(np.broadcast_to(self.shared(subject), (heads, d)), kept, pairs)


@dataclass(frozen=True)
class FfnScore:
    """A score of feed-forward channels.

    Attributes:
        needs: what it reads.
        ranking: how it ranks channels.
        meaning: its sentence for the docs.
    """

    needs: Needs
    ranking: Ranking[Channels]
    meaning: str

    @property
    def reads_moments(self) -> bool:
        """Whether it reads moments of the activations."""
        return self.needs in ("moments", "gradients")


def attention_score(name: str) -> AttentionScore:
    """The entry of that name.

    Raises:
        ConfigError: there is none.
    """
    return _entry(ATTENTION_SCORES, name, "attention")


def ffn_score(name: str) -> FfnScore:
    """The entry of that name.

    Raises:
        ConfigError: there is none.
    """
    return _entry(FFN_SCORES, name, "ffn")


def _entry(table: Mapping[str, S], name: str, part: str) -> S:
    if name not in table:
        raise ConfigError(f"unknown {part} score {name!r}; choose one of {', '.join(table)}")
    return table[name]


def _weight_score(row_score: str, meaning: str) -> AttentionScore:
    """A score of weight rows, under a coupling."""

    def of_pairs(of: QueriesKeys) -> Array:
        return qk_scores(of.wq, of.wk, row_score, of.coupling)

    def of_values(of: Values) -> Array:
        return vo_scores(of.wv, of.wo, row_score, of.coupling)

    return AttentionScore("weights", Ranking(of_pairs), Ranking(of_values), of_pairs, True, meaning)


def _places(order: Indices) -> Array:
    """Ranks (n,) of channels that are given in order, the one that stays longest first."""
    ranks = np.empty(order.size)
    ranks[order] = -np.arange(order.size)
    return ranks


def _qk_elimination(of: QueriesKeys) -> Array:
    s_qq, s_kk = of.measured()
    return np.stack([_places(elimination_order(s, r)) for s, r in zip(s_qq, root(s_kk), strict=True)])


def _vo_elimination(of: Values) -> Array:
    heads, d, _ = of.wo.shape
    return _places(elimination_order(of.measured().covariance, of.wo.reshape(heads * d, -1))).reshape(heads, d)


def _magnitude(row_score: str) -> Ranking[Channels]:
    return Ranking(lambda of: weight_scores(of.writers, of.rows, row_score))


ATTENTION_SCORES: dict[str, AttentionScore] = {
    "energy": AttentionScore(
        "moments",
        Ranking(lambda of: qk_energy(*of.measured())),
        Ranking(lambda of: vo_energy(of.measured().covariance, of.wo)),
        lambda of: qk_energy(*of.measured()),
        False,
        "what a dimension carries alone: E[q²] E[k²], and var(o) ‖w‖² of a value",
    ),
    "second-order": AttentionScore(
        "moments",
        Ranking(_qk_elimination, lambda of, kept: select_qk_second_order(*of.measured(), kept)),
        Ranking(_vo_elimination, lambda of, kept: select_vo_second_order(of.measured(), of.wo, kept)),
        lambda of: qk_energy(*of.measured()),  # removals of one head have no meaning in another
        True,
        "what removal costs once the others are refitted, one removal after the other; `energy` where heads must agree",
    ),
    "gm": _weight_score("gm", "distance of a weight row from the lower median of all rows, as in the paper"),
    "l1": _weight_score("l1", "sum of magnitudes of a weight row"),
    "l2": _weight_score("l2", "sum of squares of a weight row"),
}

_ELIMINATION: Ranking[Channels] = Ranking(
    lambda of: _places(elimination_order(of.measured().covariance, of.rows)),
    lambda of, kept: select_ffn_second_order(of.measured(), of.rows, kept),
)

FFN_SCORES: dict[str, FfnScore] = {
    "second-order": FfnScore(
        "moments", _ELIMINATION, "what removal costs once the others are refitted, one removal after the other"
    ),
    "fisher": FfnScore(
        "gradients",
        _ELIMINATION,
        "`second-order`, errors of fc2's output counted by what they change of the model's answers (Fisher "
        "information, no labels); needs data and PyTorch",
    ),
    "variance": FfnScore(
        "moments",
        Ranking(lambda of: variance_scores(of.measured(), of.rows)),
        "var(x) ‖w‖²: variance that a channel sends to the output",
    ),
    "wanda": FfnScore(
        "moments",
        Ranking(lambda of: wanda_scores(of.measured(), of.rows)),
        "√E[x²] Σ|w|: Wanda's weight magnitude times input norm, added up for whole channels",
    ),
    "activation": FfnScore(
        "tokens",
        Ranking(lambda of: of.tokens()),
        "the paper's score: mean magnitude over tokens, weighted by the class token's attention; needs data",
    ),
    "l1": FfnScore("weights", _magnitude("l1"), "sum of magnitudes of the weights that make and read a channel"),
    "l2": FfnScore("weights", _magnitude("l2"), "sum of squares of the weights that make and read a channel"),
}
