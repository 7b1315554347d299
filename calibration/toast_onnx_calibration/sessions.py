"""ONNX Runtime sessions: the provider that was asked for or an error, never another one in silence."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import onnx.helper
from numpy.typing import NDArray

from toast_onnx.errors import BackendError, DataError, ModelError, one_line
from toast_onnx.external import follow_links
from toast_onnx.matching.batches import held_batches
from toast_onnx.matching.study import Study
from toast_onnx.model import Model, load_model, scratch_folder, write_draft
from toast_onnx.providers import known_provider, open_on
from toast_onnx.runtime import NUMPY_TYPES
from toast_onnx_calibration.recipes import Dim

if TYPE_CHECKING:
    import onnxruntime as ort


@dataclass(frozen=True)
class ModelInput:
    """One input a model needs: its name, shape (batch first, free dimensions by name or None) and numpy type."""

    name: str
    shape: tuple[Dim, ...]
    dtype: np.dtype[Any]


def make_session(
    model: str | Path | bytes,
    provider: str = "cpu",
    *,
    threads: int | None = None,
    optimize: bool = True,
    external_data: str | Path | None = None,
    memory_arena: bool = True,
) -> ort.InferenceSession:
    """Opens a model in ONNX Runtime.

    Args:
        model: An ONNX file, or a serialized model (kept in memory as long as the session).
        provider: A key of `toast_onnx.providers.PROVIDERS`.
        threads: Threads inside one operator; None leaves it to `OMP_NUM_THREADS`, or is one a core.
        optimize: Whether ONNX Runtime may fuse and fold; without it the nodes run as they are written.
        external_data: Folder of the external data of a serialized model.
        memory_arena: Whether the CPU keeps freed buffers for reuse: faster, but the largest peak stays allocated.

    Raises:
        ConfigError: An unknown provider.
        BackendError: ONNX Runtime cannot use the provider.
        ModelError: The model cannot be loaded.
    """
    known_provider(provider)
    from toast_onnx.ort import ort, session_options

    name = "the model" if isinstance(model, bytes) else str(model)
    if not isinstance(model, bytes) and not Path(model).is_file():
        raise ModelError(f"{name}: no such file")
    options = session_options(threads)
    options.inter_op_num_threads = 1
    options.enable_cpu_mem_arena = memory_arena
    if not optimize:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    if external_data is not None:
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(external_data))
    session: ort.InferenceSession = open_on(model if isinstance(model, bytes) else str(model), provider, options)
    return session


def model_session(model: Model, provider: str = "cpu", *, threads: int | None = None) -> ort.InferenceSession:
    """A session of a model that is in memory, whose weights ONNX Runtime maps from files.

    Args:
        model: the model; references to external data may come out changed.
        provider: as for `make_session`.
        threads: as for `make_session`.

    Raises:
        BackendError: as for `make_session`.
        ModelError: as for `make_session`.
    """
    if model.has_external_data and not model.arrays:
        folder = follow_links(model.proto, model.base_dir)
        return make_session(model.proto.SerializeToString(), provider, threads=threads, external_data=folder)
    with scratch_folder("toast-session-") as scratch:
        path = write_draft(model, scratch, "model.onnx", outside=True)
        return make_session(path, provider, threads=threads)


def model_inputs(session: ort.InferenceSession) -> list[ModelInput]:
    """The inputs a session needs, in the model's order.

    Raises:
        DataError: An input is no tensor of a type that numpy knows (a sequence, bfloat16, a string).
    """
    inputs = []
    for value in session.get_inputs():
        if value.type not in NUMPY_TYPES:
            raise DataError(f"the model's input '{value.name}' is a {value.type}, which cannot be fed from data files")
        inputs.append(ModelInput(value.name, tuple(value.shape), np.dtype(NUMPY_TYPES[value.type])))
    return inputs


def graph_inputs(model: Model) -> list[ModelInput]:
    """The inputs that a graph needs, in its order, read off the graph.

    Raises:
        DataError: as for `model_inputs`.
    """
    weights = {tensor.name for tensor in model.proto.graph.initializer}
    inputs = []
    for value in model.proto.graph.input:
        tensor = value.type.tensor_type
        if value.name in weights:
            continue
        if tensor.elem_type in (onnx.TensorProto.UNDEFINED, onnx.TensorProto.STRING, onnx.TensorProto.BFLOAT16):
            raise DataError(f"the model's input '{value.name}' holds no numbers that can be fed from data files")
        shape = tuple(d.dim_value if d.HasField("dim_value") else d.dim_param or None for d in tensor.shape.dim)
        inputs.append(ModelInput(value.name, shape, onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type)))
    return inputs


def held_inputs(study: Study, inputs: Sequence[ModelInput]) -> list[ModelInput]:
    """The inputs with the batch that a graph holds inside, where it declares a symbolic one all the same."""
    held = {} if study.dynamic_batch else {name: shape[0] for name, shape in study.counted_shapes.items() if shape}
    return _at_batches(inputs, held)


def fed_inputs(path: Path, session: ort.InferenceSession) -> list[ModelInput]:
    """As `model_inputs` and `held_inputs`, for a model that is run as it is and never studied.

    Raises:
        DataError: as for `model_inputs`.
    """
    inputs = model_inputs(session)
    if all(isinstance(each.shape[0], int) for each in inputs if each.shape):
        return inputs
    try:
        held = held_batches(load_model(path))
    except ModelError:  # what ONNX Runtime alone can read is taken at its word
        return inputs
    return _at_batches(inputs, held)


def _at_batches(inputs: Sequence[ModelInput], held: Mapping[str, int]) -> list[ModelInput]:
    return [
        replace(each, shape=(held.get(each.name, each.shape[0]), *each.shape[1:])) if each.shape else each
        for each in inputs
    ]


def run(
    session: ort.InferenceSession, feeds: Mapping[str, NDArray[Any]], outputs: Sequence[str] | None = None
) -> dict[str, NDArray[Any]]:
    """Runs a session; returns its outputs, or those asked for, by name.

    Raises:
        BackendError: ONNX Runtime failed, with the shapes that were fed.
    """
    names = list(outputs) if outputs is not None else [value.name for value in session.get_outputs()]
    try:
        return dict(zip(names, session.run(names, dict(feeds)), strict=True))
    except Exception as error:  # its exceptions share no base class
        shapes = ", ".join(f"{name} {array.dtype}{list(array.shape)}" for name, array in feeds.items())
        raise BackendError(f"ONNX Runtime failed on {shapes}: {one_line(error)}") from error
