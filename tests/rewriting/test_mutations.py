"""The proof against a rewriting that is wrong: every mutation of its code is caught, on a graph that reaches it."""

from __future__ import annotations

import inspect
import textwrap
from collections.abc import Callable
from pathlib import Path
from types import FunctionType
from typing import Any

import numpy as np
import pytest

from tests.matching.test_dims import HALF_QK, gathered, halves, interleaved, split_halves, with_table
from tests.matching.test_dims import attention as turning
from tests.matching.test_fused import fused
from tests.matching.test_heads import CUT
from tests.matching.tiny import HEADS, HIDDEN, TOKENS, WIDTH, Graph, block
from tests.pruning import prune_file
from toast_onnx import edit
from toast_onnx.errors import ToastError
from toast_onnx.rewriting import attention, drop_heads, ffn, fusing, shapes, shrinking, spelling

PLAIN = {"align": 1, "compensation": {"kind": "none"}, "version": 1}
BOTH: dict[str, Any] = PLAIN | {
    "attention": {"qk": 0.5, "vo": 0.25, "select": "index", "score": "l2"},
    "ffn": {"fc1": 0.25, "fc2": 0.5, "score": "l2"},
}
ONLY_QK: dict[str, Any] = PLAIN | {"attention": {"qk": 0.5, "select": "index", "score": "l2"}}
FFN: dict[str, Any] = PLAIN | {"ffn": {"fc2": 0.5, "score": "l2"}}
ONE_HEAD: dict[str, Any] = PLAIN | {"attention": {"heads": 0.5, "select": "index", "score": "l2"}}


def saved(ratios: dict[str, Any], **bends: Any) -> Callable[[Path], dict[str, Any]]:
    def make(path: Path) -> dict[str, Any]:
        graph, y = block(**bends)
        graph.save(path, y)
        return ratios

    return make


def rotary(turn: Any) -> Callable[[Path], dict[str, Any]]:
    def make(path: Path) -> dict[str, Any]:
        turning(path, turn)
        return HALF_QK

    return make


def one_node(spelling: str, ratios: dict[str, Any]) -> Callable[[Path], dict[str, Any]]:
    def make(path: Path) -> dict[str, Any]:
        fused(path, spelling)
        return ratios

    return make


def gain(graph: Graph, name: str) -> str:
    return graph.add("Mul", name, graph.random(HIDDEN))


def computed_gain(graph: Graph, name: str) -> str:
    return graph.add("Mul", name, graph.add("Sigmoid", graph.random(HIDDEN)))


def gated(halves_of: Callable[[Graph, str], tuple[str, str]]) -> Callable[[Path], dict[str, Any]]:
    """A network of one layer whose first half of outputs is gated by the second."""

    def make(path: Path) -> dict[str, Any]:
        g = Graph()
        low, high = halves_of(g, g.linear(g.norm("x"), WIDTH, HIDDEN, "fc1"))
        hidden = g.add("Mul", low, g.add("Sigmoid", high))
        g.save(path, g.add("Add", "x", g.linear(hidden, HIDDEN // 2, WIDTH, "fc2")))
        return FFN

    return make


def inner_split(graph: Graph, name: str) -> tuple[str, str]:
    low = graph.add("Split", name, graph.constant([HIDDEN // 2] * 2), outputs=2, axis=-1)
    return low, f"{low}_1"


def inner_slice(graph: Graph, name: str) -> tuple[str, str]:
    bounds = ((0, HIDDEN // 2), (HIDDEN // 2, HIDDEN))
    low, high = (graph.add("Slice", name, *(graph.constant([v]) for v in (a, b, 2))) for a, b in bounds)
    return low, high


def inner_gather(graph: Graph, name: str) -> str:
    order = np.random.default_rng(0).permutation(HIDDEN)
    return graph.add("Gather", name, graph.constant(order), axis=-1)


def shared_weight(graph: Graph, name: str) -> str:
    """Behind the block once more the weight of Q, which two layers read."""
    weight = next(n.input[1] for n in graph.nodes if n.name == "q/MatMul")
    return graph.add("MatMul", name, weight)


def divided_by_its_width(graph: Graph, name: str) -> str:
    """By a number that is computed from the extent of the hidden units, as exporters write it."""
    extent = graph.add("Slice", graph.add("Shape", name), *(graph.constant([v]) for v in (2, 3)))
    return graph.add("Div", name, graph.add("Sqrt", graph.add("Cast", extent, to=1)))


def read_by_a_table(graph: Any, name: str) -> str:
    return with_table(graph, name, "einsum")


def position_bias(graph: Graph, name: str) -> str:
    return graph.add("Add", name, graph.random(1, HEADS, TOKENS, TOKENS))


def scaled(graph: Graph, name: str) -> str:
    return graph.add("Mul", name, graph.constant(0.7, np.float32))


#: What is mutated, the text in it and what it becomes, and a graph that is wrong for it with its ratios.
MUTATIONS: dict[str, tuple[Any, str, str, Callable[[Path], dict[str, Any]]]] = {
    "q and k in the other's place": (
        attention.rewrite_attention,
        "new.heads.get(part) or",
        'new.heads.get({"q": "k", "k": "q"}.get(part, part)) or',
        saved(ONLY_QK),
    ),
    "a part left unwritten": (attention.rewrite_attention, "new.heads.get(part) or", "None or", saved(BOTH)),
    "the projection left out": (attention.rewrite_attention, "new.proj is not None", "False", saved(BOTH)),
    "an untouched part with its heads in another order": (
        attention.head_weights,
        "w[:, channels]",
        "w[:, channels[::-1]]",
        one_node("attention", ONLY_QK),
    ),
    "biases in another order": (
        attention._packed_linear,
        "for p in group]\n    has_bias",
        "for p in group[::-1]]\n    has_bias",
        saved(BOTH),
    ),
    "weights in another order": (
        attention._packed_linear,
        ".astype(dtype) for p in group]\n    vectors",
        ".astype(dtype) for p in group[::-1]]\n    vectors",
        saved(BOTH),
    ),
    "no bias": (attention._packed_linear, "if has_bias else None", "if not has_bias else None", saved(BOTH)),
    "the split names the parts backwards": (
        attention._packed_linear,
        "return output, names",
        "return output, names[::-1]",
        saved(PLAIN | {"attention": {"qk": 0.5, "select": "index", "score": "l2"}}),
    ),
    "a scale left out": (attention._write_operand, "walk.scale != 1.0", "False", saved(ONLY_QK, q=scaled)),
    "a scale squared": (
        attention._write_operand,
        "np.asarray(walk.scale, dtype)",
        "np.asarray(walk.scale**2, dtype)",
        saved(ONLY_QK, q=scaled),
    ),
    "the fused scale follows the new dimension": (
        attention._freeze_fused_scale,
        "scale == 0.0",
        "False",
        one_node("plain", ONLY_QK),
    ),
    "the fused scale of the new dimension": (
        attention._freeze_fused_scale,
        "np.sqrt(attention.qk_dim)",
        "np.sqrt(attention.qk_dim - 2)",
        one_node("plain", ONLY_QK),
    ),
    "the projection's rows in another order": (
        attention._write_projection,
        "new.proj.weight.reshape",
        "new.proj.weight[::-1].reshape",
        saved(BOTH),
    ),
    "the projection without bias": (attention._write_projection, "b if has_bias else None", "None", saved(BOTH)),
    "rotary tables skipped": (
        attention._shrink_region,
        "for table in region.tables",
        "for table in ()",
        rotary(read_by_a_table),
    ),
    "rotary tables wrong": (
        attention._shrink_region,
        "table.axis, kept)",
        "table.axis, kept[::-1])",
        rotary(read_by_a_table),
    ),
    "rotary nodes skipped": (
        attention._shrink_region,
        "for i in region.nodes",
        "for i in region.nodes[:0]",
        rotary(halves),
    ),
    "rotary pairs wrong": (
        attention._shrink_region,
        "attention.units[q.slots[0]]",
        "attention.units[q.slots[0]][:1]",
        rotary(interleaved),
    ),
    "a gather of dimensions not renumbered": (
        shrinking._shrink_gather,
        "renumbered[indices[kept[indices]]]",
        "indices[kept[indices]]",
        rotary(gathered),
    ),
    "a split of dimensions of old sizes": (
        shrinking._shrink_split,
        "np.asarray(sizes, np.int64)",
        "np.asarray([2 * s for s in sizes], np.int64)",
        rotary(split_halves),
    ),
    "slices of dimensions not moved": (
        shrinking._shrink_slice,
        "starts[k], ends[k], steps[k] = _bounds",
        "_ = _bounds",
        rotary(halves),
    ),
    "fc1's inputs not gathered": (
        ffn._gather,
        "indices.astype(np.int64)",
        "np.sort(indices)[::-1].astype(np.int64)",
        saved(BOTH),
    ),
    "fc1's bias of other units": (
        ffn._replace,
        "np.delete(b, layer.gone)",
        "np.delete(b, b.size - 1 - layer.gone)",
        saved(FFN),
    ),
    "fc1's weights of other units": (
        ffn._replace,
        "np.delete(w, layer.gone, axis=1)",
        "np.delete(w, w.shape[1] - 1 - layer.gone, axis=1)",
        saved(FFN),
    ),
    "nodes between fc1 and fc2 skipped": (
        ffn.rewrite_ffn,
        "for i in ffn.nodes",
        "for i in ffn.nodes[:0]",
        saved(FFN, activated=gain),
    ),
    "fc2 without bias": (ffn._replace, "if has_bias else None", "if False else None", saved(FFN)),
    "units in another order": (
        ffn.rewrite_ffn,
        "mask[new.units] = True",
        "mask[mask.size - 1 - new.units] = True",
        saved(FFN, activated=gain),
    ),
    "a gain of other units": (
        shrinking.shrunk_operand,
        "np.compress(kept,",
        "np.compress(kept[::-1],",
        saved(FFN, activated=gain),
    ),
    "a computed operand of other units": (
        shrinking.shrunk_operand,
        "np.flatnonzero(kept)",
        "np.flatnonzero(kept[::-1])",
        saved(FFN, activated=computed_gain),
    ),
    "an inner split of wrong sizes": (
        shrinking._shrink_movement,
        "[int(keep[o].sum()) for o in node.output]",
        "[int(keep[o].sum()) + (-1) ** k for k, o in enumerate(node.output)]",
        gated(inner_split),
    ),
    "an inner slice not moved": (
        shrinking._shrink_slice,
        "starts[k], ends[k], steps[k] = _bounds",
        "_ = _bounds",
        gated(inner_slice),
    ),
    "an inner gather of other units": (
        shrinking._shrink_gather,
        "renumbered[indices[kept[indices]]]",
        "renumbered[indices[kept[indices]]][::-1]",
        saved(FFN, hidden=inner_gather),
    ),
    "a reshape of the old width": (
        shrinking._shrink_reshape,
        "np.where(fixed, width, target)",
        "target",
        rotary(interleaved),
    ),
    "a shared initializer changed for all": (
        edit.GraphEdit._weight,
        "self._view.consumers.get(old) == [reader] and old not in self._arrays",
        "True",
        saved(BOTH, end=shared_weight),
    ),
    "another head stays": (
        attention._write_operand,
        "layout.with_heads(part.weights.heads)",
        "layout",
        saved(ONE_HEAD),
    ),
    "the bias of another head": (
        drop_heads._cut_node,
        "where.axis, stays)",
        "where.axis, stays[::-1])",
        saved(ONE_HEAD, scores=position_bias),
    ),
    "the number of heads of a fused node": (drop_heads._cut_node, "a.i == heads", "False", one_node("plain", ONE_HEAD)),
    "a target of the old number of heads": (
        drop_heads._cut_target,
        "target // heads * kept",
        "target",
        saved(ONE_HEAD, scores=CUT["heads counted with the batch"][1]),
    ),
    "regions of heads skipped": (
        drop_heads.drop_heads,
        "for i in region.nodes",
        "for i in ()",
        saved(ONE_HEAD, scores=position_bias),
    ),
    "sizes of a fused node": (
        fusing._fuse_attention,
        'make_attribute("qkv_hidden_sizes", sizes)',
        'make_attribute("qkv_hidden_sizes", sizes[::-1])',
        one_node("attention", PLAIN | {"attention": {"qk": 0.5, "vo": 0.25, "select": "index", "score": "l2"}}),
    ),
    "the scale of a fused node dropped": (
        fusing._fuse_attention,
        "scale is not None",
        "False",
        one_node("attention", ONLY_QK),
    ),
    "shapes not settled": (
        shapes.settle_shapes,
        "original and",
        "False and",
        saved(FFN, activated=divided_by_its_width),
    ),
    "heads not moved back": (
        spelling.collect,
        "target.index(f) for f in source",
        "source.index(f) for f in source",
        saved(BOTH),
    ),
    "heads and tokens in each other's place": (
        spelling.spread,
        "source.index(f) for f in target",
        "source.index(f) for f in source",
        saved(BOTH),
    ),
    "a transpose left out": (spelling._transpose, "order == sorted(order)", "True", saved(BOTH)),
}


def mutate(monkeypatch: pytest.MonkeyPatch, function: FunctionType, old: str, new: str) -> None:
    """Give a function the code of its changed text, wherever it was imported."""
    text = textwrap.dedent(inspect.getsource(function))
    assert text.count(old) == 1, f"{function.__qualname__} holds this {text.count(old)} times: {old}"
    names: dict[str, Any] = {}
    exec(
        compile("from __future__ import annotations\n" + text.replace(old, new), "mutated", "exec"),
        function.__globals__,
        names,
    )
    monkeypatch.setattr(function, "__code__", names[function.__name__].__code__)


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_mutation_is_caught(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    function, old, new, make = MUTATIONS[name]
    path = tmp_path / "model.onnx"
    ratios = make(path)
    _, right = prune_file(path, ratios, tmp_path / "right.onnx", split_shared=True)
    assert right.twin is not None
    assert right.weights
    mutate(monkeypatch, function, old, new)
    with pytest.raises((ToastError, AssertionError, ValueError, IndexError)):
        prune_file(path, ratios, tmp_path / "wrong.onnx", split_shared=True)
    assert not (tmp_path / "wrong.onnx").exists()
