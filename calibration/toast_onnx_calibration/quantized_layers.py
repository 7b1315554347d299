"""Which layers cost most in 8 bits: the float model with one layer quantized at a time, by ranges measured once."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx
from numpy.typing import NDArray

from toast_onnx.engines.build import with_weights
from toast_onnx.matching.operators import Trait, having
from toast_onnx.model import Model, sort_nodes
from toast_onnx_calibration.feeds import batches
from toast_onnx_calibration.sessions import ModelInput, model_session, run
from toast_onnx_calibration.sources import Source

_PAIR = having(Trait.ROUNDS)


def with_one_layer(plain: onnx.ModelProto, quantized: onnx.ModelProto, layer: str) -> onnx.ModelProto:
    """The float model with the quantize and dequantize nodes around one of its layers.

    Args:
        plain: the float model, its weights in memory; it is not changed.
        quantized: the same with nodes around many layers; names of nodes and tensors are the same.
        layer: name of the node.
    """
    producers = {name: node for node in quantized.graph.node for name in node.output}
    values = {tensor.name: tensor for tensor in quantized.graph.initializer}
    trial = onnx.ModelProto()
    trial.CopyFrom(plain)
    node = next(n for n in trial.graph.node if n.name == layer)
    node.CopyFrom(next(n for n in quantized.graph.node if n.name == layer))
    present = {name for n in trial.graph.node for name in n.output} | {t.name for t in trial.graph.initializer}
    waiting = list(node.input)
    while waiting:
        name = waiting.pop()
        if name in present:
            continue
        present.add(name)
        if name in values:
            trial.graph.initializer.append(values[name])
        elif name in producers and producers[name].op_type in _PAIR:
            trial.graph.node.append(producers[name])
            waiting += producers[name].input
    sort_nodes(trial.graph)
    return trial


def layer_damages(
    plain: Model,
    quantized: Model,
    layers: Sequence[str],
    source: Source,
    inputs: Sequence[ModelInput],
    batch: int,
    threads: int | None = None,
) -> dict[str, float]:
    """Relative error of the model's first output with one layer quantized at a time, the largest first.

    Args:
        plain: the float model.
        quantized: the same with all layers quantized.
        layers: names of nodes.
        source: samples.
        inputs: the model's inputs.
        batch: samples a run, where the model leaves it free.
        threads: of ONNX Runtime.

    Returns:
        Layer -> norm of the difference over the norm of the output, over all samples.
    """
    floats, integers = with_weights(plain), with_weights(quantized)
    output = floats.graph.output[0].name

    def outputs(proto: onnx.ModelProto) -> NDArray[np.float64]:
        session = model_session(Model(proto, plain.path), threads=threads)
        parts = [b.trim(run(session, b.feeds, [output])[output]) for b in batches(source, inputs, batch)]
        return np.concatenate(parts).astype(np.float64)

    reference = outputs(floats)
    scale = float(np.linalg.norm(reference)) or 1.0
    found = {}
    for layer in layers:
        found[layer] = float(np.linalg.norm(outputs(with_one_layer(floats, integers, layer)) - reference)) / scale
    return dict(sorted(found.items(), key=lambda item: -item[1]))
