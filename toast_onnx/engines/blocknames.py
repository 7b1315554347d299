"""Which transformer block an engine layer belongs to, by the names exporters give.

Exporters write module paths into node names (`/blocks/blocks.3/attn/MatMul`, `/vit/encoder/layer.3/...`,
`/layers.1/blocks/blocks.0/...`), or into node metadata (PyTorch's newer exporter). TensorRT names a layer after its
node or, where it fused many, lists them in the layer's metadata.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping

import onnx

from toast_onnx.matching.graph import scopes_of

#: Torchvision's Swin counts blocks as `features.STAGE.BLOCK`.
_FEATURES = re.compile(r"(?:^|[/._])features\.(\d+)\.(\d+)(?=$|[/._])")
_BLOCK = re.compile(r"(?:^|[/.])(blocks?|resblocks|encoder_layer|layers?|h)[._](\d+)(?=$|[/.])")
_ONNX_NODE = re.compile(r"\[ONNX Layer: ([^\]]*)\]")


def block_in(name: str) -> str | None:
    """The block a node name or module path lies in, such as `blocks.3` or `layers.1.blocks.0`; None where in none."""
    features = _FEATURES.search(name)
    if features is not None:
        return f"features.{features.group(1)}.{features.group(2)}"
    found = list(dict.fromkeys(_BLOCK.findall(name)))
    if not found:
        return None
    blocks = [(kind, number) for kind, number in found if not kind.startswith("layer")]
    if not blocks:
        return _spell(*found[0])
    stages = [(kind, number) for kind, number in found if kind.startswith("layer")]
    return ".".join(_spell(*part) for part in (*stages[:1], blocks[0]))


def _spell(kind: str, number: str) -> str:
    return f"{kind}{'_' if kind == 'encoder_layer' else '.'}{number}"


def node_scopes(proto: onnx.ModelProto) -> dict[str, str]:
    """Module path of each node that carries one in its metadata, by node name."""
    # The last entry is the operation itself; the one before it is the innermost module.
    return {node.name: path[-2] for node in proto.graph.node if len(path := scopes_of(node)) > 1}


def block_of(layer: str, metadata: str = "", scopes: Mapping[str, str] | None = None) -> str | None:
    """Block of an engine layer.

    Args:
        layer: the layer's name.
        metadata: TensorRT's list of the ONNX nodes in it, `[ONNX Layer: a][ONNX Layer: b]`; may be empty.
        scopes: module path by node name, from `node_scopes`.

    Returns:
        The block most of its nodes lie in (the first of equals), or None where none lies in a block.
    """
    nodes = _ONNX_NODE.findall(metadata) or re.split(r"\s*\+\s*", layer)
    found = (block_in((scopes or {}).get(node) or node) for node in nodes)
    counts = Counter(block for block in found if block is not None)
    return counts.most_common(1)[0][0] if counts else None
