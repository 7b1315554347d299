"""Running a graph with ONNX Runtime: chosen tensors out, fixed threads, no optimisation surprises."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import cycle, product
from pathlib import Path

import numpy as np
import onnx
import onnx.helper

from toast_onnx.errors import BackendError
from toast_onnx.ort import ort, session_options

#: ONNX Runtime's spelling of the types that inputs have -> NumPy's.
NUMPY_TYPES: dict[str, type[np.generic]] = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(double)": np.float64,
    "tensor(int64)": np.int64,
    "tensor(int32)": np.int32,
    "tensor(int16)": np.int16,
    "tensor(int8)": np.int8,
    "tensor(uint64)": np.uint64,
    "tensor(uint32)": np.uint32,
    "tensor(uint16)": np.uint16,
    "tensor(uint8)": np.uint8,
    "tensor(bool)": np.bool_,
}


def expose(proto: onnx.ModelProto, names: Sequence[str]) -> onnx.ModelProto:
    """Make tensors outputs of a graph, besides those it has (in place); returns the model."""
    present = {o.name for o in proto.graph.output}
    proto.graph.output.extend(onnx.ValueInfoProto(name=n) for n in names if n not in present)
    return proto


def open_session(path: Path, names: Sequence[str], *, threads: int = 0) -> ort.InferenceSession:
    """A session on the CPU that can return the named tensors.

    Args:
        path: the model; tensors that are no outputs are made outputs (the file is changed).
        names: tensors to return.
        threads: intra-op threads; 0 leaves the choice to `session_options`.

    Raises:
        BackendError: ONNX Runtime refuses the model.
    """
    proto = onnx.load(str(path), load_external_data=False)
    onnx.save(expose(proto, names), str(path))
    options = session_options(threads)
    # Extended fusions may rename or swallow the tensors that are asked for; basic ones keep outputs.
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
    try:
        return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as e:  # ONNX Runtime's exceptions share no public base
        raise _refusal(e) from e


def run_session(
    session: ort.InferenceSession, names: Sequence[str], feeds: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """The named tensors for one set of inputs.

    Raises:
        BackendError: ONNX Runtime fails.
    """
    try:
        return dict(zip(names, session.run(list(names), dict(feeds)), strict=True))
    except Exception as e:
        raise _refusal(e, "give inputs that fit with --shape or --data") from e


def _refusal(error: Exception, advice: str = "export it again") -> BackendError:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return BackendError(f"ONNX Runtime cannot run the model: {lines[0]}; {advice}")


def run_model(
    path: Path, names: Sequence[str], feeds: Sequence[Mapping[str, np.ndarray]], *, threads: int = 0
) -> list[dict[str, np.ndarray]]:
    """Run a model file on the CPU for several sets of inputs and return the named tensors of each.

    Args:
        path: the model; tensors that are no outputs are made outputs (the file is changed).
        names: tensors to return.
        feeds: input name -> array, one mapping a run.
        threads: intra-op threads; 0 leaves the choice to `session_options`.

    Raises:
        BackendError: ONNX Runtime refuses the model or fails on it.
    """
    session = open_session(path, names, threads=threads)
    return [run_session(session, names, f) for f in feeds]


def batch_sizes(feeds: Sequence[Mapping[str, np.ndarray]]) -> tuple[int, ...]:
    """Extent of the first axis of the first input that has one, for each set of inputs; 1 without any."""
    return tuple(next((int(v.shape[0]) for v in each.values() if v.ndim), 1) for each in feeds)


def candidate_inputs(
    proto: onnx.ModelProto,
    shapes: Mapping[str, Sequence[int]],
    seed: int,
    ranges: Mapping[str, tuple[int, int]] | None = None,
) -> list[dict[str, np.ndarray]]:
    """Random inputs for every meaning that masks can have, partly masked before wholly open; one where there are none.

    Ones that mean "read this" come first (`attention_mask`), then those that mean "padding" (PyTorch), for each of the
    masks; then all ones and all zeros in the same way.

    Args:
        proto: the model.
        shapes: concrete shape of every input.
        seed: seed of the generator.
        ranges: as for `random_inputs`.
    """
    drawn = random_inputs(proto, shapes, seed, ranges)
    masks = [name for name, value in drawn.items() if "mask" in name.lower() or value.dtype.kind == "b"]
    meanings = list(product((True, False), repeat=len(masks))) if len(masks) <= 3 else [(True,), (False,)]
    found = [drawn]
    for meaning in meanings[1:]:
        flipped = [n for n, reads in zip(masks, cycle(meaning), strict=False) if not reads]
        found.append(drawn | {n: (1 - drawn[n].astype(np.float32)).astype(drawn[n].dtype) for n in flipped})
    for meaning in meanings if masks else ():
        full = zip(masks, cycle(meaning), strict=False)
        found.append(drawn | {n: np.full_like(drawn[n], reads) for n, reads in full})
    return found


def random_inputs(
    proto: onnx.ModelProto,
    shapes: Mapping[str, Sequence[int]],
    seed: int,
    ranges: Mapping[str, tuple[int, int]] | None = None,
) -> dict[str, np.ndarray]:
    """Plausible random inputs: normal floats, small non-negative integers, true masks with padded tails.

    Args:
        proto: the model.
        shapes: concrete shape of every input.
        seed: seed of the generator.
        ranges: smallest and largest number that some inputs may hold, both allowed (`matching.index_ranges`).
    """
    rng = np.random.default_rng(seed)
    feeds = {}
    for value in proto.graph.input:
        if value.name not in shapes:
            continue
        shape = tuple(shapes[value.name])
        dtype = onnx.helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type)
        kind = np.dtype(dtype).kind
        if value.name in (ranges or {}):
            low, high = (ranges or {})[value.name]
            low = low if low > 0 or high < 0 else 0
            feeds[value.name] = rng.integers(low, min(high, low + 15) + 1, shape).astype(dtype)
        elif "mask" in value.name.lower():
            feeds[value.name] = _mask(shape, rng).astype(dtype)
        elif kind == "b":
            feeds[value.name] = rng.random(shape) < 0.9
        elif kind in "iu":
            # Small enough for any vocabulary or type table (token_type_ids have two rows).
            high = 2 if "type" in value.name.lower() else 16
            feeds[value.name] = rng.integers(0, high, shape).astype(dtype)
        else:
            feeds[value.name] = rng.standard_normal(shape).astype(dtype)
    return feeds


def _mask(shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    """Ones, with the last quarter of every second item of the batch padded, or of a single one."""
    mask = np.ones(shape)
    if len(shape) >= 2 and shape[-1] >= 4:
        mask[1 % shape[0] :: 2, ..., -(shape[-1] // 4) :] = 0
    return mask
