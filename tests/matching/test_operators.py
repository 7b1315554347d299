"""The table of operators against ONNX's own reference implementation: each is run, and does what its entry says."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx.defs
import onnx.helper
import pytest
from onnx.reference import ReferenceEvaluator

from toast_onnx.matching.operators import MOVEMENT, OPERATORS, RESHAPING, Effect, Trait, having, operators

#: Of ONNX Runtime, or newer than the reference.
CONTRIB = {"BiasGelu", "FastGelu", "QuickGelu", "SimplifiedLayerNormalization"} | operators(Effect.ADDS_AND_NORMS)
BOOLEAN = {"And", "Or", "Not"}
SHAPE = (3, 4, 5)
ATTRIBUTES: dict[str, dict[str, Any]] = {"Cast": {"to": onnx.TensorProto.FLOAT}, "Mod": {"fmod": 1}}


def known(*effects: Effect) -> list[str]:
    """Operators of some effects that the installed ONNX defines."""
    return sorted(op for op in operators(*effects) - CONTRIB if onnx.defs.has(op))


def run(op: str, inputs: list[np.ndarray], opset: int = 22, **attributes: Any) -> np.ndarray:
    names = [f"i{k}" for k in range(len(inputs))]
    info = [
        onnx.helper.make_tensor_value_info(n, onnx.helper.np_dtype_to_tensor_dtype(x.dtype), x.shape)
        for n, x in zip(names, inputs, strict=True)
    ]
    node = onnx.helper.make_node(op, names, ["y"], **(ATTRIBUTES.get(op, {}) | attributes))
    graph = onnx.helper.make_graph([node], "one", info, [onnx.ValueInfoProto(name="y")])
    opset = max(opset, onnx.defs.get_schema(op).since_version)
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", opset)])
    (made,) = ReferenceEvaluator(model).run(None, dict(zip(names, inputs, strict=True)))
    return np.asarray(made)


def operands(op: str) -> list[np.ndarray]:
    """As many as the operator needs, positive so that every one is defined there."""
    rng = np.random.default_rng(0)
    schema = onnx.defs.get_schema(op)
    count = max(schema.min_input, min(2, schema.max_input) if op in ("Max", "Min", "Sum") else 1)
    made = [rng.uniform(0.1, 0.9, SHAPE).astype(np.float32) for _ in range(count)]
    if op in BOOLEAN or op == "Where":
        made = [x > 0.5 if op in BOOLEAN or k == 0 else x for k, x in enumerate(made)]
    return made


@pytest.mark.parametrize("op", known(Effect.PASSES, Effect.KEEPS))
@pytest.mark.parametrize("axis", [0, 1, 2])
def test_what_keeps_an_axis_treats_each_place_alone(op: str, axis: int) -> None:
    given = operands(op)
    order = np.roll(np.arange(SHAPE[axis]), 1)
    before, after = run(op, given), run(op, [np.take(x, order, axis) for x in given])
    assert before.shape == SHAPE
    np.testing.assert_array_equal(after, np.take(before, order, axis))
    first = run(op, [np.take(x, [0], axis) for x in given])
    np.testing.assert_array_equal(first, np.take(before, [0], axis))


@pytest.mark.parametrize("op", known(Effect.PASSES))
def test_what_passes_changes_nothing(op: str) -> None:
    x = operands(op)[0]
    np.testing.assert_array_equal(run(op, [x]), x)


@pytest.mark.parametrize("op", known(Effect.SUMS, Effect.REDUCES))
def test_what_reduces_makes_one_of_an_axis(op: str) -> None:
    x = operands(op)[0]
    kept = run(op, [x, np.asarray([1])], keepdims=1)
    assert kept.shape == (3, 1, 5)
    np.testing.assert_allclose(run(op, [x[::-1], np.asarray([1])], keepdims=1), kept[::-1], rtol=1e-6)
    np.testing.assert_allclose(run(op, [x[:, ::-1], np.asarray([1])], keepdims=1), kept, rtol=1e-5)
    assert not np.array_equal(run(op, [x[:, :2], np.asarray([1])], keepdims=1), kept)


@pytest.mark.parametrize("op", known(Effect.NORMS))
def test_what_norms_mixes_its_axis_alone(op: str) -> None:
    x = operands(op)[0][:1]
    rest = [] if op == "LpNormalization" else [np.ones(SHAPE[-1], np.float32)]
    made = run(op, [x, *rest])
    np.testing.assert_allclose(run(op, [x[::-1], *rest]), made[::-1], rtol=1e-6)
    np.testing.assert_allclose(run(op, [x[:1], *rest]), made[:1], rtol=1e-6)
    assert not np.allclose(run(op, [x[..., :3], *(r[:3] for r in rest)]), made[..., :3])


MOVES: dict[str, tuple[list[Any], dict[str, Any]]] = {
    "Concat": ([], {"axis": 1}),
    "DepthToSpace": ([], {"blocksize": 2}),
    "Expand": ([[2, 1, 4, 2, 2]], {}),
    "Flatten": ([], {}),
    "Gather": ([[1, 0]], {"axis": 1}),
    "GatherElements": ([np.zeros((1, 4, 2, 2), int)], {"axis": 1}),
    "GatherND": ([[[0, 1], [0, 2]]], {}),
    "Reshape": ([[4, 4]], {}),
    "Slice": ([[1], [3], [1]], {}),
    "SpaceToDepth": ([], {"blocksize": 2}),
    "Squeeze": ([[0]], {}),
    "Tile": ([[2, 1, 1, 1]], {}),
    "Transpose": ([], {"perm": [3, 2, 1, 0]}),
    "Unsqueeze": ([[1]], {}),
}


@pytest.mark.parametrize("op", MOVES)
def test_what_moves_makes_no_new_number(op: str) -> None:
    x = np.arange(1, 17, dtype=np.float32).reshape(1, 4, 2, 2)
    more, attributes = MOVES[op]
    made = run(op, [x, *(np.asarray(v, np.int64) for v in more)], **attributes)
    assert op in MOVEMENT
    assert set(made.reshape(-1)) <= set(x.reshape(-1))
    assert (op in RESHAPING) == (made.shape != x.shape and np.array_equal(made.reshape(-1), x.reshape(-1)))


def test_what_joins_brings_more() -> None:
    x = np.ones((1, 2), np.float32)
    assert run("Concat", [x, 2 * x], axis=0).tolist() == [[1, 1], [2, 2]]
    assert run("Pad", [x, np.asarray([0, 0, 1, 0])]).tolist() == [[1, 1], [0, 0]]
    assert operators(Effect.JOINS) == {"Concat", "Pad"}


@pytest.mark.parametrize("op", known(Effect.SHARES))
def test_what_shares_adds_up_to_one(op: str) -> None:
    x = operands(op)[0]
    made = run(op, [x], axis=1)
    total = (np.exp(made) if op == "LogSoftmax" else made).sum(axis=1)
    np.testing.assert_allclose(total, np.ones_like(total), rtol=1e-5)


def test_what_norms_images_mixes_what_lies_behind_axis_1() -> None:
    rng = np.random.default_rng(0)
    x = rng.uniform(0.1, 0.9, (2, 4, 6)).astype(np.float32)
    ones = np.ones(4, np.float32)
    given: dict[str, tuple[list[np.ndarray], dict[str, Any]]] = {
        "GroupNormalization": ([ones, 0 * ones], {"num_groups": 2}),
        "InstanceNormalization": ([ones, 0 * ones], {}),
        "MeanVarianceNormalization": ([], {"axes": [0, 2]}),
        "BatchNormalization": ([ones, 0 * ones, 0 * ones, 2 * ones], {}),
    }
    assert set(given) == operators(Effect.NORMS_IMAGES, Effect.NORMS_CHANNELS)
    for op, (more, attributes) in given.items():
        made, behind = (run(op, [a, *more], **attributes) for a in (x, x[..., :3]))
        assert made.shape == x.shape
        alone = OPERATORS[op] == Effect.NORMS_CHANNELS  # by stored numbers: no other element counts
        assert np.allclose(made[..., :3], behind) == alone


@pytest.mark.parametrize("op", known(Effect.MEASURES))
def test_what_measures_reads_no_element(op: str) -> None:
    x = operands(op)[0]
    np.testing.assert_array_equal(run(op, [x]), run(op, [0 * x]))


@pytest.mark.parametrize("op", sorted(having(Trait.LINEAR)))
def test_what_is_linear_is_so_in_each_operand(op: str) -> None:
    given = operands(op)
    base = run(op, given)
    for k in range(len(given) if op != "Div" else 1):
        more = [-3 * x if j == k else x for j, x in enumerate(given)]
        zero = [0 * x if j == k else x for j, x in enumerate(given)]
        np.testing.assert_allclose(run(op, more) - run(op, zero), -3 * (base - run(op, zero)), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("op", sorted(having(Trait.SCALES) - {"IsNaN"}))
def test_what_scales_takes_a_sum_as_its_addends(op: str) -> None:
    given = operands(op)
    first = 1 if op == "Where" else 0  # its first operand is a condition
    again = [3 * x if k == first else 0 * x if op == "Where" and k == 2 else x for k, x in enumerate(given)]
    once = [0 * x if op == "Where" and k == 2 else x for k, x in enumerate(given)]
    np.testing.assert_allclose(run(op, again), 3 * run(op, once), rtol=1e-5)


@pytest.mark.parametrize("op", sorted(having(Trait.COMPARES)))
def test_what_compares_answers_yes_or_no(op: str) -> None:
    x = operands(op)[0]
    made = run(op, [x, x + 1])
    assert made.dtype == bool
    assert set(made.reshape(-1).tolist()) == {"Less" in op}


@pytest.mark.parametrize("op", sorted(having(Trait.GUARDS)))
def test_what_guards_leaves_no_length_at_zero(op: str) -> None:
    lengths, least = np.asarray([0.0, 2.0], np.float32), np.asarray(1e-3, np.float32)
    np.testing.assert_allclose(run(op, [lengths, least]), [1e-3, 2], rtol=1e-3)


@pytest.mark.parametrize("op", sorted(set(known(Effect.DRAWS)) - {"Multinomial"}))  # which the reference lacks
def test_what_draws_is_not_the_same_twice(op: str) -> None:
    half = np.full((1, 64), 0.5, np.float32)
    given: dict[str, Any] = {"shape": [64]} if op in ("RandomNormal", "RandomUniform") else {}
    first, second = (run(op, [] if given else [half], seed=float(seed), **given) for seed in (1, 2))
    assert not np.array_equal(first, second)


@pytest.mark.parametrize("op", sorted(having(Trait.TAKES_LARGEST)))
def test_what_takes_the_largest_keeps_channels_apart(op: str) -> None:
    x = np.random.default_rng(0).standard_normal((1, 3, 2, 2)).astype(np.float32)
    made = run(op, [x], kernel_shape=[2, 2]) if op == "MaxPool" else run(op, [x, np.asarray([2, 3])])
    np.testing.assert_array_equal(made.reshape(3), x.reshape(3, 4).max(axis=1))


def test_every_operator_stands_once() -> None:
    from toast_onnx.matching.operators import _TABLE

    assert sum(len(names.split()) for names in _TABLE.values()) == len(OPERATORS)


def test_traits_tell_operators_of_the_table_apart() -> None:
    assert all(having(trait) <= set(OPERATORS) for trait in Trait)
    assert having(Trait.RESPELLS) < having(Trait.CUTS) < MOVEMENT
