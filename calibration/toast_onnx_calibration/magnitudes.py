"""The largest magnitude of every tensor of a model on samples, for what does not fit into 16 bits."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import onnx.numpy_helper
from onnx import TensorProto, helper

from toast_onnx.engines.build import with_weights
from toast_onnx.engines.precision import infer_types
from toast_onnx.model import Model, load_model
from toast_onnx.runtime import expose
from toast_onnx_calibration.feeds import batches
from toast_onnx_calibration.prepared import Note, open_prepared, silent
from toast_onnx_calibration.sessions import fed_inputs, make_session, model_session, run

_LARGEST = "__toast_largest_"


def largest_magnitudes(
    model_path: Path,
    data: str | Path,
    *,
    preprocess: str | None = None,
    samples: int | None = 32,
    seed: int = 0,
    batch: int = 8,
    threads: int | None = None,
    note: Note = silent,
) -> dict[str, float]:
    """Largest finite magnitude of every float32 tensor that a node makes, by name.

    Magnitudes are reduced in the graph: one number a tensor and run leaves ONNX Runtime.

    Args:
        model_path: the model, in float32.
        data: as for `sources.open_source`.
        preprocess: as for `recipe_files.recipe_for`.
        samples: how many to draw; None takes all.
        seed: of that draw.
        batch: samples a run, where the model leaves it free.
        threads: of ONNX Runtime and of image decoding.
        note: told what the user should know before the work begins.

    Raises:
        DataError: the data does not fit the model.
        ModelError: the model cannot be read or run.
    """
    model = load_model(model_path)
    session = make_session(model_path, threads=threads)
    inputs, metadata = fed_inputs(model_path, session), session.get_modelmeta().custom_metadata_map
    del session
    source, _ = open_prepared(
        model_path,
        data,
        inputs,
        preprocess,
        metadata=metadata,
        samples=samples,
        seed=seed,
        threads=threads,
        note=note,
    )
    watched = with_weights(model)
    tensors = watch(watched)
    if not tensors:
        return {}
    watching = model_session(Model(watched, model.path), threads=threads)
    found = dict.fromkeys(tensors.values(), 0.0)
    for each in batches(source, inputs, batch):
        for output, value in run(watching, each.feeds, list(tensors)).items():
            name = tensors[output]
            found[name] = max(found[name], float(np.max(value, initial=0.0)))
    return found


def watch(proto: onnx.ModelProto) -> dict[str, str]:
    """Add to a graph (in place) the largest finite magnitude of every float32 tensor; output name -> tensor."""
    typed = onnx.ModelProto()
    typed.CopyFrom(proto)
    infer_types(typed)
    known = {v.name: v.type.tensor_type.elem_type for v in (*typed.graph.value_info, *typed.graph.output)}
    tensors: dict[str, str] = {}
    made = [name for node in proto.graph.node for name in node.output if known.get(name) == TensorProto.FLOAT]
    for number, name in enumerate(made):
        out = f"{_LARGEST}{number}"
        proto.graph.node.extend(_measured(name, out))
        tensors[out] = name
    expose(proto, list(tensors))
    return tensors


def _measured(name: str, out: str) -> Sequence[onnx.NodeProto]:
    """max |x| over finite x: what is infinite in float32 already is no question of 16 bits."""
    node = helper.make_node
    zero = onnx.numpy_helper.from_array(np.zeros((), np.float32))
    return (
        node("IsInf", [name], [f"{out}.infinite"]),
        node("IsNaN", [name], [f"{out}.none"]),
        node("Or", [f"{out}.infinite", f"{out}.none"], [f"{out}.odd"]),
        node("Constant", [], [f"{out}.zero"], value=zero),
        node("Abs", [name], [f"{out}.size"]),
        node("Where", [f"{out}.odd", f"{out}.zero", f"{out}.size"], [f"{out}.finite"]),
        node("ReduceMax", [f"{out}.finite"], [out], keepdims=0),
    )
