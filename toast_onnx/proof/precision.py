"""A float32 copy of a half-precision graph, so that two such graphs can be compared beyond half precision's noise."""

from __future__ import annotations

import numpy as np
import onnx
import onnx.numpy_helper

from toast_onnx.model import Model

_HALF = (onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16)


def to_float32(model: Model) -> Model:
    """The same graph with every half-precision tensor made float32; a model without any is returned as it is."""
    if not _has_half(model.proto):
        return model
    proto = onnx.ModelProto()
    proto.CopyFrom(model.proto)
    arrays = dict(model.arrays)
    for tensor in proto.graph.initializer:
        if tensor.data_type in _HALF:
            arrays[tensor.name] = np.asarray(model.array(tensor)).astype(np.float32)
            tensor.CopyFrom(onnx.TensorProto(name=tensor.name, data_type=onnx.TensorProto.FLOAT, dims=tensor.dims))
    _convert(proto.graph)
    return Model(proto, model.path, arrays)


def _has_half(proto: onnx.ModelProto) -> bool:
    values = [*proto.graph.input, *proto.graph.output]
    casts = (a.i for n in proto.graph.node if n.op_type == "Cast" for a in n.attribute if a.name == "to")
    return (
        any(t.data_type in _HALF for t in proto.graph.initializer)
        or any(v.type.tensor_type.elem_type in _HALF for v in values)
        or any(kind in _HALF for kind in casts)
    )


def _convert(graph: onnx.GraphProto) -> None:
    for value in (*graph.input, *graph.output):
        if value.type.tensor_type.elem_type in _HALF:
            value.type.tensor_type.elem_type = onnx.TensorProto.FLOAT
    del graph.value_info[:]
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.name in ("to", "dtype", "stash_type") and attribute.i in _HALF:
                attribute.i = onnx.TensorProto.FLOAT
            if attribute.HasField("t") and attribute.t.data_type in _HALF:
                single = onnx.numpy_helper.to_array(attribute.t).astype(np.float32)
                attribute.t.CopyFrom(onnx.numpy_helper.from_array(single, attribute.t.name))
            for inner in (attribute.g, *attribute.graphs):
                if inner.node:
                    _convert(inner)
