"""What is compared: class scores by KL, other outputs by squared error, and the stream at every block's end."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx.helper
import pytest
import torch

from tests import zoo
from tests.finetune.graphs import FLOAT, graph_model, residual_mlp
from tests.pace import mostly_slow
from tests.pruning import UNEVEN, look, prune_file
from toast_onnx.errors import ConfigError
from toast_onnx.finetune import to_torch
from toast_onnx.finetune.objective import choose_targets
from toast_onnx.finetune.streams import block_ends, common_ends
from toast_onnx.matching.study import study
from toast_onnx.model import load_model

Exported = Callable[[zoo.Case], Path]


@pytest.mark.parametrize("exporter", ["torchscript-17", "dynamo-20"])
def test_block_ends_are_the_original_blocks_outputs(exporter: str, exported: Exported) -> None:
    """Compared with what the library's own blocks return, by hooks."""
    path = exported(zoo.Case("timm-vit", exporter))
    ends = block_ends(look(path))
    assert len(ends) == 2
    subject = zoo.build("timm-vit")
    returned: list[torch.Tensor] = []
    for block in subject.module.blocks:
        block.register_forward_hook(lambda _module, _inputs, output: returned.append(output.detach()))
    feeds = zoo.inputs(path, 2)
    with torch.no_grad():
        subject.module(torch.from_numpy(feeds["input"]))
        found = to_torch(load_model(path))(torch.from_numpy(feeds["input"]), keep=list(ends))
    for name, want in zip(ends, returned, strict=True):
        torch.testing.assert_close(found[name], want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "family", mostly_slow(["timm-swin", "hf-dinov2", "torchvision-vit", "hf-vit"], "hf-vit".__eq__)
)
def test_pruned_and_dense_share_all_block_ends(family: str, exported: Exported, tmp_path: Path) -> None:
    path = exported(zoo.Case(family))
    dense, _ = prune_file(path, UNEVEN, tmp_path / "pruned.onnx")
    shared = common_ends(look(tmp_path / "pruned.onnx"), dense)
    assert len(shared) == len(dense.match.blocks)


@pytest.mark.parametrize(
    ("family", "classifiers", "others"),
    [
        ("timm-vit", ("logits",), ()),
        ("hf-vit", (), ("last_hidden_state", "pooler_output")),
        ("timm-deit-distilled", ("logits",), ()),
    ],
)
def test_outputs_are_compared_by_what_they_are(
    family: str, classifiers: tuple[str, ...], others: tuple[str, ...], exported: Exported
) -> None:
    found = look(exported(zoo.Case(family)))
    targets = choose_targets(found, found)
    assert (targets.classifiers, targets.others, targets.scores) == (classifiers, others, None)
    assert targets.stream == tuple(block_ends(found))
    assert choose_targets(found, found, "mse").classifiers == ()


def test_a_final_softmax_is_looked_through() -> None:
    node = onnx.helper.make_node("Softmax", ["logits"], ["probabilities"])
    model = copy.deepcopy(residual_mlp())
    model.proto.graph.node.append(node)
    model.proto.graph.output[0].CopyFrom(onnx.helper.make_tensor_value_info("probabilities", FLOAT, ["batch", 4]))
    found = study(model)
    targets = choose_targets(found, found, labelled=True)
    assert (targets.classifiers, targets.scores) == (("logits",), "logits")


def test_models_without_a_common_output_are_refused() -> None:
    node = onnx.helper.make_node("Relu", ["x"], ["other"])
    model = graph_model([node], {"x": (FLOAT, ["batch", 8])}, ["other"])
    with pytest.raises(ConfigError, match="no float output of the same name"):
        choose_targets(study(residual_mlp()), study(model))


def test_labels_need_class_scores() -> None:
    node = onnx.helper.make_node("Mul", ["x", "w"], ["y"])
    model = graph_model([node], {"x": (FLOAT, ["batch", 3, 4])}, ["y"], {"w": np.ones(4, np.float32)})
    model.proto.graph.output[0].CopyFrom(onnx.helper.make_tensor_value_info("y", FLOAT, ["batch", 3, 4]))
    with pytest.raises(ConfigError, match="one row of class scores"):
        choose_targets(study(model), None, labelled=True)
