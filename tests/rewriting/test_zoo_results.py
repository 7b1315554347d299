"""What the pruned graphs of the zoo are to others: valid, with the old interface, the same outside the blocks, and read
by TensorRT's parser wherever the dense graph is."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
import pytest

from tests import zoo
from tests.pruning import UNEVEN, prune_file
from toast_onnx.matching.graph import GraphView
from toast_onnx.matching.linear import Linear
from toast_onnx.matching.study import Study
from toast_onnx.model import load_model

Exported = Callable[[zoo.Case], Path]

#: Fused `Attention` nodes are an exporter's matter, and so are aftermaths: one family each.
OTHER = [
    zoo.Case("hf-vit", "dynamo-23"),
    zoo.Case("timm-swin", "dynamo-23"),
    zoo.Case("hf-bert-eager", after="ort-fused"),
    zoo.Case("hf-bert-eager", after="ort-fused-mha"),
    *(zoo.Case("timm-vit", after=after) for after in ("onnxsim", "onnxslim", "ort-extended", "fp16", "constants")),
]
#: TensorRT wants keys and values of its fused attention equally wide.
EVEN = UNEVEN | {"attention": UNEVEN["attention"] | {"vo": UNEVEN["attention"]["qk"]}}
#: What leaves com.microsoft operators in a graph, which TensorRT has none of.
UNPARSED = ("ort-fused", "ort-fused-mha", "ort-extended")
FAST = {zoo.Case("timm-vit"), zoo.Case("hf-swin"), zoo.Case("hf-bert"), zoo.Case("hf-vit", "dynamo-23")}


def _one_export(family: str) -> zoo.Case:
    """The first way in which a family's library can export it."""
    ways = (zoo.Case(family, e, b) for e in ("torchscript-17", "dynamo-20") for b in ("dynamic", "static"))
    return next(case for case in ways if zoo.why_not(case) is None)


CASES = [*(_one_export(family) for family in zoo.FAMILIES), *OTHER]


@dataclass(frozen=True)
class Result:
    """A case's dense and pruned files, and the study of the dense one."""

    case: zoo.Case
    dense: Path
    pruned: Path
    study: Study


@pytest.fixture(
    scope="module",
    params=[pytest.param(c, id=c.id, marks=() if c in FAST else pytest.mark.slow) for c in CASES],
)
def result(request: pytest.FixtureRequest, exported: Exported, tmp_path_factory: pytest.TempPathFactory) -> Result:
    """Pruned once for all tests here; the twin has its own tests."""
    path = exported(request.param)
    out = tmp_path_factory.mktemp("pruned") / "pruned.onnx"
    ratios = EVEN if request.param.exporter == "dynamo-23" else UNEVEN
    dense, _ = prune_file(path, ratios, out, skip_unprunable=True, check=False)
    return Result(request.param, path, out, dense)


def test_checker_takes_it_with_full_shape_inference(result: Result) -> None:
    onnx.checker.check_model(str(result.pruned), full_check=True)


def test_opset_and_interface_are_as_they_were(result: Result) -> None:
    """Names, types, and every axis, fixed or symbolic."""
    before, after = (onnx.load(p, load_external_data=False) for p in (result.dense, result.pruned))
    weights = {t.name for t in before.graph.initializer}
    assert list(after.opset_import) == list(before.opset_import)
    assert [i for i in after.graph.input if i.name not in weights] == [
        i for i in before.graph.input if i.name not in weights
    ]
    assert list(after.graph.output) == list(before.graph.output)
    symbols = {d.dim_param for i in after.graph.input for d in i.type.tensor_type.shape.dim if d.dim_param}
    assert ("batch" in symbols) == (result.case.batch == "dynamic")


def test_nodes_outside_the_blocks_are_untouched(result: Result) -> None:
    """What is gone or changed lies between a block's first and last linear, or fed nothing but such nodes."""
    if result.case.family == "kind-parallel-packed":
        pytest.skip("one layer behind both branches is written as two, and their sum is a node of its own")
    view, after = GraphView(load_model(result.dense)), load_model(result.pruned).proto
    present = {node.SerializeToString() for node in after.graph.node}
    differing = {i for i, node in enumerate(view.nodes) if node.SerializeToString() not in present}
    assert differing
    # By output, because the study may see fused nodes spelled out.
    made = (name for i in _inside_of_blocks(result.study) for name in result.study.view.nodes[i].output)
    inside = {view.producer[name] for name in made if name in view.producer}
    for i in sorted(differing - inside, reverse=True):  # readers first
        readers = {reader for name in view.nodes[i].output for reader in view.consumers.get(name, [])}
        assert readers, view.label(i)
        assert readers <= inside, view.label(i)
        inside.add(i)
    # what stayed keeps its order and its weights
    kept = [node for i, node in enumerate(view.nodes) if i not in differing]
    place = {node.SerializeToString(): k for k, node in enumerate(after.graph.node)}
    places = [place[node.SerializeToString()] for node in kept]
    assert places == sorted(places)
    old, new = ({t.name: t for t in p.graph.initializer} for p in (view.model.proto, after))
    outside = [node for i, node in enumerate(view.nodes) if i not in inside]
    for name in {name for node in outside for name in node.input} & set(old):
        assert old[name].SerializeToString() == new[name].SerializeToString()
    assert len(outside) >= 3 * len(result.study.match.blocks)  # norms, residual sums, ...


def _inside_of_blocks(study: Study) -> Iterator[int]:
    """Positions of the linears of all blocks and of every node on a way from an entry linear to the exit."""
    for block in study.match.blocks:
        if (a := block.attention) is not None:
            entries = {b.linear.output: b.linear for b in (a.q, a.k, a.v) if b is not None}
            yield from _between(study.view, entries.values(), a.core.context)
            if a.proj is not None:
                yield from _between(study.view, [*entries.values(), a.proj.linear], a.proj.linear.input)
        if block.ffn is not None:
            yield from _between(study.view, [*block.ffn.entries, block.ffn.fc2], block.ffn.fc2.input)


def _between(view: GraphView, linears: Collection[Linear], tensor: str) -> Iterator[int]:
    """The linears, and every node on a way from one of them to the tensor."""
    yield from (i for linear in linears for i in linear.nodes)
    below = _closure([x.output for x in linears], lambda name: view.consumers.get(name, []), lambda n: n.output, view)
    above = _closure([tensor], lambda name: [view.producer[name]] if name in view.producer else [], _reads, view)
    yield from below & above


def _reads(node: onnx.NodeProto) -> Collection[str]:
    return node.input


def _closure(
    names: list[str],
    nodes_at: Callable[[str], list[int]],
    onward: Callable[[onnx.NodeProto], Collection[str]],
    view: GraphView,
) -> set[int]:
    """All nodes reached from tensors by going on from node to node."""
    found: set[int] = set()
    while names:
        for i in nodes_at(names.pop()):
            if i not in found:
                found.add(i)
                names.extend(onward(view.nodes[i]))
    return found


def test_tensorrt_parses_it_wherever_it_parses_the_dense_graph(result: Result) -> None:
    trt = pytest.importorskip("tensorrt_rtx", reason="tensorrt_rtx is not installed: pip install tensorrt_rtx")
    if result.case.after in UNPARSED:
        assert "Plugin not found" in _refused(trt, result.dense)[0]
        pytest.skip("the dense graph is refused, too: it holds operators of com.microsoft")
    assert _refused(trt, result.dense) == []
    assert _refused(trt, result.pruned) == []


def test_tensorrt_wants_fused_keys_and_values_equally_wide(exported: Exported, tmp_path: Path) -> None:
    """The reason for `EVEN`; this test fails on the day that TensorRT takes them as ONNX Runtime does."""
    trt = pytest.importorskip("tensorrt_rtx", reason="tensorrt_rtx is not installed: pip install tensorrt_rtx")
    prune_file(exported(zoo.Case("hf-vit", "dynamo-23")), UNEVEN, tmp_path / "uneven.onnx", check=False)
    assert "Key and Value must have the same shape" in _refused(trt, tmp_path / "uneven.onnx")[0]


def _refused(trt: Any, path: Path) -> list[str]:
    """What TensorRT's ONNX parser says against a graph; nothing is built."""
    logger = trt.Logger(trt.Logger.ERROR)
    builder = trt.Builder(logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    if parser.parse_from_file(str(path)):
        assert network.num_layers > 0
        assert network.num_outputs > 0
        return []
    return [parser.get_error(i).desc() for i in range(parser.num_errors)] or ["refused without a reason"]
