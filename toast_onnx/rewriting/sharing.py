"""New weights that are equal are stored once, as the old ones were."""

from __future__ import annotations

import hashlib

import numpy as np
import onnx

from toast_onnx.matching.graph import GraphView
from toast_onnx.model import Model


def share_weights(model: Model, dense: GraphView) -> Model:
    """A graph whose equal new initializers are one.

    Args:
        model: the rewritten graph; it is not changed.
        dense: the graph as it was: what it stores as it did stays as it is.
    """
    same: dict[tuple[object, ...], str] = {}
    renamed: dict[str, str] = {}
    for tensor in model.proto.graph.initializer:
        value = model.arrays.get(tensor.name)
        if value is None or value.size < 2 or value is dense.model.arrays.get(tensor.name):
            continue
        digest = hashlib.sha256(np.ascontiguousarray(value).tobytes()).digest()
        first = same.setdefault((tensor.data_type, value.shape, digest), tensor.name)
        if first != tensor.name:
            renamed[tensor.name] = first
    if not renamed:
        return model
    proto = onnx.ModelProto()
    proto.CopyFrom(model.proto)
    for node in proto.graph.node:
        for k, name in enumerate(node.input):
            node.input[k] = renamed.get(name, name)
    kept = [tensor for tensor in proto.graph.initializer if tensor.name not in renamed]
    del proto.graph.initializer[:]
    proto.graph.initializer.extend(kept)
    return Model(proto, model.path, {name: a for name, a in model.arrays.items() if name not in renamed})
