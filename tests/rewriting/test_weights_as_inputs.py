"""Files that list their weights among the inputs, as IR version 3 asks for: pruned like any other."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx.helper
import pytest

from tests import zoo
from tests.pruning import UNEVEN, look
from toast_onnx.choosing.synthetic import SyntheticStatistics
from toast_onnx.model import load_model, save_model
from toast_onnx.planning.ratios import parse_ratios
from toast_onnx.pruning import prune

Exported = Callable[[zoo.Case], Path]


@pytest.mark.parametrize("version", [3, 8])
def test_they_lose_the_same(version: int, exported: Exported, tmp_path: Path) -> None:
    path = exported(zoo.Case("timm-vit"))
    model = onnx.load(path)
    model.ir_version = version
    every = [onnx.helper.make_tensor_value_info(t.name, t.data_type, t.dims) for t in model.graph.initializer]
    model.graph.input.extend(every)
    onnx.save(model, tmp_path / "old.onnx")
    found = []
    for name, source in (("new", path), ("old", tmp_path / "old.onnx")):
        dense = look(source)
        pruned = prune(dense, parse_ratios(UNEVEN), SyntheticStatistics(dense))
        save_model(pruned.model, tmp_path / f"{name}.pruned.onnx")
        found.append(onnx.load(tmp_path / f"{name}.pruned.onnx"))
    plain, old = found
    assert [v.name for v in old.graph.input] == [v.name for v in plain.graph.input]
    arrays = [{t.name: onnx.numpy_helper.to_array(t) for t in each.graph.initializer} for each in found]
    assert arrays[0].keys() == arrays[1].keys()
    for name, value in arrays[0].items():
        np.testing.assert_array_equal(arrays[1][name], value)
    onnx.checker.check_model(old)


def test_a_single_default_stays_an_input(exported: Exported, tmp_path: Path) -> None:
    model = onnx.load(exported(zoo.Case("timm-vit")))
    tensor = model.graph.initializer[0]
    model.graph.input.append(onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
    onnx.save(model, tmp_path / "default.onnx")
    assert tensor.name in {value.name for value in load_model(tmp_path / "default.onnx").proto.graph.input}
