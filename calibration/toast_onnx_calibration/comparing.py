"""A dense model and its pruned form side by side: agreement of outputs, drift of blocks, size, cost, latency."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
from numpy.typing import NDArray

from toast_onnx.engines.ortbench import benchmark
from toast_onnx.errors import DataError, ModelError
from toast_onnx.files import write_bytes
from toast_onnx.matching.blocks import Block
from toast_onnx.matching.study import Study, study
from toast_onnx.model import Model, file_hash, load_model, stored_bytes
from toast_onnx.planning.macs import graph_macs, graph_params
from toast_onnx.report.tables import Table, format_bytes, format_count
from toast_onnx.runtime import expose
from toast_onnx_calibration.agreement import Agreement, log_probabilities
from toast_onnx_calibration.feeds import Batch, batch_size, batches
from toast_onnx_calibration.pictures import small_picture
from toast_onnx_calibration.prepared import Note, open_prepared, silent
from toast_onnx_calibration.recipes import Recipe
from toast_onnx_calibration.sessions import ModelInput, model_inputs, model_session, run
from toast_onnx_calibration.sources import Source

if TYPE_CHECKING:
    import onnxruntime as ort

Progress = Callable[[int, int | None], None]

#: Below this agreement a model hardly does what the dense one does.
HARDLY = 0.5
#: Spread of timed rounds above which the machine was too busy to tell.
NOISY = 0.25
#: Bytes of block outputs held at a time; larger models go in smaller batches.
HELD = 256_000_000


@dataclass(frozen=True, repr=False)
class Comparison:
    """What `compare` found; every entry is plain data.

    Attributes:
        models: file, hash, MACs, parameters, bytes and tokens behind every block of the dense and the pruned model.
        outputs: output name -> agreement.
        blocks: for every block its number, name and the agreement of its branch outputs.
        latency: medians of interleaved runs, None where it was not measured.
        samples: number of samples.
        data: where they come from.
        notes: what the user should know.
        disagreements: samples whose answers differ, those first of which the dense model is surest, as many as were
            asked for: `sample`, `dense` and `pruned` class and confidence, and its `picture` or None.
    """

    models: dict[str, dict[str, Any]]
    outputs: dict[str, dict[str, Any]]
    blocks: list[dict[str, Any]]
    latency: list[dict[str, Any]] | None
    samples: int
    data: dict[str, Any]
    notes: tuple[str, ...]
    disagreements: tuple[dict[str, Any], ...] = ()

    def to_json(self) -> dict[str, Any]:
        """One document for machines."""
        return {
            "models": self.models,
            "samples": self.samples,
            "data": self.data,
            "outputs": self.outputs,
            "blocks": self.blocks,
            "latency": self.latency,
            "notes": list(self.notes),
        }

    @property
    def worst(self) -> dict[str, Any] | None:
        """Block, part and relative error of the branch that is furthest off; None where none was compared."""
        branches = [
            {"block": b["index"], "part": part, "error": b[part]["relative_error"]}
            for b in self.blocks
            for part in ("attention", "ffn")
            if part in b
        ]
        return max(branches, key=lambda entry: float(entry["error"]), default=None)

    @property
    def verdict(self) -> str:
        """The comparison in a sentence: what became of the answers, of the cost and of the latency."""
        found = next((e for e in self.outputs.values() if "top1_agreement" in e), None)
        if found is not None:
            same = found["top1_agreement"]
            how = f"answers as the dense model does on {same:.1%} of {self.samples} samples (KL {found['kl']:.3f})"
            how = f"HARDLY AGREES any more: it {how}" if same < HARDLY else how
        else:
            worst = max((e["relative_error"] for e in self.outputs.values()), default=0.0)
            how = (
                f"differs from the dense model's outputs by {worst:.2%} of their size at most ({self.samples} samples)"
            )
        a, b = self.models["dense"], self.models["pruned"]
        cost = f"takes {b['macs'] / a['macs']:.0%} of its MACs and {b['bytes'] / a['bytes']:.0%} of its file"
        timed = "" if self.latency is None else f"; {_latency_words(self.latency[1])}"
        return f"{b['file']} {how} and {cost}{timed}"

    @property
    def tables(self) -> list[Table]:
        """Costs of both models, agreement of every output, drift of every branch."""
        outputs = Table(
            f"outputs on {self.samples} samples",
            ("output", "same top-1", "KL", "cosine", "relative error"),
            [[name, *_agreement(entry, ("top1_agreement", "kl"))] for name, entry in self.outputs.items()],
        )
        rows = [
            [str(block["index"]), block["name"], part, *_agreement(block[part])]
            for block in self.blocks
            for part in ("attention", "ffn")
            if part in block
        ]
        branches = Table(
            "branch outputs",
            ("block", "name", "branch", "cosine", "relative error"),
            rows,
            ("right", "left", "left", "right", "right"),
        )
        costs = Table(None, ("", "dense", "pruned", "pruned / dense"), _costs(self), None, _noise(self.latency))
        return [costs, outputs, *([branches] if rows else [])]

    def report(self) -> dict[str, Any]:
        """One document of plain data."""
        return self.to_json()

    def save(self, path: str | Path) -> None:
        """Write the document as JSON, whole or not at all.

        Raises:
            ModelError: it cannot be written.
        """
        write_bytes(Path(path), (json.dumps(self.to_json(), indent=2) + "\n").encode())

    def __repr__(self) -> str:
        return "\n".join(table.text() for table in self.tables[:2])

    def _repr_html_(self) -> str:
        return "".join(table.html() for table in self.tables)


def compare(dense: str | Path, pruned: str | Path, data: str | Path, **reading: Any) -> Comparison:
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
    session = _session(original, branches, provider, threads)
    inputs = model_inputs(session)
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
    count, fed = _measure(original, session, sides, inputs, source, size, progress, shown)
    told += source.report.notes() if source.report else ()
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
                | {part: side.drift[name].to_json() for part, name in branch_outputs(b).items() if name in side.drift}
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
        disagreements: samples whose answers differ, those first of which the dense model is surest.
    """

    path: Path
    study: Study
    session: ort.InferenceSession
    watched: list[tuple[str, str]]
    notes: list[str]
    outputs: dict[str, Agreement]
    drift: dict[str, Agreement]
    disagreements: list[_Disagreement] = field(default_factory=list)

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
        _session(found, [theirs for _, theirs in watched], provider, threads),
        watched,
        notes,
        {name: Agreement(is_classifier(dense, name)) for name in names},
        {name: Agreement() for name, _ in watched},
    )


def _after(dense: Study, path: Path, side: _Side) -> list[str]:
    """What the run showed of a pruned model."""
    notes = []
    if lost := len(side.watched) - len(side.drift):
        notes.append(f"tokens are merged in front of {lost} of {len(side.watched)} branches: their drift is left out")
    if graph_macs(dense.view, dense.counted) < graph_macs(side.study.view, side.study.counted):
        notes.append(f"{path} is the smaller one: the dense model comes first, so give them the other way round")
    return notes


def branch_outputs(block: Block) -> dict[str, str]:
    """The tensors in which a block's branches end, before layer scale: `attention` and `ffn`."""
    found = {}
    if block.attention is not None and block.attention.proj is not None:
        found["attention"] = block.attention.proj.linear.output
    if block.ffn is not None:
        found["ffn"] = block.ffn.fc2.output
    return found


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
) -> tuple[int, dict[str, tuple[int, ...]]]:
    """Run all models on every sample, into the agreements of `sides`; the number of samples, and the shapes fed."""
    names = list(sides[0].outputs)
    channels = {name: _channel_axis(dense, name) for side in sides for name, _ in side.watched}
    scores = next((name for name, agreement in sides[0].outputs.items() if agreement.classes), None)
    done, shapes = 0, {}
    if progress is not None:
        progress(0, source.count)
    for each in batches(source, inputs, size):
        shapes = {name: tuple(array.shape) for name, array in each.feeds.items()}
        a = run(session, each.feeds, [*names, *channels])
        for side in sides:
            b = run(side.session, each.feeds, names + [y for _, y in side.watched])
            for name, agreement in side.outputs.items():
                if a[name].shape != b[name].shape:
                    raise DataError(
                        f"the output '{name}' has shape {a[name].shape} in the dense model and {b[name].shape} in "
                        f"{side.path}: compare one model"
                    )
                agreement.add(each.trim(a[name]), each.trim(b[name]))
            if shown and scores is not None:
                side.disagree(each.trim(a[scores]), each.trim(b[scores]), each, shown)
            for x, y in side.watched:
                if a[x].shape != b[y].shape:  # of merged tokens there are fewer
                    side.drift.pop(x, None)
                elif x in side.drift:
                    side.drift[x].add(*(np.moveaxis(each.trim(t), channels[x], -1) for t in (a[x], b[y])))
        done += each.valid
        if progress is not None:
            progress(done, source.count)
    return done, shapes


def _channel_axis(dense: Study, tensor: str) -> int:
    for block in dense.match.blocks:
        if block.attention is not None and block.attention.proj is not None:
            linear = block.attention.proj.linear
            if linear.output == tensor:
                return linear.channel_axis
        if block.ffn is not None and block.ffn.fc2.output == tensor:
            return block.ffn.fc2.channel_axis
    return -1


def _session(found: Study, names: Sequence[str], provider: str, threads: int | None) -> ort.InferenceSession:
    model = found.view.model
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


def _costs(found: Comparison) -> list[list[str]]:
    a, b = found.models["dense"], found.models["pruned"]
    rows = []
    for label, key, show in (("MACs", "macs", format_count), ("parameters", "params", format_count)):
        rows.append([label, show(a[key]), show(b[key]), f"{b[key] / a[key]:.3f}"])
    if a["tokens"] != b["tokens"] and len(a["tokens"]) == len(b["tokens"]) and all(a["tokens"]):
        ends = [f"{m['tokens'][0]} .. {m['tokens'][-1]}" for m in (a, b)]
        left = sum(b["tokens"]) / sum(a["tokens"])
        rows.append(["tokens, first .. last block", *ends, f"{left:.3f} of all blocks'"])
    rows.append(["file", format_bytes(a["bytes"]), format_bytes(b["bytes"]), f"{b['bytes'] / a['bytes']:.3f}"])
    if found.latency is not None:
        first, second = found.latency
        low, high = second["speedup_quartiles"]
        ratio = f"{1 / second['speedup']:.3f} ({1 / high:.3f} .. {1 / low:.3f})"
        times = [f"{t['median_ms']:.2f} ms, spread {t['spread']:.0%}" for t in (first, second)]
        rows.append([f"latency, batch {first['batch']}", *times, ratio])
    return rows


def _latency_words(pruned: dict[str, Any]) -> str:
    """Whether a timed model is faster, as far as the spread of its rounds lets one tell."""
    low, high = pruned["speedup_quartiles"]
    if low <= 1 <= high:
        return f"no difference in latency could be told ({low:.2f} to {high:.2f} times as fast)"
    return f"{pruned['speedup']:.2f} times as fast ({low:.2f} to {high:.2f})"


def _noise(latency: list[dict[str, Any]] | None) -> tuple[str, ...]:
    """A warning where rounds differ so much that their median says little."""
    spread = max((entry["spread"] for entry in latency or ()), default=0.0)
    if spread <= NOISY:
        return ()
    return (f"latency: this machine was busy, rounds differ by {spread:.0%}; measure again where nothing else runs",)


def _agreement(entry: dict[str, Any], more: tuple[str, ...] = ()) -> list[str]:
    cells = {
        "top1_agreement": lambda v: f"{v:.2%}",
        "kl": lambda v: f"{v:.4f}",
        "cosine": lambda v: f"{v:.4f}",
        "relative_error": lambda v: f"{v:.3e}",
    }
    return [cells[key](entry[key]) if key in entry else "-" for key in (*more, "cosine", "relative_error")]
