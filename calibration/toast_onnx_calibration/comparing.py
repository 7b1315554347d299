"""A dense model and its pruned form side by side: agreement of outputs, drift of blocks, size, cost, latency."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict, Unpack

import numpy as np
import onnx
from numpy.typing import NDArray

from toast_onnx.engines.ortbench import benchmark
from toast_onnx.errors import DataError, ModelError
from toast_onnx.matching.blocks import Block
from toast_onnx.matching.linear import Linear
from toast_onnx.matching.study import Study, study
from toast_onnx.model import Model, file_hash, load_model, stored_bytes
from toast_onnx.planning.macs import graph_macs, graph_params
from toast_onnx.runtime import expose
from toast_onnx.tokens.points import study_tokens
from toast_onnx_calibration.agreement import Agreement, log_probabilities
from toast_onnx_calibration.comparison import Comparison
from toast_onnx_calibration.counted_rows import CountedRows
from toast_onnx_calibration.feeds import Batch, batch_size, batches
from toast_onnx_calibration.pictures import small_picture
from toast_onnx_calibration.prepared import Note, open_prepared, silent
from toast_onnx_calibration.recipes import Recipe
from toast_onnx_calibration.sessions import ModelInput, held_inputs, model_inputs, model_session, run
from toast_onnx_calibration.sources import Source

if TYPE_CHECKING:
    import onnxruntime as ort

Progress = Callable[[int, int | None], None]

#: Bytes of block outputs held at a time; larger models go in smaller batches.
HELD = 256_000_000


class Reading(TypedDict, total=False):
    """How samples are read and models are run: options of `compare_all`, for those who pass them on."""

    preprocess: str | None
    samples: int | None
    seed: int
    provider: str
    batch: int
    threads: int | None
    rounds: int
    progress: Progress | None
    hold: int
    shapes: Mapping[str, Sequence[int]] | None
    note: Note
    shown: int
    images: bool


def compare(dense: str | Path, pruned: str | Path, data: str | Path, **reading: Unpack[Reading]) -> Comparison:
    """Run two models on the same samples.

    Args:
        dense: the original model.
        pruned: the model to hold against it.
        data: as for `sources.open_source`.
        reading: as for `compare_all`.

    Raises:
        ToastError: its children say what is wrong.
    """
    return compare_all(dense, [pruned], data, **reading)[0]


def compare_all(
    dense: str | Path,
    pruned: Sequence[str | Path],
    data: str | Path,
    *,
    preprocess: str | None = None,
    samples: int | None = None,
    seed: int = 0,
    provider: str = "cpu",
    batch: int = 16,
    threads: int | None = None,
    rounds: int = 20,
    progress: Progress | None = None,
    hold: int = 0,
    shapes: Mapping[str, Sequence[int]] | None = None,
    note: Note = silent,
    shown: int = 0,
    images: bool = True,
) -> list[Comparison]:
    """Run a model and what was made from it on the same samples: each sample is read, and run densely, once.

    Args:
        dense: the original model.
        pruned: the models to hold against it, one at least; all are kept in memory.
        data: as for `sources.open_source`.
        preprocess: as for `recipe_files.recipe_for`.
        samples: how many to draw by `seed`; None takes all.
        seed: of that draw.
        provider: a key of `toast_onnx.providers.PROVIDERS`.
        batch: samples a run, and the batch that latency is measured at, where the models leave it free.
        threads: of ONNX Runtime and of image decoding.
        rounds: timed rounds, in which all models take turns; 0 measures no latency.
        progress: called after every batch.
        shapes: concrete shapes of inputs with symbolic axes.
        hold: from 2 on, only the samples that `calibrate` held back with the same draw.
        note: told what the user should know before the models run.
        shown: samples whose answers differ to keep.
        images: keep their pictures, too.

    Returns:
        A comparison for each of the pruned models.

    Raises:
        ToastError: its children say what is wrong.
    """
    dense, small = Path(dense), [Path(p) for p in pruned]
    original = study(load_model(dense), shapes)
    sides = [_side(original, path, shapes, provider, threads) for path in small]
    branches = list(dict.fromkeys(name for side in sides for name, _ in side.watched))
    watched = [
        (block, linear)
        for block in original.match.blocks
        for linear in _branch_ends(block).values()
        if linear.output in branches
    ]
    rows = CountedRows.of(original, list(sides[0].outputs), watched)
    model = original.view.model
    session = _session(
        Model(rows.proto, model.path, model.arrays),
        [*branches, *rows.tensors],
        provider,
        threads,
    )
    inputs = held_inputs(original, model_inputs(session))
    for side in sides:
        _check_alike(session, side)
    kept = [s.get_modelmeta().custom_metadata_map for s in (sides[0].session, session)]
    source, told = open_prepared(
        dense,
        data,
        inputs,
        preprocess,
        metadata=kept[0] | kept[1],
        samples=samples,
        seed=seed,
        threads=threads,
        hold=hold,
        held=hold > 1,
        note=note,
    )
    size = _held_batch(original, branches, batch)
    count, fed = _measure(original, session, sides, inputs, source, size, progress, shown, rows)
    told += source.report.notes() if source.report else ()
    told += rows.notes()
    del session
    times = []
    if rounds:
        times = benchmark(
            [dense, *small],
            [batch_size(inputs, batch)],
            provider=provider,
            threads=threads,
            rounds=rounds,
            warmup=2,
            shapes=fed,
        )
    latency = [t.summary() for t in times]
    figures = _figures(original, dense)
    return [
        Comparison(
            models={"dense": figures, "pruned": _figures(side.study, side.path)},
            outputs={name: a.to_json() for name, a in side.outputs.items()},
            blocks=[
                {"index": b.index, "name": b.name}
                | {
                    part: side.drift[name].to_json()
                    for part, name in branch_outputs(b).items()
                    if name in side.drift and side.drift[name].rows
                }
                for b in original.match.blocks
            ],
            latency=[latency[0], latency[k]] if latency else None,
            samples=count,
            data={
                "source": source.description,
                "fingerprint": source.fingerprint,
                "preprocessing": source.recipe.model_dump(mode="json") if source.recipe else None,
            },
            notes=tuple(dict.fromkeys([*side.notes, *told, *_after(original, dense, side)])),
            disagreements=tuple(d.to_document(source.recipe, images) for d in side.disagreements),
        )
        for k, side in enumerate(sides, start=1)
    ]


@dataclass
class _Side:
    """A pruned model while it is held against the dense one.

    Attributes:
        path: its file.
        study: what it is.
        session: runs it, with its branch outputs exposed.
        watched: pairs of branch outputs, the dense model's first.
        notes: what the user should know of it.
        outputs: output name -> agreement.
        drift: branch output by the dense model's name -> agreement.
        merged: branch outputs with fewer tokens than the dense model's, of which the learned ones are compared.
        disagreements: samples whose answers differ, those first of which the dense model is surest.
    """

    path: Path
    study: Study
    session: ort.InferenceSession
    watched: list[tuple[str, str]]
    notes: list[str]
    outputs: dict[str, Agreement]
    drift: dict[str, Agreement]
    merged: set[str] = field(default_factory=set)
    disagreements: list[_Disagreement] = field(default_factory=list)

    def agree(
        self, dense: Mapping[str, NDArray[Any]], pruned: Mapping[str, NDArray[Any]], batch: Batch, rows: CountedRows
    ) -> None:
        """Hold the outputs of a batch against each other, padded tokens left out."""
        for name, agreement in self.outputs.items():
            a, b = dense[name], pruned[name]
            if a.shape != b.shape:
                raise DataError(
                    f"the output '{name}' has shape {a.shape} in the dense model and {b.shape} in {self.path}: "
                    "compare one model"
                )
            counts = rows.counts(name, a.shape[:-1], dense)
            agreement.add(batch.trim(a), batch.trim(b), None if counts is None else batch.trim(counts))

    def disagree(self, dense: NDArray[Any], pruned: NDArray[Any], batch: Batch, shown: int) -> None:
        """Keep samples of a batch whose answers differ.

        Args:
            dense: (samples, classes) scores.
            pruned: the same of the pruned model.
            batch: the samples.
            shown: how many to keep in all.
        """
        rows = np.flatnonzero(dense.argmax(axis=1) != pruned.argmax(axis=1))
        a, b = (np.exp(log_probabilities(np.asarray(x, np.float64))) for x in (dense, pruned))
        fed = next(iter(batch.feeds.values())) if len(batch.feeds) == 1 else None
        self.disagreements += [
            _Disagreement(
                batch.rows[k],
                (int(a[k].argmax()), float(a[k].max())),
                (int(b[k].argmax()), float(b[k].max())),
                None if fed is None else fed[k],
            )
            for k in rows
        ]
        self.disagreements = sorted(self.disagreements, key=lambda d: -d.dense[1])[:shown]


@dataclass(frozen=True)
class _Disagreement:
    """A sample whose answers differ: its name, class and confidence of both models, and what was fed."""

    sample: str
    dense: tuple[int, float]
    pruned: tuple[int, float]
    fed: NDArray[Any] | None

    def to_document(self, recipe: Recipe | None, images: bool) -> dict[str, Any]:
        """Plain data, with a picture where one is wanted and the sample is an image."""
        sides = {
            name: {"class": found[0], "confidence": found[1]}
            for name, found in (("dense", self.dense), ("pruned", self.pruned))
        }
        shown = small_picture(self.fed, recipe) if images and self.fed is not None else None
        return {"sample": self.sample, **sides, "picture": shown}


def _side(
    dense: Study, path: Path, shapes: Mapping[str, Sequence[int]] | None, provider: str, threads: int | None
) -> _Side:
    found = study(load_model(path), shapes)
    watched, notes = watch(dense, found)
    names = [o.name for o in dense.view.model.proto.graph.output]
    return _Side(
        path,
        found,
        _session(found.view.model, [theirs for _, theirs in watched], provider, threads),
        watched,
        notes,
        {name: Agreement(is_classifier(dense, name)) for name in names},
        {name: Agreement() for name, _ in watched},
    )


def _after(dense: Study, path: Path, side: _Side) -> list[str]:
    """What the run showed of a pruned model."""
    notes = []
    if side.merged:
        notes.append(
            f"tokens are merged in front of {len(side.merged)} of {len(side.watched)} branches: of these the learned "
            "tokens alone are compared (the class token, for one), where there are any"
        )
    if graph_macs(dense.view, dense.counted) < graph_macs(side.study.view, side.study.counted):
        notes.append(f"{path} is the smaller one: the dense model comes first, so give them the other way round")
    return notes


def _branch_ends(block: Block) -> dict[str, Linear]:
    """The layers with which a block's branches end: `attention` and `ffn`."""
    found = {}
    if block.attention is not None and block.attention.proj is not None:
        found["attention"] = block.attention.proj.linear
    if block.ffn is not None:
        found["ffn"] = block.ffn.fc2
    return found


def branch_outputs(block: Block) -> dict[str, str]:
    """The tensors in which a block's branches end, before layer scale: `attention` and `ffn`."""
    return {part: linear.output for part, linear in _branch_ends(block).items()}


def watch(dense: Study, pruned: Study) -> tuple[list[tuple[str, str]], list[str]]:
    """Pairs of branch outputs of both models, by block number; none, and a note, where their blocks do not pair."""
    ours, theirs = (s.match.blocks for s in (dense, pruned))
    if len(ours) != len(theirs):
        return [], [f"the models have {len(ours)} and {len(theirs)} blocks: drift by block is left out"]
    pairs = [
        (name, branch_outputs(b)[part])
        for a, b in zip(ours, theirs, strict=True)
        for part, name in branch_outputs(a).items()
        if part in branch_outputs(b)
    ]
    return pairs, []


def is_classifier(study: Study, output: str) -> bool:
    """Whether an output is 2-D and comes straight from a linear layer, or from a softmax."""
    shape = study.facts.shape(output)
    if shape is None or len(shape) != 2 or shape[1] < 2:
        return False
    name = output
    while (node := study.view.producer_of(name)) is not None:
        if node.op_type in ("Gemm", "MatMul", "Softmax", "LogSoftmax"):
            return True
        if node.op_type not in ("Add", "Cast", "Identity", "Reshape", "Squeeze", "Flatten"):
            return False
        moving = [n for n in node.input if n and not study.facts.is_constant(n)]
        if len(moving) != 1 and node.op_type == "Add":
            return False
        name = moving[0] if moving else ""
    return False


def _measure(
    dense: Study,
    session: ort.InferenceSession,
    sides: Sequence[_Side],
    inputs: list[ModelInput],
    source: Source,
    size: int,
    progress: Progress | None,
    shown: int,
    rows: CountedRows,
) -> tuple[int, dict[str, tuple[int, ...]]]:
    """Run all models on every sample, into the agreements of `sides`; the number of samples, and the shapes fed."""
    names = list(sides[0].outputs)
    watched = {name for side in sides for name, _ in side.watched}
    ends = [linear for block in dense.match.blocks for linear in _branch_ends(block).values()]
    channels = {linear.output: linear.channel_axis for linear in ends if linear.output in watched}
    scores = next((name for name, agreement in sides[0].outputs.items() if agreement.classes), None)
    learned = {sequence.count: sequence.front for sequence in study_tokens(dense).sequences}
    done, shapes = 0, {}
    if progress is not None:
        progress(0, source.count)
    for each in batches(source, inputs, size):
        shapes = {name: tuple(array.shape) for name, array in each.feeds.items()}
        a = run(session, each.feeds, [*names, *channels, *rows.tensors])
        for side in sides:
            b = run(side.session, each.feeds, names + [y for _, y in side.watched])
            side.agree(a, b, each, rows)
            if shown and scores is not None:
                side.disagree(each.trim(a[scores]), each.trim(b[scores]), each, shown)
            for x, y in side.watched:
                pair, counts = (a[x], b[y]), None
                if a[x].shape != b[y].shape:  # of merged tokens there are fewer
                    side.merged.add(x)
                    front = learned.get(a[x].shape[1], 0)
                    pair = a[x][:, :front], b[y][:, :front]
                else:
                    counts = rows.counts(x, np.moveaxis(a[x], channels[x], -1).shape[:-1], a)
                if pair[0].size and pair[0].shape == pair[1].shape:
                    ours, theirs = (np.moveaxis(each.trim(t), channels[x], -1) for t in pair)
                    side.drift[x].add(ours, theirs, None if counts is None else each.trim(counts))
        done += each.valid
        if progress is not None:
            progress(done, source.count)
    return done, shapes


def _session(model: Model, names: Sequence[str], provider: str, threads: int | None) -> ort.InferenceSession:
    proto = onnx.ModelProto()
    proto.CopyFrom(model.proto)
    return model_session(Model(expose(proto, names), model.path, dict(model.arrays)), provider, threads=threads)


def _check_alike(session: ort.InferenceSession, side: _Side) -> None:
    dense, other = ({i.name: (i.type, len(i.shape)) for i in s.get_inputs()} for s in (session, side.session))
    if dense != other:
        raise ModelError(
            f"{side.path} takes {', '.join(other)}, but the dense model {', '.join(dense)}: compare one model"
        )
    if missing := set(side.outputs) - {o.name for o in side.session.get_outputs()}:
        raise ModelError(f"{side.path} lacks the output '{min(missing)}' of the dense model: compare one model")


def _held_batch(dense: Study, names: Sequence[str], batch: int) -> int:
    """The batch, or less where the block outputs of that many samples would take more than `HELD` bytes."""
    items = max(1, next(iter(dense.facts.shape(i.name) or (1,) for i in dense.view.model.proto.graph.input))[0])
    each = sum(8 * int(np.prod(dense.facts.shape(n) or (0,), dtype=np.int64)) for n in names) // items
    return max(1, min(batch, HELD // max(each, 1)))


def _figures(found: Study, path: Path) -> dict[str, Any]:
    return {
        "file": path.name,
        "sha256": file_hash(path),
        "macs": graph_macs(found.view, found.counted),
        "params": graph_params(found.view),
        "bytes": stored_bytes(path),
        "tokens": [_tokens(found, block) for block in found.match.blocks],
    }


def _tokens(found: Study, block: Block) -> int:
    """Tokens of one item behind a block, or behind its attention where it has no network."""
    branches = branch_outputs(block)
    shape = found.counted.shape(branches.get("ffn") or branches.get("attention") or "") or ()
    return int(np.prod(shape[1:-1], dtype=np.int64)) if len(shape) > 2 else 0
