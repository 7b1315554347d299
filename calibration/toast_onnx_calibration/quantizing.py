"""Eight bits for the linear layers of a model, by ONNX Runtime's own quantizer (QuantizeLinear and DequantizeLinear).

Weights get a scale a channel, activations one a tensor, from samples. Layers with constant weights are quantized;
the products inside attention, Softmax, norms, and the first and the last layer stay as they are: attention then remains
one kernel, and the layers that see pixels and make logits cost the most accuracy and the least time.

Before that, channels are equalized across LayerNorm as SmoothQuant (arXiv 2211.10438) does: gain and bias are divided,
and the rows of the layers that read the norm multiplied, by s_j = max|x_j|^a / max|w_j|^(1 - a). The float model
computes the same; outlying channels no longer set the scale of all others.
"""

from __future__ import annotations

import fnmatch
import io
import logging
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
from numpy.typing import NDArray

from toast_onnx.edit import GraphEdit
from toast_onnx.engines.build import with_weights
from toast_onnx.engines.precision import name_nodes, why_not_converted
from toast_onnx.errors import BackendError, ConfigError, one_line
from toast_onnx.matching.graph import GraphView
from toast_onnx.matching.input_shapes import counted_shapes
from toast_onnx.model import Model, load_model, opset_of, save_model, write_draft
from toast_onnx.runtime import expose
from toast_onnx_calibration.evaluating import classifier_output, classify
from toast_onnx_calibration.feeds import batches
from toast_onnx_calibration.labels import open_labels
from toast_onnx_calibration.prepared import open_prepared
from toast_onnx_calibration.quantized_layers import layer_damages
from toast_onnx_calibration.sessions import ModelInput, fed_inputs, make_session, model_session, run
from toast_onnx_calibration.sources import Source

if TYPE_CHECKING:
    from onnxruntime.quantization import CalibrationDataReader

TYPES = ("int8", "fp8")
METHODS = ("percentile", "entropy", "minmax")
_LINEAR = ("Conv", "Gemm", "MatMul")


@dataclass(frozen=True)
class QuantizeOptions:
    """How to quantize.

    Attributes:
        to: `int8`, or `fp8` (E4M3; opset 19 on).
        method: how activation ranges follow from the samples: `percentile`, `entropy` or `minmax`. fp8 has a rule of
            its own.
        percentile: share of the values inside the range, in percent.
        equalize: a of the equalization across LayerNorm, from 0 to 1; None leaves channels as they are.
        keep: patterns of node names that stay as they are, besides the defaults.
        ends: quantize the first and the last layer, too.
        preprocess: as for `recipe_files.recipe_for`.
        samples: how many to draw; None takes all.
        seed: of that draw.
        batch: samples a run, where the model leaves it free.
        threads: of ONNX Runtime and of image decoding.
        sensitivity: also measure what every layer costs alone.
    """

    to: str = "int8"
    method: str = "percentile"
    percentile: float = 99.999
    equalize: float | None = 0.5
    keep: tuple[str, ...] = ()
    ends: bool = False
    preprocess: str | None = None
    samples: int | None = 64
    seed: int = 0
    batch: int = 16
    threads: int | None = None
    sensitivity: bool = False


@dataclass(frozen=True)
class Quantized:
    """What was done.

    Attributes:
        layers: names of the quantized nodes, in graph order.
        kept: names of the linear layers that stay, in graph order.
        equalized: how many norms were equalized.
        samples: how many samples the ranges follow from.
        notes: anything the user should know.
        damages: layer -> relative error of the first output with it alone quantized, the largest first; empty where
            that was not asked for.
    """

    layers: tuple[str, ...]
    kept: tuple[str, ...]
    equalized: int
    samples: int
    notes: tuple[str, ...] = ()
    damages: Mapping[str, float] = field(default_factory=dict)


def quantize(model_path: Path, data: str | Path, out: Path, options: QuantizeOptions | None = None) -> Quantized:
    """Quantize a model on samples.

    Args:
        model_path: the model, in float32.
        data: as for `sources.open_source`.
        out: the file to write.
        options: how.

    Raises:
        ConfigError: an unknown type or method, a pattern that matches nothing, or a model that is not float32.
        BackendError: ONNX Runtime's quantizer failed.
        DataError: the data does not fit the model.
    """
    given = options or QuantizeOptions()
    model = load_model(model_path)
    _check(model, given)
    model = Model(with_weights(model), model.path)
    name_nodes(model.proto.graph)
    session = make_session(model_path, threads=given.threads)
    inputs, metadata = fed_inputs(model_path, session), session.get_modelmeta().custom_metadata_map
    del session
    source, told = open_prepared(
        model_path,
        data,
        inputs,
        given.preprocess,
        metadata=metadata,
        samples=given.samples,
        seed=given.seed,
        threads=given.threads,
    )
    equalized = 0
    if given.equalize is not None:
        model, equalized = equalize_norms(model, source, inputs, given.equalize, given.batch)
    layers, kept = choose_layers(model, given)
    with tempfile.TemporaryDirectory(prefix="toast-quantize-") as folder:
        plain = write_draft(model, Path(folder), "float.onnx")
        written = Path(folder) / "quantized.onnx"
        _quantize_static(plain, written, _Reader(source, inputs, given.batch), layers, given)
        result = load_model(written)
        damages = (
            layer_damages(model, result, layers, source, inputs, given.batch, given.threads)
            if given.sensitivity
            else {}
        )
        save_model(Model(with_weights(result), out), out)
    notes = [*told, *(source.report.notes() if source.report else ())]
    return Quantized(tuple(layers), tuple(kept), equalized, sum(len(c.rows) for c in source), tuple(notes), damages)


def choose_layers(model: Model, options: QuantizeOptions) -> tuple[list[str], list[str]]:
    """Names of the nodes to quantize and of the linear layers to keep, both in graph order.

    Raises:
        ConfigError: a pattern to keep matches nothing, or nothing is left to quantize.
    """
    weights = {t.name for t in model.proto.graph.initializer if len(t.dims) > 1}
    linear = [
        n.name for n in model.proto.graph.node if n.op_type in _LINEAR and len(n.input) > 1 and n.input[1] in weights
    ]
    kept = set() if options.ends else {*linear[:1], *linear[-1:]}
    for pattern in options.keep:
        found = fnmatch.filter(linear, pattern)
        if not found:
            raise ConfigError(f"--keep {pattern} matches no linear layer; names are such as {', '.join(linear[:3])}")
        kept |= set(found)
    chosen = [name for name in linear if name not in kept]
    if not chosen:
        raise ConfigError("no linear layer is left to quantize; keep fewer")
    return chosen, [name for name in linear if name in kept]


def equalize_norms(
    model: Model, source: Source, inputs: Sequence[ModelInput], strength: float, batch: int = 16
) -> tuple[Model, int]:
    """Divide the outputs of LayerNorm by a factor a channel, and multiply the rows of the layers that read them.

    Args:
        model: a model with its weights in memory; it is not changed.
        source: samples.
        inputs: the model's inputs.
        strength: a in s_j = max|x_j|^a / max|w_j|^(1 - a).
        batch: samples a run.

    Returns:
        The new model, which computes the same, and how many norms were equalized.
    """
    view = GraphView(model)
    facts = counted_shapes(view, {}).facts
    norms = {}
    for i, node in enumerate(view.nodes):
        readers = [r for r in view.consumers.get(node.output[0], []) if view.nodes[r].op_type != "Shape"]
        if node.op_type != "LayerNormalization" or not readers or len(node.input) < 2:
            continue
        fits = all(_multiplies_by_own(view, r, readers) for r in readers)
        alone = all(name in view.initializers and view.consumers.get(name) == [i] for name in node.input[1:])
        if fits and alone and node.output[0] not in {o.name for o in model.proto.graph.output}:
            norms[i] = readers
    if not norms:
        return model, 0
    largest = _largest(model, [view.nodes[i].output[0] for i in norms], source, inputs, batch)
    edit = GraphEdit(view)
    for i, readers in norms.items():
        rows = {view.nodes[r].input[1]: facts.array(view.nodes[r].input[1]) for r in readers}
        weight = np.max([np.abs(w).max(axis=1) for w in rows.values()], axis=0)
        x = np.maximum(largest[view.nodes[i].output[0]], 1e-5)
        s = (x**strength / np.maximum(weight, 1e-5) ** (1 - strength)).astype(np.float32)
        for name in view.nodes[i].input[1:]:
            edit.replace_initializer(name, facts.array(name) / s)
        for name, w in rows.items():
            edit.replace_initializer(name, w * s[:, None])
    changed = edit.apply()
    return Model(with_weights(changed), changed.path), len(norms)


def _multiplies_by_own(view: GraphView, reader: int, readers: Sequence[int]) -> bool:
    """Whether a node multiplies by a weight that only these nodes read."""
    node = view.nodes[reader]
    if node.op_type != "MatMul" or node.input[1] not in view.initializers:
        return False
    return set(view.consumers[node.input[1]]) <= set(readers)


def _largest(
    model: Model, tensors: Sequence[str], source: Source, inputs: Sequence[ModelInput], batch: int
) -> dict[str, NDArray[np.float64]]:
    """The largest magnitude of every channel of tensors, over all samples and tokens."""
    watched = onnx.ModelProto()
    watched.CopyFrom(model.proto)
    session = model_session(Model(expose(watched, tensors), model.path))
    found: dict[str, NDArray[np.float64]] = {}
    for each in batches(source, inputs, batch):
        for name, value in run(session, each.feeds, tensors).items():
            here = np.abs(each.trim(value)).reshape(-1, value.shape[-1]).max(axis=0).astype(np.float64)
            found[name] = np.maximum(found[name], here) if name in found else here
    return found


def _check(model: Model, options: QuantizeOptions) -> None:
    if options.to not in TYPES or options.method not in METHODS:
        raise ConfigError(
            f"cannot quantize to {options.to} by {options.method}; use one of {', '.join(TYPES)}, and of "
            f"{', '.join(METHODS)}"
        )
    least = 19 if options.to == "fp8" else 13
    if opset_of(model.proto) < least:
        raise ConfigError(f"{options.to} needs opset {least}, the model has {opset_of(model.proto)}: export it again")
    reason = why_not_converted(model.proto)
    if reason is not None:
        raise ConfigError(f"{reason}: give the float32 model")


def _quantize_static(
    plain: Path, written: Path, reader: CalibrationDataReader, layers: Sequence[str], options: QuantizeOptions
) -> None:
    from onnxruntime.quantization import CalibrationMethod, QuantFormat, QuantType, quantize_static

    fp8 = options.to == "fp8"
    method = {
        "percentile": CalibrationMethod.Percentile,
        "entropy": CalibrationMethod.Entropy,
        "minmax": CalibrationMethod.MinMax,
    }[options.method]
    kind = QuantType.QFLOAT8E4M3FN if fp8 else QuantType.QInt8
    # TensorRT wants zero points of 0 and biases in float.
    extra: dict[str, Any] = {
        "ActivationSymmetric": True,
        "WeightSymmetric": True,
        "QuantizeBias": False,
        "OpTypesToExcludeOutputQuantization": list(_LINEAR),
        "CalibPercentile": options.percentile,
    }
    logging.disable(logging.WARNING)  # it asks for a preparation that the passes before this one make needless
    try:
        with redirect_stdout(io.StringIO()):  # it prints
            quantize_static(
                str(plain),
                str(written),
                reader,
                quant_format=QuantFormat.QDQ,
                op_types_to_quantize=list(_LINEAR),
                per_channel=not fp8,
                activation_type=kind,
                weight_type=kind,
                nodes_to_quantize=list(layers),
                calibrate_method=CalibrationMethod.Distribution if fp8 else method,
                extra_options=extra,
            )
    except Exception as error:  # its exceptions share no base class
        raise BackendError(f"ONNX Runtime could not quantize the model: {one_line(error)}") from error
    finally:
        logging.disable(logging.NOTSET)


class _Reader:
    """Feeds of a source, one after the other, as ONNX Runtime's calibration asks for them."""

    def __init__(self, source: Source, inputs: Sequence[ModelInput], batch: int) -> None:
        self._feeds: Iterator[dict[str, NDArray[Any]]] = (b.feeds for b in batches(source, inputs, batch))

    def get_next(self) -> dict[str, NDArray[Any]] | None:
        """The next feed; None at the end."""
        return next(self._feeds, None)


def _holds_fp8(path: Path) -> bool:
    """Whether ONNX Runtime's optimizer must keep its hands off: it fuses fp8 into operators that do not take it."""
    kind = onnx.TensorProto.FLOAT8E4M3FN
    return any(t.data_type == kind for t in load_model(path).proto.graph.initializer)


def table_of_steps(
    steps: Mapping[str, Path],
    data: str | Path,
    labels: str | None = None,
    *,
    preprocess: str | None = None,
    batch: int = 16,
    threads: int | None = None,
) -> list[dict[str, Any]]:
    """Agreement of every step with the first one, and accuracy where labels are given.

    Args:
        steps: model files by the name of the step; the recipe is what one of them keeps.
        data: as for `sources.open_source`.
        labels: as for `labels.open_labels`.
        preprocess: as for `recipe_files.recipe_for`.
        batch: samples a run.
        threads: of ONNX Runtime and of image decoding.

    Returns:
        One row a step: `step`, `file`, `agreement` and `top1`, shares or None.

    Raises:
        ToastError: its children say what is wrong with the data, the labels or a model; a step that is no classifier.
    """
    first = next(iter(steps.values()))
    session = make_session(first, threads=threads)
    inputs, output = fed_inputs(first, session), classifier_output(session)
    known = None if labels is None else open_labels(labels, data)
    only = known.by_row.keys() if known is not None else None
    metadata = {e.key: e.value for path in steps.values() for e in load_model(path).proto.metadata_props}
    source, _ = open_prepared(first, data, inputs, preprocess, metadata=metadata, threads=threads, only=only)
    reference: NDArray[np.int64] | None = None
    rows = []
    for step, path in steps.items():
        session = make_session(path, threads=threads, optimize=not _holds_fp8(path))
        parts = [b.trim(run(session, b.feeds, [output])[output]) for b in batches(source, inputs, batch)]
        chosen = np.concatenate(parts).argmax(axis=-1)
        reference = chosen if reference is None else reference
        top1 = None
        if known is not None:
            top1 = classify(session, inputs, source, known, output=output, batch=batch).to_json()["top1"]["accuracy"]
        rows.append({"step": step, "file": path.name, "agreement": float((chosen == reference).mean()), "top1": top1})
    return rows
