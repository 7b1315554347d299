"""Layers that a simplifier made one: q, k, v as MatMul, Split and a bias on each part become MatMul, bias, Split.

onnxsim joins matrix products that read one tensor but leaves their biases behind the Split, where no layer has one.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx

from toast_onnx.matching.graph import GraphView, attribute, other_input
from toast_onnx.matching.respelling import Respelling, respelled
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
    return respelled(view, {i: _joined(view, i, adds) for i, adds in found.items()})


def _biased_parts(view: GraphView, i: int) -> list[int | None]:
    """For every output of a Split of a matrix product the Add that reads it alone, None for a part without a bias."""
    node = view.nodes[i]
    product = view.producer_of(node.input[0]) if node.op_type == "Split" else None
    if product is None or product.op_type != "MatMul" or product.input[1] not in view.initializers:
        return []
    if view.only_reader(node.input[0]) is None or attribute(node, "axis", 0) == 0:
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
    reader = view.only_reader(part)
    if reader is None or view.nodes[reader].op_type != "Add":
        return None
    bias = view.initializers.get(other_input(view.nodes[reader], part))
    return reader if bias is not None and list(bias.dims) == [size] else None


def _joined(view: GraphView, i: int, adds: Sequence[int | None]) -> Respelling:
    """The bias of all parts (width,), the Add that applies it, and the Split behind it."""
    node = view.nodes[i]
    write = Respelling(view, node.name or node.output[0])
    vectors = [
        None if add is None else view.model.array(view.initializers[other_input(view.nodes[add], part)])
        for add, part in zip(adds, node.output, strict=True)
    ]
    dtype = next(v.dtype for v in vectors if v is not None)
    filled = [np.zeros(n, dtype) if v is None else v for v, n in zip(vectors, _sizes(view, node), strict=True)]
    bias = write.constant(np.concatenate(filled), "joined_bias")
    (total,) = write.node("Add", [node.input[0], bias], "joined", [f"{write.name}/joined_output"])
    split = onnx.NodeProto()
    split.CopyFrom(node)
    split.input[0] = total
    split.output[:] = [p if a is None else view.nodes[a].output[0] for a, p in zip(adds, node.output, strict=True)]
    write.nodes.append(split)
    write.gone.update(add for add in adds if add is not None)
    return write
