"""Where a block's new weights lie in the padded twin, so that they can be trained there and taken out again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from toast_onnx.filling import fillings
from toast_onnx.matching.blocks import Block
from toast_onnx.matching.graph import GraphView
from toast_onnx.solving.weights import AttentionWeights, BlockWeights, HeadWeights, ProjWeights

Array = NDArray[Any]


@dataclass(frozen=True)
class Place:
    """A part of one of the twin's initializers.

    Attributes:
        tensor: the initializer: (in_features, out_features), a 1x1 convolution's weight, or a bias.
        index: what selects the part, in the layout (in_features, out_features).
        free: what selects the elements that are not padding.
    """

    tensor: str
    index: Any
    free: Any

    def read(self, arrays: Mapping[str, Array]) -> Array:
        """The part, copied."""
        return np.array(_matrix(arrays[self.tensor])[self.index])

    def added(self, array: Array, change: Array) -> Array:
        """A copy of the initializer's value with something added to the part."""
        found = np.array(array)
        part = _matrix(found)
        part[self.index] = part[self.index] + change
        return found

    def mark(self, mask: Array) -> None:
        """Set the free elements of a mask that has the initializer's shape."""
        _matrix(mask)[self.free] = True


def _matrix(array: Array) -> Array:
    """A view in the layout (in_features, out_features), whatever the layer's spelling."""
    return array.reshape(array.shape[:2]).T if array.ndim > 2 else array


def places(twin: GraphView, block: Block, new: BlockWeights) -> dict[str, Place]:
    """Places of all new weights of a block: `q.weight`, `q.bias`, ..., `proj.weight`, `entry0.weight`, `fc2.bias`.

    The weights of fc1 are among them wherever the hidden width shrinks. A bias that the twin lacks has no place.

    Args:
        twin: the padded twin of the original graph with these weights.
        block: the matched block.
        new: its new weights.
    """
    found: dict[str, Place] = {}
    for each in fillings(block, new):
        if each.new is None and each.gone is None:
            continue
        stays = None if each.gone is None else np.setdiff1d(np.arange(each.linear.out_features), each.gone)
        weight, bias = _initializers(twin, each.linear.output)
        free = each.index if stays is None else np.ix_(each.index, stays)
        found[f"{each.part}.weight"] = Place(weight, each.index, free)
        if bias is not None:
            found[f"{each.part}.bias"] = Place(bias, each.outputs, each.outputs if stays is None else stays)
    return found


def _initializers(twin: GraphView, output: str) -> tuple[str, str | None]:
    """Names of weight and bias of the layer that the twin has at a tensor (see `GraphEdit.linear`)."""
    node = twin.nodes[twin.producer[output]]
    if node.op_type == "Add":
        product = twin.nodes[twin.producer[node.input[0]]]
        return product.input[1], node.input[1]
    return node.input[1], node.input[2] if len(node.input) > 2 else None


def masks(parts: Mapping[str, Place], arrays: Mapping[str, Array]) -> dict[str, Array]:
    """For every initializer concerned a mask of its shape: True where it may be trained."""
    found: dict[str, Array] = {}
    for place in parts.values():
        found.setdefault(place.tensor, np.zeros(arrays[place.tensor].shape, bool))
        place.mark(found[place.tensor])
    return found


def take_out(parts: Mapping[str, Place], arrays: Mapping[str, Array], new: BlockWeights) -> BlockWeights:
    """The block's new weights with the values that the twin's initializers have now.

    Args:
        parts: the block's places.
        arrays: initializer name -> value.
        new: the weights that the twin was made with; what has no place stays.
    """

    def value(name: str, old: Array) -> Array:
        return parts[name].read(arrays).astype(old.dtype) if name in parts else old

    def heads(part: str, old: HeadWeights | None) -> HeadWeights | None:
        if old is None:
            return None
        return replace(old, weight=value(f"{part}.weight", old.weight), bias=value(f"{part}.bias", old.bias))

    attention, ffn = new.attention, new.ffn
    if attention is not None:
        proj = attention.proj
        if proj is not None:
            proj = ProjWeights(value("proj.weight", proj.weight), value("proj.bias", proj.bias))
        attention = AttentionWeights(heads("q", attention.q), heads("k", attention.k), heads("v", attention.v), proj)
    if ffn is not None:
        entries, fc2 = ffn.entries, ffn.fc2
        count = sum(name.startswith("entry") and name.endswith("weight") for name in parts)
        if count:
            entries = tuple(_entry(parts, arrays, k) for k in range(count))
        if fc2 is not None:
            fc2 = (value("fc2.weight", fc2[0]), value("fc2.bias", fc2[1]))
        ffn = replace(ffn, entries=entries, fc2=fc2)
    return BlockWeights(attention, ffn)


def _entry(parts: Mapping[str, Place], arrays: Mapping[str, Array], k: int) -> tuple[Array, Array]:
    w = parts[f"entry{k}.weight"].read(arrays)
    bias = parts.get(f"entry{k}.bias")
    return w, np.zeros(w.shape[1], w.dtype) if bias is None else bias.read(arrays)
