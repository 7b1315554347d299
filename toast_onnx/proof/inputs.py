"""What the proofs run on: made-up inputs that the dense graph accepts, found before any work is done."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import onnx
import onnx.helper

from toast_onnx.errors import BackendError, ModelError
from toast_onnx.matching.index_ranges import index_ranges
from toast_onnx.matching.input_shapes import Shapes, input_shapes
from toast_onnx.matching.study import Study
from toast_onnx.model import scratch_folder, write_draft
from toast_onnx.proof.precision import to_float32
from toast_onnx.runtime import candidate_inputs, open_session, run_session

Feeds = Mapping[str, np.ndarray]


def twin_shapes(study: Study) -> list[Shapes]:
    """Input shapes for a proof: one and three items where the batch is dynamic, else the fixed shapes."""
    if not study.dynamic_batch:
        return [study.counted_shapes]
    given = study.counted_shapes
    return [input_shapes(study.view, given, batch, fixed_batch=False) for batch in (1, 3)]


def twin_inputs(study: Study, seed: int = 0) -> list[Feeds]:
    """Made-up inputs for `twin_shapes`: of all meanings that masks can have, those that leave the dense graph finite.

    A mask that hides everything makes NaN of a whole graph, and nothing could be compared.

    Args:
        study: the dense model.
        seed: of the numbers drawn.

    Raises:
        ModelError: the dense graph does not run on anything made up, or gives no finite number.
    """
    dense = to_float32(study.view.model)  # what holds its layers inside is spelled out, as in a proof
    ranges = index_ranges(study.view, study.counted)
    names = [o.name for o in dense.proto.graph.output]
    feeds: list[Feeds] = []
    with scratch_folder("toast-inputs-") as folder:
        session = open_session(write_draft(dense, folder, "dense.onnx"), names)
        for k, shapes in enumerate(twin_shapes(study)):
            best, chosen, failure = 0.0, None, ""
            for feed in candidate_inputs(dense.proto, shapes, seed + k, ranges):
                try:
                    share = _finite_share(run_session(session, names, feed))
                except BackendError as e:
                    failure = f": {e}"
                    continue
                if share > best:
                    best, chosen = share, feed
                if share == 1.0:
                    break
            if chosen is None:
                what = ", ".join(f"{name} {'x'.join(map(str, extents))}" for name, extents in shapes.items())
                raise ModelError(
                    f"{study.source.path}: the model gives no finite number on made-up inputs ({what}), so nothing "
                    f"could be proven{failure}; give shapes that fit with --shape, samples with --data, or skip the "
                    "proof with --no-check"
                )
            feeds.append(chosen)
    return feeds


def as_proven(study: Study, samples: Sequence[Feeds]) -> list[Feeds]:
    """Samples as the float32 copies of half-precision graphs take them."""
    kinds = {
        i.name: onnx.helper.tensor_dtype_to_np_dtype(i.type.tensor_type.elem_type)
        for i in to_float32(study.source).proto.graph.input
    }
    return [{name: np.asarray(array).astype(kinds[name]) for name, array in each.items()} for each in samples]


def _finite_share(made: Feeds) -> float:
    """The smallest share of finite numbers in any tensor."""
    return min((float(np.isfinite(v).mean()) for v in made.values() if v.dtype.kind in "fc" and v.size), default=1.0)
