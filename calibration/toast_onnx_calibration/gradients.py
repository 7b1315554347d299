"""What errors of each feed-forward network's output change of the model's answers, measured on a few samples."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from toast_onnx.finetune.fisher import Probe, fisher
from toast_onnx.matching.class_token import class_token
from toast_onnx.matching.study import Study
from toast_onnx_calibration.comparing import is_classifier
from toast_onnx_calibration.needs import GRADIENT

#: Samples that gradients are taken of, at most; they average over every token.
SAMPLES = 64
#: Samples at a time, where the model leaves it free: all activations are kept for the way back.
BATCH = 8


def measure_gradients(
    study: Study, blocks: list[int], feeds: Iterable[Mapping[str, NDArray[Any]]], class_weight: float, seed: int
) -> dict[str, NDArray[Any]]:
    """Entries of a statistics file: of every block the sum of g g^T at fc2's output, and how much was summed.

    Args:
        study: the dense model.
        blocks: numbers of blocks that have a feed-forward network.
        feeds: up to `SAMPLES` samples, `BATCH` at a time where the model leaves it free.
        class_weight: of the class token, where the output is shown to read nothing else.
        seed: of the classes that are drawn.

    Raises:
        ToastError: its children say what is wrong with the data or the model, or that PyTorch is missing.
    """
    probes = {index: _probe(study, index, class_weight) for index in blocks}
    outputs = [output.name for output in study.view.model.proto.graph.output]
    sums, counts = fisher(
        study.view.model,
        list(probes.values()),
        [name for name in outputs if is_classifier(study, name)],
        feeds,
        seed,
    )
    found: dict[str, NDArray[Any]] = {}
    for index, probe in probes.items():
        found[f"{index}.{GRADIENT}.gram"] = sums[probe.tensor][None]
        found[f"{index}.{GRADIENT}.count"] = np.asarray(counts[probe.tensor])
    return found


def _probe(study: Study, index: int, class_weight: float) -> Probe:
    """fc2's output, token 0 weighted as in the block's other statistics."""
    ffn = study.match.blocks[index].ffn
    assert ffn is not None
    selected, shape = class_token(study.view, study.facts), study.facts.shape(ffn.fc2.output) or ()
    whole = selected is not None and len(shape) == 3 and shape[1] == selected.tokens
    return Probe(ffn.fc2.output, ffn.fc2.channel_axis, class_weight if whole else 1.0)
