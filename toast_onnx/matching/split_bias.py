"""Layers that a simplifier made one: q, k, v as MatMul, Split and a bias on each part become MatMul, bias, Split.

onnxsim joins matrix products that read one tensor but leaves their biases behind the Split, where no layer has one.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx
import onnx.helper
import onnx.numpy_helper

from toast_onnx.matching.graph import GraphView, attribute, rewired
from toast_onnx.model import Model


def join_split_biases(model: Model) -> Model:
    """Move the biases of all parts of a split product in front of the Split; exact, as they add to single channels.

    Args:
        model: the model; it is not changed.

    Returns:
        A model that computes the same under the same names; the same model where there is nothing to join.
    """
    view = GraphView(model)
    found = {i: adds for i, node in enumerate(view.nodes) if (adds := _biased_parts(view, i)) and any(adds)}
    if not found:
        return model
    joined = {i: _joined(view, i, adds) for i, adds in found.items()}
    gone = {add for adds in found.values() for add in adds if add is not None}
    made = rewired(view, {i: nodes for i, (_, *nodes) in joined.items()}, gone)
    made.proto.graph.initializer.extend(bias for bias, _, _ in joined.values())
    return made


def _biased_parts(view: GraphView, i: int) -> list[int | None]:
    """For every output of a Split of a matrix product the Add that reads it alone, None for a part without a bias."""
    node = view.nodes[i]
    product = view.producer_of(node.input[0]) if node.op_type == "Split" else None
    if product is None or product.op_type != "MatMul" or product.input[1] not in view.initializers:
        return []
    if len(view.consumers[node.input[0]]) != 1 or node.input[0] in view.outputs or attribute(node, "axis", 0) == 0:
        return []
    width, sizes = view.initializers[product.input[1]].dims[-1], _sizes(view, node)
    if sum(sizes) != width:  # split along another axis
        return []
    return [_bias_add(view, name, size) for name, size in zip(node.output, sizes, strict=True)]


def _sizes(view: GraphView, split: onnx.NodeProto) -> list[int]:
    """Widths of the parts, as far as they are written down."""
    if len(split.input) > 1 and split.input[1] in view.initializers:
        return [int(n) for n in view.model.array(view.initializers[split.input[1]])]
    product = view.producer_of(split.input[0])
    width = 0 if product is None else view.initializers[product.input[1]].dims[-1]
    return [width // len(split.output)] * len(split.output) if len(split.input) == 1 else [0] * len(split.output)


def _bias_add(view: GraphView, part: str, size: int) -> int | None:
    readers = view.consumers.get(part, [])
    if len(readers) != 1 or part in view.outputs or view.nodes[readers[0]].op_type != "Add":
        return None
    bias = view.initializers.get(_other(view.nodes[readers[0]], part))
    return readers[0] if bias is not None and list(bias.dims) == [size] else None


def _other(add: onnx.NodeProto, tensor: str) -> str:
    return str(add.input[1] if add.input[0] == tensor else add.input[0])


def _joined(
    view: GraphView, i: int, adds: Sequence[int | None]
) -> tuple[onnx.TensorProto, onnx.NodeProto, onnx.NodeProto]:
    """The bias of all parts (width,), the Add that applies it, and the Split behind it."""
    node, name = view.nodes[i], view.nodes[i].name or view.nodes[i].output[0]
    vectors = [
        None if add is None else view.model.array(view.initializers[_other(view.nodes[add], part)])
        for add, part in zip(adds, node.output, strict=True)
    ]
    dtype = next(v.dtype for v in vectors if v is not None)
    filled = [np.zeros(n, dtype) if v is None else v for v, n in zip(vectors, _sizes(view, node), strict=True)]
    bias = onnx.numpy_helper.from_array(np.concatenate(filled), f"{name}/joined_bias")
    total = f"{name}/joined_output"
    add = onnx.helper.make_node("Add", [node.input[0], bias.name], [total], name=f"{name}/joined")
    split = onnx.NodeProto()
    split.CopyFrom(node)
    split.input[0] = total
    split.output[:] = [p if a is None else view.nodes[a].output[0] for a, p in zip(adds, node.output, strict=True)]
    return bias, add, split
