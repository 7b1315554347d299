"""Graphs that ONNX Runtime's own quantizer wrote: nothing is guessed, and every part says what to do instead."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, quantize_dynamic, quantize_static

from tests.matching.tiny import TOKENS, WIDTH, block
from tests.pruning import UNEVEN, look, prune_file
from toast_onnx.errors import MatchError, ModelError
from toast_onnx.reasons import Kind

ADVICE = "prune first, then quantize"


class Tokens(CalibrationDataReader):
    """Two batches of noise."""

    def __init__(self) -> None:
        random = np.random.default_rng(0)
        shape = (2, TOKENS, WIDTH)
        self._feeds: Iterator[dict[str, np.ndarray]] = iter(
            [{"x": random.standard_normal(shape).astype(np.float32)} for _ in range(2)]
        )

    def get_next(self) -> dict[str, np.ndarray] | None:
        return next(self._feeds, None)


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    graph, y = block()
    return graph.save(tmp_path_factory.mktemp("dense") / "model.onnx", y)


@pytest.mark.parametrize("per_channel", [False, True])
def test_every_part_of_a_qdq_graph_says_prune_first(dense: Path, per_channel: bool, tmp_path: Path) -> None:
    path = tmp_path / "qdq.onnx"
    quantize_static(str(dense), str(path), Tokens(), quant_format=QuantFormat.QDQ, per_channel=per_channel)
    (found,) = look(path).match.blocks
    assert found.attention is not None
    assert found.ffn is not None
    parts = (found.attention.qk_reason, found.attention.vo_reason, found.ffn.fc1_reason, found.ffn.fc2_reason)
    assert all(reason is not None and reason.kind == Kind.QUANTIZED for reason in parts)
    with pytest.raises(MatchError, match=ADVICE):
        prune_file(path, UNEVEN)
    _, pruned = prune_file(path, UNEVEN, skip_unprunable=True)
    assert pruned.weights == {}


def test_quantized_operators_are_named(dense: Path, tmp_path: Path) -> None:
    path = tmp_path / "operators.onnx"
    quantize_static(str(dense), str(path), Tokens(), quant_format=QuantFormat.QOperator)
    match = look(path).match
    assert match.blocks == ()
    assert [reason.kind for reason in match.declined.values()] == [Kind.QUANTIZED]
    with pytest.raises(ModelError, match="no transformer block"):
        prune_file(path, UNEVEN)


def test_dynamically_quantized_layers_say_so(dense: Path, tmp_path: Path) -> None:
    path = tmp_path / "dynamic.onnx"
    quantize_dynamic(str(dense), str(path))
    (found,) = look(path).match.blocks
    assert found.attention is not None
    assert {r and r.kind for r in (found.attention.qk_reason, found.attention.vo_reason)} == {Kind.QUANTIZED}
