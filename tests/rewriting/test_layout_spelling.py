"""Layouts read from labels and written again: random movement of random tensors, against numpy and ONNX Runtime.

The movement is drawn as a user's exporter might write it: leading axes split and merged, heads and dimensions packed in
either order, axes transposed. `read_layout` sees nothing but where the labels went; `spread` and `collect` write nodes.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnx.helper
import onnx.numpy_helper
import onnxruntime as ort
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from toast_onnx.edit import GraphEdit
from toast_onnx.errors import MatchError
from toast_onnx.matching.graph import GraphView
from toast_onnx.matching.layout import Layout, check_spelling, read_layout
from toast_onnx.matching.probe import Decline
from toast_onnx.model import Model
from toast_onnx.rewriting.spelling import collect, spread


@dataclass(frozen=True)
class Movement:
    """How a linear layer's output (batch, rows * columns, channels) reaches an operand.

    Attributes:
        rows, columns: the tokens form a grid that may be split into both; columns do not change with the input.
        heads, dim: the channels.
        dims_first: whether a channel's number is dimension * heads + head, not head * dim + dimension.
        order: transposition of (batch, rows, columns, heads) in front of the dimensions.
        merge: how many of the leading axes become one.
        part: 0, 1, 2 for Q, K or V of a packed layer.
    """

    rows: int
    columns: int
    heads: int
    dim: int
    dims_first: bool
    order: tuple[int, ...]
    merge: int
    part: int

    def apply(self, x: np.ndarray, dim: int) -> np.ndarray:
        """The operand from (batch, tokens, heads * dim) whose channels are ordered (head, dimension)."""
        batch, columns = x.shape[0], self.columns
        grid = x.reshape(batch, -1, columns, self.heads, dim)
        moved = grid.transpose(*self.order, 4)
        return moved.reshape(-1, *moved.shape[self.merge :])

    def columns_of(self, channel: np.ndarray) -> np.ndarray:
        """Reorder (..., channels of this part) to (head, dimension) order."""
        if self.dims_first:
            shape = channel.shape[:-1]
            channel = channel.reshape(*shape, self.dim, self.heads).swapaxes(-1, -2).reshape(*shape, -1)
        return channel

    def labels(self, batch: int, rows: int) -> tuple[np.ndarray, tuple[int, ...]]:
        """Labels of the operand for a packed layer with three parts, and the layer's shape."""
        width = self.heads * self.dim
        shape = (batch, rows * self.columns, 3 * width)
        numbers = np.arange(1, int(np.prod(shape)) + 1).reshape(shape)
        mine = numbers[..., self.part * width : (self.part + 1) * width]
        return self.apply(self.columns_of(mine), self.dim), shape


@st.composite
def movements(draw: st.DrawFn) -> Movement:
    """Any movement whose dynamic axes (batch, rows) are not merged with what follows them in another order."""
    order = tuple(draw(st.permutations(range(4))))
    return Movement(
        rows=draw(st.integers(2, 4)),
        columns=draw(st.integers(1, 3)),
        heads=draw(st.integers(2, 4)),
        dim=draw(st.integers(2, 5)),
        dims_first=draw(st.booleans()),
        order=order,
        merge=draw(st.integers(1, 3)),
        part=draw(st.integers(0, 2)),
    )


def layout_of(movement: Movement, dynamic: bool) -> Layout:
    """What `read_layout` says, with other sizes of batch and rows where they are dynamic."""
    labels, shape = movement.labels(2, movement.rows)
    other, other_shape = movement.labels(3, movement.rows + 2) if dynamic else (labels, shape)
    return read_layout(labels, shape, other_shape, other.shape, 2, -1, "Q")


def run(layout: Layout, write: object, x: np.ndarray, dim: int) -> np.ndarray:
    """Run the nodes that `spread` or `collect` write on an array of any shape."""
    info = onnx.helper.make_tensor_value_info
    nodes = [onnx.helper.make_node("Identity", ["x"], ["y"], name="last")]
    graph = onnx.helper.make_graph(
        nodes, "g", [info("x", onnx.TensorProto.FLOAT, [None] * x.ndim)], [info("y", onnx.TensorProto.FLOAT, None)]
    )
    opsets = [onnx.helper.make_opsetid("", 17)]
    model = Model(onnx.helper.make_model(graph, opset_imports=opsets, ir_version=9), Path("model.onnx"))
    edit = GraphEdit(GraphView(model))
    made = write(edit, 0, "x", layout, dim, "moved")  # type: ignore[operator]
    edit.remove([0])
    edit.emit(0, "Identity", [made], "y", "end")
    written = edit.apply()
    for tensor in written.proto.graph.initializer:
        tensor.CopyFrom(onnx.numpy_helper.from_array(written.arrays[tensor.name], tensor.name))
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(written.proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    result: np.ndarray = session.run(None, {"x": x})[0]
    return result


def run_if_possible(layout: Layout, write: object, x: np.ndarray, dim: int) -> np.ndarray | None:
    """As `run`; None where a product of two sizes that only run time knows would have to be taken apart.

    `check_spelling` must say so when blocks are looked for, not only when they are written.
    """
    try:
        check_spelling(layout, "Q", backwards=write is collect)
    except Decline:
        with pytest.raises(MatchError, match="two dynamic extents"):
            run(layout, write, x, dim)
        return None
    return run(layout, write, x, dim)


@settings(max_examples=150, deadline=None)
@given(movement=movements(), dynamic=st.booleans(), new_dim=st.integers(1, 6), batch=st.integers(1, 3))
def test_spread_moves_as_the_original_and_collect_moves_back(
    movement: Movement, dynamic: bool, new_dim: int, batch: int
) -> None:
    """With another head_dim than the one that was read, and at sizes that were never probed."""
    try:
        layout = layout_of(movement, dynamic)
    except Decline:
        if dynamic:  # a dynamic axis may be split and merged at once
            return
        raise
    width = movement.heads * movement.dim
    start = movement.part * width
    expected = movement.columns_of(np.arange(start, start + width)).reshape(movement.heads, movement.dim)
    assert np.array_equal(layout.channels, expected)
    rows = movement.rows + 1 if dynamic else movement.rows
    batch = batch if dynamic else 2
    shape = (batch, rows * movement.columns, movement.heads * new_dim)
    x = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
    moved = run_if_possible(layout, spread, x, new_dim)
    if moved is None:
        assert dynamic
        return
    assert np.array_equal(moved, movement.apply(x, new_dim))
    back = run_if_possible(layout, collect, moved, new_dim)
    assert np.array_equal(back, x) if back is not None else dynamic


def test_the_usual_ways_are_understood_with_dynamic_axes() -> None:
    """Batch and tokens free: (batch, heads, tokens, dim), and heads folded into the batch."""
    for order, merge in (((0, 3, 1, 2), 1), ((0, 3, 1, 2), 2), ((0, 1, 2, 3), 1)):
        movement = Movement(3, 1, 2, 4, False, order, merge, 0)
        layout = layout_of(movement, dynamic=True)
        x = np.random.default_rng(0).standard_normal((5, 7, 2 * 3)).astype(np.float32)
        moved = run(layout, spread, x, 3)
        assert np.array_equal(moved, movement.apply(x, 3))
        assert np.array_equal(run(layout, collect, moved, 3), x)


@pytest.mark.parametrize("spoil", ["lost", "twice", "swapped"])
def test_labels_that_follow_no_pattern_are_declined(spoil: str) -> None:
    movement = Movement(3, 2, 2, 4, False, (0, 3, 1, 2), 1, 1)
    labels, shape = movement.labels(2, 3)
    labels = np.ascontiguousarray(labels)
    flat = labels.reshape(-1)
    if spoil == "lost":
        flat[7] = 0
    elif spoil == "twice":
        flat[7] = flat[3]
    else:
        flat[[1, -1]] = flat[[-1, 1]]
    with pytest.raises(Decline):
        read_layout(labels, shape, shape, labels.shape, 2, -1, "Q")
