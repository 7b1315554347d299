"""fc2's weights as a score reads them: every output channel by what its errors cost."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from toast_onnx.importance.ffn import rows_in_metric, scaled_rows
from toast_onnx.importance.scores import ffn_score
from toast_onnx.importance.statistics import Statistics
from toast_onnx.matching.blocks import Ffn
from toast_onnx.matching.linear import weights
from toast_onnx.matching.norms import layer_scale
from toast_onnx.matching.study import Study


def fc2_rows(study: Study, block: int, ffn: Ffn, score: str, statistics: Statistics) -> NDArray[np.float64]:
    """Rows of fc2 (width, C_out): layer scale folded in, or in the metric of the answers, which has it in.

    Args:
        study: the model.
        block: number of the block.
        ffn: its feed-forward network.
        score: name of its score.
        statistics: asked for the metric where the score reads gradients.

    Raises:
        ConfigError: it reads gradients, and there are no samples.
    """
    view, facts = study.view, study.facts
    rows = weights(view, facts, ffn.fc2)
    if ffn_score(score).needs == "gradients":
        return rows_in_metric(rows, statistics.metric(block))
    return scaled_rows(rows, layer_scale(view, facts, ffn.fc2.output, ffn.fc2.out_features))
