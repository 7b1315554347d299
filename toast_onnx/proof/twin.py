"""The padded twin: the proof that a rewritten graph computes what its new weights say.

The twin is the original graph with the new weights padded back to the old shapes with zeros. It never passes through
the rewriting, so it catches every wrong slice, reshape and scale. Both graphs run on the same inputs; every block's
branch output (before layer scale) and every graph output must agree.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass

import numpy as np
import onnx
import onnx.helper

from toast_onnx.edit import GraphEdit, PlaceWriter
from toast_onnx.errors import TwinError
from toast_onnx.filling import Filling, fillings
from toast_onnx.matching.blocks import Block
from toast_onnx.matching.facts import Facts
from toast_onnx.matching.graph import GraphView
from toast_onnx.matching.head_norms import HeadNorm
from toast_onnx.matching.linear import Linear, bias, weights
from toast_onnx.model import Model, scratch_folder, stub, write_draft
from toast_onnx.proof.decisions import Decision
from toast_onnx.proof.precision import to_float32
from toast_onnx.runtime import batch_sizes, run_model
from toast_onnx.solving.weights import BlockWeights, HeadWeights

#: Largest allowed difference, as a fraction of the compared tensor's largest magnitude.
TOLERANCE = 1e-4


@dataclass(frozen=True)
class Difference:
    """How far one tensor of the pruned graph is from the twin's.

    Attributes:
        tensor: its name.
        block: number of the block whose branch it ends, None for an output of the graph or scores that it chooses by.
        relative: largest absolute difference over the twin's largest magnitude.
    """

    tensor: str
    block: int | None
    relative: float


@dataclass(frozen=True)
class TwinResult:
    """Outcome of the comparison.

    Attributes:
        batches: batch sizes compared.
        tolerance: the limit on every difference.
        worst: the largest difference.
        differences: per tensor, the largest over the batches.
    """

    batches: tuple[int, ...]
    tolerance: float
    worst: float
    differences: tuple[Difference, ...]

    def to_document(self) -> dict[str, object]:
        """Plain data for the report."""
        return asdict(self)


def together(results: Sequence[TwinResult]) -> TwinResult | None:
    """One outcome of several comparisons, None of none; of a tensor compared more than once, the largest difference."""
    if not results:
        return None
    worst: dict[str, Difference] = {}
    for each in (d for result in results for d in result.differences):
        if each.tensor not in worst or not each.relative <= worst[each.tensor].relative:
            worst[each.tensor] = each
    first = results[0]
    return TwinResult(first.batches, first.tolerance, max(r.worst for r in results), tuple(worst.values()))


def padded_twin(view: GraphView, facts: Facts, blocks: Sequence[Block], new: Mapping[int, BlockWeights]) -> Model:
    """The original graph with new weights padded back to the old shapes.

    Args:
        view: the original graph.
        facts: facts at the probed shapes.
        blocks: the matched blocks.
        new: block number -> new weights.
    """
    edit = GraphEdit(view)
    for block in blocks:
        change = new.get(block.index)
        if change is None:
            continue
        padded: dict[str, _Padded] = {}
        for filling in fillings(block, change):
            _pad(view, facts, filling, padded)
        if change.attention is not None and block.attention is not None:
            for norm, part in zip(block.attention.norms, (change.attention.q, change.attention.k), strict=False):
                if part is not None and part.kept < block.attention.qk_dim:
                    _scale_norm(edit, norm, part, f"{block.name}/twin")
        for p in padded.values():
            b = p.bias if p.linear.bias is not None or p.bias.any() else None
            edit.remove(p.linear.nodes)
            name = f"{block.name}/twin"
            edit.linear(p.linear.node, p.linear, p.linear.input, p.weight, b, p.linear.output, name)
    _freeze_half_scalars(edit, view, facts)
    return edit.apply()


def _freeze_half_scalars(edit: GraphEdit, view: GraphView, facts: Facts) -> None:
    """Keep half precision's rounding of constants that the graph computes (a scale from a shape).

    The float32 copy that is compared would compute them anew, and more exactly than the graph itself ever does.
    """
    for i, node in enumerate(view.nodes):
        value = facts.value(node.output[0]) if len(node.output) == 1 else None
        if value is None or value.size != 1 or value.dtype.itemsize != 2 or not facts.is_constant(node.output[0]):
            continue
        if node.op_type != "Constant" and not edit.is_removed(i):
            edit.remove([i])
            frozen = edit.constant(f"{node.output[0]}/frozen", value)
            edit.emit(i, "Identity", [frozen], node.output[0], f"{node.name or node.output[0]}/frozen")


def _rounded_alike(pruned: Model, twin: Model) -> Model:
    """The pruned graph with the twin's frozen scalars wherever it still computes them itself, to be compared."""
    aliases = {n.output[0]: n.input[0] for n in twin.proto.graph.node if n.op_type == "Identity"}
    frozen = {name: source for name, source in aliases.items() if source == f"{name}/frozen"}
    if not any(name in frozen for n in pruned.proto.graph.node for name in n.output):
        return pruned
    proto, arrays = onnx.ModelProto(), dict(pruned.arrays)
    proto.CopyFrom(pruned.proto)
    for node in proto.graph.node:
        if len(node.output) == 1 and node.output[0] in frozen:
            source = frozen[node.output[0]]
            node.CopyFrom(onnx.helper.make_node("Identity", [source], list(node.output), name=node.name))
            value = arrays[source] = twin.arrays[source]
            proto.graph.initializer.append(stub(source, value))
    return Model(proto, pruned.path, arrays)


def _scale_norm(edit: GraphEdit, norm: HeadNorm, part: HeadWeights, name: str) -> None:
    """A norm whose sum of squares lacks what the removed dimensions held: x sqrt(d e) / sqrt(|x|^2 + d e eps)."""
    write = PlaceWriter(edit, norm.nodes[-1], name)
    whole = norm.gain.size * part.energy
    edit.remove(norm.nodes)
    stays = np.isin(np.arange(norm.gain.size), part.slots[0])
    gain = write.constant(norm.gain * stays * np.sqrt(whole), "gain", np.float32)
    bias = write.constant(norm.bias * stays, "bias", np.float32)
    square = write.reduce("ReduceSum", write.one("Mul", [norm.start] * 2), [-1], keep=True)
    length = write.one("Sqrt", [write.one("Add", [square, write.constant(whole * norm.eps, "eps", np.float32)])])
    scaled = write.one("Mul", [write.one("Div", [norm.start, length]), gain])
    write.node("Add", [scaled, bias], outputs=[norm.end])


@dataclass
class _Padded:
    linear: Linear
    weight: np.ndarray
    bias: np.ndarray


def _start(view: GraphView, facts: Facts, linear: Linear, padded: dict[str, _Padded]) -> _Padded:
    """The layer's present weights, to be overwritten where they are new."""
    if linear.output not in padded:
        w = np.array(weights(view, facts, linear))
        b = bias(view, facts, linear)
        padded[linear.output] = _Padded(linear, w, np.zeros(w.shape[1], w.dtype) if b is None else np.array(b))
    return padded[linear.output]


def _pad(view: GraphView, facts: Facts, filling: Filling, padded: dict[str, _Padded]) -> None:
    """Put new weights among zeros (in place)."""
    p = _start(view, facts, filling.linear, padded)
    if filling.new is not None:
        p.weight[:, filling.cleared] = 0
        p.bias[filling.cleared] = 0
        p.weight[filling.index], p.bias[filling.outputs] = filling.new
    if filling.gone is not None:
        p.weight[:, filling.gone] = 0
        p.bias[filling.gone] = 0


def compare_with_twin(
    view: GraphView,
    twin: Model,
    pruned: Model,
    blocks: Sequence[Block],
    new: Mapping[int, BlockWeights],
    feeds: Sequence[Mapping[str, np.ndarray]],
    chosen: Sequence[str] = (),
    decisions: Sequence[Decision] = (),
) -> TwinResult:
    """Run the twin and the pruned graph on the same inputs and compare.

    Args:
        view: the original graph.
        twin: the padded twin; it gives up its new weights once they are written to a file.
        pruned: the rewritten graph.
        blocks: the matched blocks.
        new: block number -> new weights.
        feeds: inputs to compare on.
        chosen: tensors that the pruned graph makes and the twin takes as inputs: what it selects at run time.
        decisions: choices of the original graph that the twin takes over; their scores are compared, too.

    Raises:
        TwinError: a tensor differs by more than `TOLERANCE`; names the first block that does.
    """
    watched = _watched(view, blocks, new, decisions)
    pruned = _rounded_alike(pruned, twin)
    draft = to_float32(twin)  # inputs of half precision are float32 in it, too
    with scratch_folder("toast-twin-") as folder:
        padded = write_draft(draft, folder, "twin.onnx")
        del draft
        twin.arrays.clear()  # as large as the dense model, and not needed beside a session
        smaller = write_draft(to_float32(pruned), folder, "pruned.onnx")
        given = {name: name for name in chosen} | {d.made: d.given for d in decisions}
        actual = run_model(smaller, [*watched, *given], feeds)
        theirs = [
            {**each} | {name: made[tensor] for tensor, name in given.items()}
            for each, made in zip(feeds, actual, strict=True)
        ]
        expected = run_model(padded, list(watched), theirs)
        worst = _worst(watched, expected, actual)
    differences = tuple(Difference(name, watched[name], worst[name]) for name in watched)
    for d in differences:
        if not d.relative <= TOLERANCE:
            where = f"block {d.block} ({blocks[d.block].name})" if d.block is not None else f"the tensor '{d.tensor}'"
            if np.isnan(d.relative):
                raise TwinError(
                    f"{where} holds no finite number on any input, dense as well as pruned, so nothing is proven; "
                    "give shapes that fit with --shape, or skip the proof with --no-check"
                )
            raise TwinError(
                f"the rewritten graph differs from its padded twin, first at {where}: {d.relative:.1e} of its scale "
                f"(allowed {TOLERANCE:.0e}); nothing was written. With few samples the new weights can be so large "
                "that rounding shows: give more, or `compensation: {ridge: 1e-3}`; otherwise please report the model"
            )
    return TwinResult(batch_sizes(feeds), TOLERANCE, max(worst.values(), default=0.0), differences)


def _watched(
    view: GraphView, blocks: Sequence[Block], new: Mapping[int, BlockWeights], decisions: Sequence[Decision]
) -> dict[str, int | None]:
    """Tensors to compare in graph order: branch outputs of changed blocks and scores, then the graph's outputs."""
    found: dict[str, int | None] = {name: None for d in decisions for name in d.scores if name in view.producer}
    for block in blocks:
        if block.index not in new:
            continue
        if block.attention is not None and block.attention.proj is not None:
            found[block.attention.proj.linear.output] = block.index
        if block.ffn is not None:
            found[block.ffn.fc2.output] = block.index
    ordered: dict[str, int | None] = dict(sorted(found.items(), key=lambda item: view.producer[item[0]]))
    ordered.update({o.name: None for o in view.model.proto.graph.output})
    return ordered


def _worst(
    names: Iterable[str], expected: Sequence[Mapping[str, np.ndarray]], actual: Sequence[Mapping[str, np.ndarray]]
) -> dict[str, float]:
    """The largest difference of every tensor over all runs; NaN where one holds no finite number."""
    pairs = list(zip(expected, actual, strict=True))
    # numpy's maximum keeps a NaN, the built-in one may drop it
    return {
        name: float(np.max([0.0, *(relative_difference(want[name], got[name]) for want, got in pairs)]))
        for name in names
    }


def relative_difference(want: np.ndarray, got: np.ndarray) -> float:
    """The largest difference of two arrays over the first one's largest magnitude; NaN where that is not finite."""
    if want.shape != got.shape:
        return float("inf")
    if want.dtype.kind not in "fc":
        return float((want != got).mean()) if want.size else 0.0
    finite = np.isfinite(want)
    if not np.array_equal(finite, np.isfinite(got)) or not np.array_equal(want[~finite], got[~finite], equal_nan=True):
        return float("inf")
    if not finite.any():
        return float("nan") if want.size else 0.0  # nothing was compared, so nothing was proven
    scale = max(float(np.abs(want[finite]).max()), float(np.finfo(np.float32).tiny))
    return float(np.abs(want[finite].astype(np.float64) - got[finite]).max()) / scale
