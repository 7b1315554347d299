"""MACs and parameters: single operators against hand arithmetic, whole models against the published figures."""

from __future__ import annotations

from math import prod
from pathlib import Path

import numpy as np
import onnx
import onnx.helper
import onnx.numpy_helper
import pytest

from tests import zoo
from tests.pruning import look
from tests.weightless import export_weightless
from toast_onnx.matching.facts import Facts
from toast_onnx.matching.graph import GraphView
from toast_onnx.model import Model
from toast_onnx.planning.macs import attention_macs, ffn_macs, graph_macs, graph_params

#: timm's name -> GMACs, the figures the paper's own accounting starts from.
PUBLISHED = {
    "deit_tiny_patch16_224": 1.254,
    "deit_small_patch16_224": 4.599,
    "deit_base_patch16_224": 17.564,
    "vit_base_patch16_224.mae": 17.564,
    "vit_large_patch16_224.mae": 61.555,
    "vit_huge_patch14_224.mae": 167.296,
    "swin_tiny_patch4_window7_224": 4.491,
    "swin_small_patch4_window7_224": 8.741,
    "swin_base_patch4_window7_224": 15.431,
}
PARAMETERS = {  # millions, as the models' papers and timm list them, classification head included
    "deit_tiny_patch16_224": 5.717,
    "deit_small_patch16_224": 22.051,
    "deit_base_patch16_224": 86.568,
    "vit_base_patch16_224.mae": 86.568,
    "vit_large_patch16_224.mae": 304.327,
    "vit_huge_patch14_224.mae": 632.046,
    "swin_tiny_patch4_window7_224": 28.288,
    "swin_small_patch4_window7_224": 49.606,
    "swin_base_patch4_window7_224": 87.768,
}
BLOCKS = {
    "vit_large_patch16_224.mae": 24,
    "vit_huge_patch14_224.mae": 32,
    "swin_small_patch4_window7_224": 24,
    "swin_base_patch4_window7_224": 24,
}
FAST = {"deit_tiny_patch16_224"}


def counted(
    op: str,
    inputs: dict[str, tuple[int, ...]],
    weights: dict[str, tuple[int, ...]],
    domain: str = "",
    **attributes: object,
) -> int:
    """MACs of a graph of one node; its inputs come in the order given, weights after activations."""
    node = onnx.helper.make_node(op, [*inputs, *weights], ["y"], domain=domain, **attributes)
    graph = onnx.helper.make_graph(
        [node],
        "one",
        [onnx.helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, s) for n, s in inputs.items()],
        [onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, None)],
        [onnx.numpy_helper.from_array(np.ones(s, np.float32), n) for n, s in weights.items()],
    )
    opsets = [onnx.helper.make_opsetid("", 23), onnx.helper.make_opsetid("com.microsoft", 1)]
    view = GraphView(Model(onnx.helper.make_model(graph, opset_imports=opsets), Path("one.onnx")))
    return graph_macs(view, Facts(view, inputs))


@pytest.mark.parametrize(
    ("op", "inputs", "weights", "options", "macs"),
    [
        ("MatMul", {"x": (2, 5, 3)}, {"w": (3, 7)}, {}, 2 * 5 * 3 * 7),
        ("MatMul", {"x": (2, 4, 5, 3), "k": (2, 4, 3, 6)}, {}, {}, 2 * 4 * 5 * 3 * 6),
        ("Gemm", {"x": (5, 3)}, {"w": (7, 3), "b": (7,)}, {"transB": 1}, 5 * 3 * 7),
        ("Gemm", {"x": (3, 5)}, {"w": (3, 7), "b": (7,)}, {"transA": 1}, 5 * 3 * 7),
        # 10 -> 8 positions a side, each output channel sees 3x3 of all 4 inputs; grouped: of one
        ("Conv", {"x": (2, 4, 10, 10)}, {"w": (6, 4, 3, 3)}, {}, 2 * 6 * 8 * 8 * 4 * 9),
        ("Conv", {"x": (2, 4, 10, 10)}, {"w": (4, 1, 3, 3)}, {"group": 4}, 2 * 4 * 8 * 8 * 9),
        # every input pixel is multiplied into 2x2 pixels of each of 3 outputs
        ("ConvTranspose", {"x": (2, 4, 5, 5)}, {"w": (4, 3, 2, 2)}, {"strides": [2, 2]}, 2 * 4 * 25 * 3 * 4),
        ("Einsum", {"x": (2, 5, 3), "k": (2, 6, 3)}, {}, {"equation": "bqd, bkd -> bqk"}, 2 * 5 * 6 * 3),
        ("Attention", {"q": (2, 4, 5, 3), "k": (2, 4, 6, 3), "v": (2, 4, 6, 7)}, {}, {}, 2 * 4 * 5 * 6 * (3 + 7)),
        (
            "Attention",
            {"q": (2, 5, 12), "k": (2, 6, 12), "v": (2, 6, 28)},
            {},
            {"q_num_heads": 4, "kv_num_heads": 4},
            2 * 4 * 5 * 6 * (3 + 7),
        ),
        ("Add", {"x": (2, 5, 3), "k": (2, 5, 3)}, {}, {}, 0),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_one_operator(
    op: str,
    inputs: dict[str, tuple[int, ...]],
    weights: dict[str, tuple[int, ...]],
    options: dict[str, object],
    macs: int,
) -> None:
    assert counted(op, inputs, weights, **options) == macs


@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n in FAST else pytest.mark.slow) for n in PUBLISHED])
def test_published_models(name: str, tmp_path: Path) -> None:
    found = look(export_weightless(name, tmp_path))
    assert graph_macs(found.view, found.counted) / 1e9 == pytest.approx(PUBLISHED[name], rel=0.01)
    # Swin's exports hold the attention masks, and each position table written out once for every pair of tokens.
    assert graph_params(found.view) / 1e6 == pytest.approx(PARAMETERS[name], rel=0.02 if "swin" in name else 1e-4)
    assert all(b.attention is not None and b.ffn is not None for b in found.match.blocks)
    assert len(found.match.blocks) == BLOCKS.get(name, 12)


def test_blocks_and_the_rest_make_up_the_whole_of_a_real_deit(tmp_path: Path) -> None:
    """Independent arithmetic of a ViT: patches, blocks, head (tokens n, width c, hidden 4c)."""
    found = look(export_weightless("deit_tiny_patch16_224", tmp_path))
    n, c = 197, 192
    attention, ffn = n * c * 3 * c + 2 * n * n * c + n * c * c, 2 * n * c * 4 * c
    for block in found.match.blocks:
        assert block.attention is not None
        assert block.ffn is not None
        assert attention_macs(found.view, found.counted, block.attention) == attention
        assert ffn_macs(found.view, found.counted, block.ffn) == ffn
    assert graph_macs(found.view, found.counted) == 12 * (attention + ffn) + 196 * (16 * 16 * 3) * c + c * 1000


def test_parameters_are_those_of_the_module() -> None:
    case = zoo.Case("timm-deit", "torchscript-17", "dynamic")
    found = look(zoo.export(case))
    module = zoo.build(case.family).module
    assert graph_params(found.view) == sum(prod(p.shape) for p in module.parameters())
