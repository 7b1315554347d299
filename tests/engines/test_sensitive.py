"""Which nodes stay in float32: norms in every spelling, and nothing that only looks like one."""

from __future__ import annotations

import numpy as np
import onnx
import pytest

from tests.engines import graphs
from toast_onnx.engines.sensitive import ops_without, spelled_out_norms

EPS = {"eps": np.array(1e-6, np.float32), "two": np.array(2, np.float32), "one": np.array([1])}


def found(nodes: str) -> set[str]:
    """Operators of the nodes found; each node is named after its output."""
    proto = graphs.model(nodes, EPS, opset=17)
    for node in proto.graph.node:
        node.name = node.output[0]
    return spelled_out_norms(proto.graph)


@pytest.mark.parametrize(
    ("nodes", "names"),
    [
        pytest.param(
            "m = ReduceMean (x) d = Sub (x, m) p = Pow (d, two) v = ReduceMean (p) e = Add (v, eps) s = Sqrt (e) "
            "n = Div (d, s) y = Mul (n, x)",
            {"m", "d", "p", "v", "e", "s", "n"},
            id="layer norm",
        ),
        pytest.param(
            "p = Mul (x, x) v = ReduceMean (p) e = Add (eps, v) s = Sqrt (e) r = Reciprocal (s) y = Mul (x, r)",
            {"p", "v", "e", "s", "r"},
            id="RMS norm",
        ),
        pytest.param(
            "l = ReduceL2 <axes = [-1]> (x) c = Clip (l, eps) s = Shape (x) e = Expand (c, s) y = Div (x, e)",
            {"l", "c", "e", "y"},
            id="L2 norm of cosine attention",
        ),
        pytest.param(
            "t = Transpose <perm = [0, 2, 1]> (x) p = Mul (t, t) v = ReduceMean <axes = [1], keepdims = 0> (p) "
            "u = Unsqueeze (v, one) e = Add (u, eps) s = Sqrt (e) n = Div (t, s) y = Transpose <perm = [0, 2, 1]> (n)",
            {"p", "v", "u", "e", "s", "n"},
            id="permuted norm that drops its axis",
        ),
        pytest.param(
            "f = Cast <to = 1> (x) p = Pow (f, two) v = ReduceMean (p) e = Add (v, eps) s = Sqrt (e) "
            "c = Cast <to = 1> (s) r = Reciprocal (c) n = Mul (f, r) y = Cast <to = 1> (n)",
            {"p", "v", "e", "s", "c", "r"},
            id="RMS norm with casts",
        ),
    ],
)
def test_norms_are_found(nodes: str, names: set[str]) -> None:
    assert found(nodes) == names


@pytest.mark.parametrize(
    "nodes",
    [
        pytest.param("m = ReduceMean (x) y = Mul (m, x)", id="mean pooling"),
        pytest.param("m = ReduceMean (x) a = Add (m, x) y = Div (a, two)", id="a residual sum"),
        pytest.param("s = Sqrt (two) y = Div (x, s)", id="the scale of attention"),
    ],
)
def test_other_nodes_are_left_alone(nodes: str) -> None:
    assert found(nodes) == set()


def test_types_come_from_the_graphs_own_opset() -> None:
    kernel = {"k": np.ones((3, 3, 1, 1), np.float32)}
    old, new = (graphs.model("y = Conv (x, k)", kernel, opset=o, x="float[n, 3, 8, 8]") for o in (17, 22))
    assert ops_without(old, "tensor(bfloat16)") == {"Conv"}
    assert ops_without(new, "tensor(bfloat16)") == set()
    assert ops_without(old, "tensor(float16)") == set()


def test_operators_of_unknown_domains_are_left_to_the_converter() -> None:
    node = onnx.helper.make_node("Mystery", ["x"], ["y"], domain="com.example")
    proto = onnx.helper.make_model(onnx.helper.make_graph([node], "g", [], []))
    assert ops_without(proto, "tensor(float16)") == set()
