"""ONNX graph -> torch module, and the trained values back into the same graph."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import onnx
import onnx.helper

from toast_onnx.errors import ModelError
from toast_onnx.model import Model, stub
from toast_onnx.proof.precision import to_float32
from toast_onnx.require import require_torch

if TYPE_CHECKING:
    from toast_onnx.finetune.module import GraphModule


def to_torch(model: Model) -> GraphModule:
    """The graph as a `torch.nn.Module` with equal outputs, ready to be trained.

    Every float initializer that a gradient reaches becomes a parameter in the layout the graph has (a MatMul's weight
    stays (in, out)), under a readable name; an initializer that several layers share stays one parameter. Numbers of
    formulas, attention masks and BatchNorm's stored statistics stay constant. A half-precision graph becomes a float32
    module: train it so, or under `torch.autocast`.

    Args:
        model: the model; it is not changed.

    Raises:
        BackendError: PyTorch is not installed.
        ModelError: an operator has no counterpart here (all such are named).
    """
    require_torch()
    from toast_onnx.finetune.module import GraphModule
    from toast_onnx.finetune.naming import readable_names
    from toast_onnx.finetune.plan import make_plan
    from toast_onnx.finetune.weights import find_weights

    plan = make_plan(to_float32(model))
    module = GraphModule(plan, readable_names(model.proto.graph, find_weights(plan)))
    return module.eval()


def to_onnx(module: GraphModule, model: Model) -> Model:
    """The model with the module's present weights: same nodes, names, opset, dynamic axes and element types.

    Without training the saved file has the same bytes: what did not change is left as it was.

    Args:
        module: made by `to_torch` from this model, or from one with the same graph.
        model: the model; it is not changed.

    Raises:
        ModelError: the module's weights are not this model's, or one of them is NaN or infinite.
    """
    proto = onnx.ModelProto()
    proto.CopyFrom(model.proto)
    initializers = {t.name: t for t in proto.graph.initializer}
    literals = {
        n.output[0]: a.t for n in proto.graph.node if n.op_type == "Constant" for a in n.attribute if a.HasField("t")
    }
    arrays = dict(model.arrays)
    for name, parameter in module.named_parameters():
        tensor = module.initializers[name]
        value = parameter.detach().cpu().numpy()
        if tensor in initializers:
            old = model.array(initializers[tensor])
        elif tensor in literals:
            old = onnx.numpy_helper.to_array(literals[tensor])
        else:
            raise ModelError(
                f"{model.path}: has no initializer '{tensor}'; give the model that the module was made from"
            )
        if old.shape != value.shape:
            raise ModelError(
                f"{model.path}: '{tensor}' has shape {old.shape}, the module's is {value.shape}; give its own model"
            )
        if not np.isfinite(value).all():
            raise ModelError(f"the weight '{name}' is NaN or infinite after training; lower the learning rate")
        if np.array_equal(value, np.asarray(old, value.dtype)):
            continue
        new = value.astype(old.dtype)
        if tensor in initializers:
            initializers[tensor].CopyFrom(stub(tensor, new))
            arrays[tensor] = new
        else:
            literals[tensor].CopyFrom(onnx.numpy_helper.from_array(new, literals[tensor].name))
    return Model(proto, model.path, arrays)
