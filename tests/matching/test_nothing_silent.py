"""What is no block is named with its reason, and nodes that compute nothing stand in nobody's way."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx.helper
import pytest
import torch
from torch import nn
from torch.nn import functional

from tests.matching.small_exports import EXPORTERS, export, randomised
from tests.matching.tiny import TOKENS, WIDTH, Bend, Graph, block
from tests.pruning import UNEVEN, look, prune_file, run, worst
from toast_onnx.reasons import Kind


def _add_zero(graph: Graph, name: str) -> str:
    return graph.add("Add", name, graph.constant(0, np.float32))


def _subtract_zeros(graph: Graph, name: str) -> str:
    return graph.add("Sub", name, graph.constant([[0.0]], np.float32))


def _times_one(graph: Graph, name: str) -> str:
    return graph.add("Mul", graph.constant(1, np.float32), name)


def _double_cast(graph: Graph, name: str) -> str:
    return graph.add("Cast", graph.add("Cast", name, to=onnx.TensorProto.DOUBLE), to=onnx.TensorProto.FLOAT)


@pytest.mark.parametrize("where", ["q", "k", "v", "context"])
@pytest.mark.parametrize("nothing", [_add_zero, _subtract_zeros, _times_one, _double_cast])
def test_what_computes_nothing_is_nothing(nothing: Bend, where: str, tmp_path: Path) -> None:
    """Paddle's `scale` adds zero to the queries."""
    graph, y = block(**{where: nothing})
    path = graph.save(tmp_path / "model.onnx", y)
    (found,) = look(path).match.blocks
    assert found.attention is not None
    assert (found.attention.qk_reason, found.attention.vo_reason) == (None, None)
    _, pruned = prune_file(path, UNEVEN)
    assert pruned.twin is not None
    assert pruned.twin.worst < 1e-5
    prune_file(path, {"version": 1, "ffn": {"fc2": 0}}, tmp_path / "same.onnx")
    feeds = {"x": np.random.default_rng(0).standard_normal((2, TOKENS, WIDTH)).astype(np.float32)}
    assert worst(run(tmp_path / "same.onnx", feeds), run(path, feeds)) < 1e-6


def test_probabilities_that_weigh_no_values_are_named(tmp_path: Path) -> None:
    """Scores of two activations whose softmax goes out as it is."""
    graph, y = block()
    keys = graph.add("Transpose", y, perm=[0, 2, 1])
    apart = graph.add("Softmax", graph.add("MatMul", y, keys), name="apart")
    graph.also_output(apart, "batch", TOKENS, TOKENS)
    (entry,) = look(graph.save(tmp_path / "model.onnx", y)).match.declined.items()
    assert entry[0] == "'apart' (Softmax)"
    assert entry[1].kind == Kind.NO_ATTENTION
    assert str(entry[1]) == "the probabilities of this Softmax weigh no values: no product takes them up"


def test_a_classifiers_softmax_is_no_attention(tmp_path: Path) -> None:
    graph, y = block()
    graph.also_output(graph.add("Softmax", graph.linear(y, WIDTH, 3, "head")), "batch", TOKENS, 3)
    assert look(graph.save(tmp_path / "model.onnx", y)).match.declined == {}


def test_an_einsum_that_is_no_matrix_product_is_named(tmp_path: Path) -> None:
    """Scores of three operands: whatever it is, it is said."""
    graph, y = block()
    scores = graph.add("Einsum", y, y, y, name="three", equation="bnd,bmd,bkd->bnm")
    graph.also_output(
        graph.add("MatMul", graph.add("Softmax", scores, name="odd"), y, name="after"), "batch", TOKENS, WIDTH
    )
    (entry,) = look(graph.save(tmp_path / "model.onnx", y)).match.declined.items()
    assert entry[0] == "'odd' (Softmax)"
    assert "the scores come from 'three' (Einsum)" in str(entry[1])


def test_blocks_inside_a_condition_are_named(tmp_path: Path) -> None:
    graph, y = block()
    model = onnx.load(graph.save(tmp_path / "inner.onnx", y))
    inner, info = model.graph, onnx.helper.make_tensor_value_info
    then = onnx.helper.make_graph(list(inner.node), "then", [], [info(y, 1, None)], list(inner.initializer))
    same = onnx.helper.make_graph(
        [onnx.helper.make_node("Identity", ["x"], ["same"])], "else", [], [info("same", 1, None)]
    )
    nodes = [
        onnx.helper.make_node("Size", ["x"], ["size"]),
        onnx.helper.make_node("Greater", ["size", "none"], ["some"]),
        onnx.helper.make_node("If", ["some"], ["y"], name="wrap", then_branch=then, else_branch=same),
    ]
    none = onnx.numpy_helper.from_array(np.array(0), "none")
    outer = onnx.helper.make_graph(nodes, "outer", list(inner.input), [info("y", 1, ["batch", TOKENS, WIDTH])], [none])
    onnx.save(onnx.helper.make_model(outer, opset_imports=model.opset_import, ir_version=9), tmp_path / "model.onnx")
    (entry,) = look(tmp_path / "model.onnx").match.declined.items()
    assert entry[0] == "'wrap' (If)"
    assert entry[1].kind == Kind.BODY
    assert entry[1].values == {"operator": "If", "products": 8, "softmaxes": 1}
    assert "its body holds 8 matrix products and 1 attentions or softmaxes" in str(entry[1])


class Unnormed(nn.Module):
    """Three activations multiplied one after another without the operator Softmax, as people write it."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.norm, self.qkv, self.proj = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (t.unflatten(-1, (2, -1)).transpose(1, 2) for t in self.qkv(self.norm(x)).chunk(3, -1))
        if self.kind == "linear":
            context = functional.elu(q).add(1) @ (functional.elu(k).add(1).transpose(-2, -1) @ v)
        else:
            scores = q @ k.transpose(-2, -1)
            if self.kind == "one":  # one more in the sum: no softmax
                weights = scores.exp() / (1 + scores.exp().sum(-1, keepdim=True))
            else:
                weights = {"sigmoid": scores.sigmoid(), "relu": scores.relu()}[self.kind]
            context = torch.einsum("bhij,bhjd->bhid", weights, v) if self.kind == "relu" else weights @ v
        result: torch.Tensor = x + self.proj(context.transpose(1, 2).flatten(2))
        return result


@pytest.mark.parametrize("exporter", EXPORTERS)
@pytest.mark.parametrize("kind", ["linear", "one", "sigmoid", "relu"])
def test_attention_without_a_softmax_is_named(kind: str, exporter: str, tmp_path: Path) -> None:
    path = export(randomised(Unnormed(kind)), torch.randn(1, TOKENS, WIDTH), tmp_path / "model.onnx", exporter)
    match = look(path).match
    assert match.blocks == ()
    (reason,) = match.declined.values()
    assert reason.kind == Kind.NO_ATTENTION
    assert "no Softmax lies between" in str(reason)


def test_linear_attention_with_a_softmax_of_its_own_is_named_once(tmp_path: Path) -> None:
    class Efficient(Unnormed):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            q, k, v = (t.unflatten(-1, (2, -1)).transpose(1, 2) for t in self.qkv(self.norm(x)).chunk(3, -1))
            context = q @ (k.softmax(-2).transpose(-2, -1) @ v)
            result: torch.Tensor = x + self.proj(context.transpose(1, 2).flatten(2))
            return result

    path = export(randomised(Efficient("")), torch.randn(1, TOKENS, WIDTH), tmp_path / "model.onnx")
    ((label, _),) = look(path).match.declined.items()
    assert "Softmax" in label
