"""Exports of published sizes that cost neither their memory nor their disk space.

The graph is the exporter's own; its weights are zeros in a sparse file beside it, so that a ViT-H of 2.5 GB takes a few
hundred kilobytes. Whatever depends on shapes alone (matching, counting) sees the model as it would be shipped.
"""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Iterator, Mapping
from math import prod
from pathlib import Path

import onnx
import onnx.external_data_helper
import onnx.numpy_helper
import torch
from torch import nn

from tests import zoo


@contextlib.contextmanager
def _parameters_without_storage() -> Iterator[None]:
    """Within this, modules keep their parameters' shapes only, so that initialising a large one costs nothing."""
    register = nn.Module.register_parameter

    def on_meta(self: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        register(self, name, parameter)
        if parameter is not None:
            self._parameters[name] = nn.Parameter(parameter.to("meta"), requires_grad=False)

    nn.Module.register_parameter = on_meta  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


def _filled(shape: tuple[int, ...], value: float) -> torch.Tensor:
    """One stored number seen as a tensor of any shape."""
    return torch.full((), value).expand(shape)


def export_weightless(name: str, folder: Path) -> Path:
    """Export a timm model with a 1000-class head at 224x224 (TorchScript, opset 17); returns the file's path."""
    zoo.declare_torchvision_operators()
    import timm

    # Swin computes masks from its parameters while it is built, which shapes alone do not allow.
    with contextlib.nullcontext() if "swin" in name else _parameters_without_storage():
        module = timm.create_model(name, pretrained=False, num_classes=1000).eval()
    number = 0.0
    for part in module.modules():
        for key, parameter in part._parameters.items():
            if parameter is not None:
                number += 1e-6  # the exporter would make equal parameters one
                part._parameters[key] = nn.Parameter(_filled(parameter.shape, number), requires_grad=False)
    path = folder / f"{name}.onnx"
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            module,
            (_filled((1, 3, 224, 224), 0.0),),
            path,
            input_names=["input"],
            output_names=["logits"],
            dynamic_axes={"input": {0: "batch"}, "logits": {0: "batch"}},
            dynamo=False,
            opset_version=17,
            export_params=False,
        )
    _give_zeros(path, dict(module.named_buffers()))
    return path


def _give_zeros(path: Path, buffers: Mapping[str, torch.Tensor]) -> None:
    """Turn exported inputs that are weights into initializers: zeros in a sparse file, buffers as they are."""
    proto = onnx.load(path)
    data, offset = path.with_name(f"{path.name}.data"), 0
    for value in [v for v in proto.graph.input if v.name != "input"]:
        proto.graph.input.remove(value)
        if value.name in buffers:
            proto.graph.initializer.append(onnx.numpy_helper.from_array(buffers[value.name].numpy(), value.name))
            continue
        dims = [d.dim_value for d in value.type.tensor_type.shape.dim]
        tensor = proto.graph.initializer.add(name=value.name, dims=dims, data_type=onnx.TensorProto.FLOAT)
        tensor.raw_data = b" "  # set_external_data asks for raw data to replace
        length = 4 * prod(dims)
        onnx.external_data_helper.set_external_data(tensor, data.name, offset, length)
        tensor.ClearField("raw_data")
        offset += length
    data.touch()
    os.truncate(data, offset)
    onnx.save(proto, path)
