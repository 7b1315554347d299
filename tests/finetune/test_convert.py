"""The torch module computes what ONNX Runtime computes, gradients reach every weight, untrained nothing changes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx.helper
import pytest
import torch

from tests import zoo
from tests.finetune.graphs import FLOAT, graph_model, residual_mlp, run_onnx
from tests.pace import mostly_slow
from tests.pruning import UNEVEN, prune_file, run
from tests.test_zoo import FAST, SPREAD
from toast_onnx.errors import ModelError
from toast_onnx.finetune import to_onnx, to_torch
from toast_onnx.finetune.naming import readable_names
from toast_onnx.model import load_model, save_model

Exported = Callable[[zoo.Case], Path]
#: DETR's first decoder layer attends from queries that are all zero, so that this weight's gradient is zero in the
#: original, too.
ZERO_GRADIENT = "decoder.layers.0.self_attn.v_proj.weight"

#: ONNX Runtime has no GridSample for the float64 grid in this file, so the library's own module says what is right.
NO_KERNEL = zoo.Case("hf-mask2former", batch="static")
EVERY = [*SPREAD, NO_KERNEL]
CASES = mostly_slow(EVERY, FAST.__contains__, lambda c: c.id)


def relative(found: torch.Tensor, want: np.ndarray) -> float:
    assert tuple(found.shape) == want.shape
    scale = max(float(np.abs(want.astype(np.float64)).max()), 1e-30)
    return float(np.abs(found.detach().numpy().astype(np.float64) - want).max()) / scale


@pytest.mark.parametrize("case", CASES)
def test_outputs_are_those_of_onnx_runtime_and_gradients_reach_every_weight(case: zoo.Case, exported: Exported) -> None:
    path = exported(case)
    module = to_torch(load_model(path))
    for batch in (1, 3) if case.batch == "dynamic" else (1,):
        feeds = zoo.inputs(path, batch)
        outputs = module(*(torch.from_numpy(feeds[name]) for name in module.input_names), keep=module.output_names)
        wanted = zoo.reference(zoo.build(case.family), feeds) if case == NO_KERNEL else run(path, feeds)
        for name, want in zip(module.output_names, wanted, strict=True):
            assert relative(outputs[name], want) <= 1e-4
    floats = [o for o in outputs.values() if o.requires_grad]
    torch.stack([o.square().sum() for o in floats]).sum().backward()
    silent = [n for n, p in module.named_parameters() if p.grad is None or not p.grad.abs().max() > 0]
    assert [n for n in silent if not n.endswith(ZERO_GRADIENT)] == []


@pytest.mark.parametrize("family", ["timm-vit", pytest.param("hf-dinov2", marks=pytest.mark.slow)])
def test_merged_graphs_train_after_they_were_judged(family: str, exported: Exported, tmp_path: Path) -> None:
    """As `finetune` does: the first pass is a judgement, with inference mode on."""
    prune_file(exported(zoo.Case(family)), UNEVEN | {"tokens": {"merge": 0.1}}, tmp_path / "merged.onnx")
    module = to_torch(load_model(tmp_path / "merged.onnx"))
    feeds = zoo.inputs(tmp_path / "merged.onnx", 3)
    given = [torch.from_numpy(feeds[name]) for name in module.input_names]
    with torch.inference_mode():
        first = module(*given, keep=module.output_names)
    for name, want in zip(module.output_names, run(tmp_path / "merged.onnx", feeds), strict=True):
        assert relative(first[name], want) <= 1e-4
    again = module(*given, keep=module.output_names)
    torch.stack([o.square().sum() for o in again.values()]).sum().backward()
    assert [n for n, p in module.named_parameters() if p.grad is None or not p.grad.abs().max() > 0] == []


#: What simplifiers and optimizers make of an export; the transformer optimizer fuses attention in BERT alone.
AFTER = [
    pytest.param(
        zoo.Case(family, after=after),
        id=f"{family}/{after}",
        marks=() if (family, after) == ("hf-bert-eager", "fp16") else pytest.mark.slow,
    )
    for family in ("hf-bert-eager", "hf-swin")
    for after in zoo.AFTERMATHS
]
#: ONNX Runtime rounds every tensor of a half-precision graph to 11 bits, the module computes in float32. Through two
#: blocks about twenty roundings follow one another, each of at most half a unit, 2^-11 of its tensor's scale.
HALF_ROUNDING = 20 * 2.0**-11


@pytest.mark.parametrize("case", AFTER)
def test_optimized_and_half_precision_files_convert_too(case: zoo.Case, exported: Exported) -> None:
    path = exported(case)
    module = to_torch(load_model(path))
    assert all(p.dtype == torch.float32 for p in module.parameters())
    for batch in (1, 3):
        feeds = zoo.inputs(path, batch)
        with torch.no_grad():
            outputs = module(*(torch.from_numpy(feeds[name]) for name in module.input_names), keep=module.output_names)
        for name, want in zip(module.output_names, run(path, feeds), strict=True):
            assert relative(outputs[name], want) <= (HALF_ROUNDING if case.after == "fp16" else 1e-4)


@pytest.mark.parametrize(
    "family",
    mostly_slow(
        ["timm-vit", "timm-deit-distilled", "hf-dinov2", "torchvision-vit"], ("timm-vit", "hf-dinov2").__contains__
    ),
)
def test_the_weights_are_the_library_modules_parameters(family: str, exported: Exported) -> None:
    """As many numbers are trained as the original module has parameters that its outputs depend on."""
    path = exported(zoo.Case(family))
    module = to_torch(load_model(path))
    subject = zoo.build(family)
    outputs = subject.module(*subject.inputs.values())
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    torch.stack([o.sum() for o in outputs]).sum().backward()
    used = sum(p.numel() for p in subject.module.parameters() if p.grad is not None)
    assert sum(p.numel() for p in module.parameters()) == used


@pytest.mark.parametrize("exporter", ["torchscript-17", "dynamo-20"])
def test_parameter_names_are_the_original_modules(exporter: str, exported: Exported) -> None:
    module = to_torch(load_model(exported(zoo.Case("timm-vit", exporter))))
    original = {n for n, _ in zoo.build("timm-vit").module.named_parameters()}
    assert {n for n, _ in module.named_parameters()} == original


def test_pruned_graph_converts_exactly(exported: Exported, tmp_path: Path) -> None:
    path = tmp_path / "pruned.onnx"
    prune_file(exported(zoo.Case("timm-vit")), UNEVEN, path)
    module = to_torch(load_model(path))
    feeds = zoo.inputs(path, 3)
    with torch.no_grad():
        assert relative(module(torch.from_numpy(feeds["input"])), run(path, feeds)[0]) <= 1e-5


@pytest.mark.parametrize("exporter", ["torchscript-17", "dynamo-20"])
def test_round_trip_without_training_changes_no_byte(exporter: str, exported: Exported, tmp_path: Path) -> None:
    model = load_model(exported(zoo.Case("timm-vit", exporter)))
    save_model(model, tmp_path / "saved.onnx")
    save_model(to_onnx(to_torch(model), model), tmp_path / "back.onnx")
    assert (tmp_path / "back.onnx").read_bytes() == (tmp_path / "saved.onnx").read_bytes()


def test_changed_weights_arrive_and_everything_else_stays(exported: Exported, tmp_path: Path) -> None:
    model = load_model(exported(zoo.Case("timm-vit")))
    module = to_torch(model)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.01 * torch.randn(parameter.shape, generator=generator))
    save_model(to_onnx(module, model), tmp_path / "back.onnx")
    feeds = zoo.inputs(tmp_path / "back.onnx", 2)
    with torch.no_grad():
        assert relative(module(torch.from_numpy(feeds["input"])), run(tmp_path / "back.onnx", feeds)[0]) <= 1e-5
    back = onnx.load(tmp_path / "back.onnx")
    for proto in (back, model.proto):
        del proto.graph.initializer[:]
    assert back == model.proto


def test_half_precision_is_trained_in_float32_and_written_back_in_half(exported: Exported, tmp_path: Path) -> None:
    model = residual_mlp()
    for tensor in model.proto.graph.initializer:
        tensor.CopyFrom(
            onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(tensor).astype(np.float16), tensor.name)
        )
    for value in (*model.proto.graph.input, *model.proto.graph.output):
        value.type.tensor_type.elem_type = onnx.TensorProto.FLOAT16
    module = to_torch(model)
    assert {p.dtype for p in module.parameters()} == {torch.float32}
    with torch.no_grad():
        module.get_parameter("head").mul_(2)
    back = to_onnx(module, model)
    before = {t.name: model.array(t) for t in model.proto.graph.initializer}
    after = {t.name: back.array(t) for t in back.proto.graph.initializer}
    assert after["head"].dtype == np.float16
    np.testing.assert_array_equal(after["head"], 2 * before["head"])
    np.testing.assert_array_equal(after["blocks.0.w1"], before["blocks.0.w1"])


def test_shared_initializer_stays_one_parameter() -> None:
    w = np.eye(3, dtype=np.float32)
    nodes = [onnx.helper.make_node("MatMul", ["x", "w"], ["a"]), onnx.helper.make_node("MatMul", ["a", "w"], ["y"])]
    module = to_torch(graph_model(nodes, {"x": (FLOAT, ["n", 3])}, ["y"], {"w": w}))
    assert [n for n, _ in module.named_parameters()] == ["w"]
    module(torch.ones(1, 3)).sum().backward()
    # d/dW of 1' x W W 1 at W = I, x = 1: x 1' W' + W' x 1' is 2 everywhere.
    np.testing.assert_allclose(module.get_parameter("w").grad.numpy(), 2)


def test_formula_numbers_masks_and_statistics_are_no_weights() -> None:
    rng = np.random.default_rng(0)
    constants = {
        "w": rng.standard_normal((3, 1)).astype(np.float32),
        "bias_of_one": np.array([0.5], np.float32),
        "scale": np.array(0.125, np.float32),
        "mask": np.array([[0, -100], [-np.inf, 0]], np.float32),
        "gain": np.ones(2, np.float32),
        "shift": np.zeros(2, np.float32),
        "mean": np.zeros(2, np.float32),
        "var": np.ones(2, np.float32),
    }
    nodes = [
        onnx.helper.make_node("MatMul", ["x", "w"], ["p"]),
        onnx.helper.make_node("Add", ["p", "bias_of_one"], ["q"]),
        onnx.helper.make_node("Mul", ["q", "scale"], ["r"]),
        onnx.helper.make_node("Add", ["r", "mask"], ["s"]),
        onnx.helper.make_node("BatchNormalization", ["s", "gain", "shift", "mean", "var"], ["y"]),
    ]
    module = to_torch(graph_model(nodes, {"x": (FLOAT, [2, 3])}, ["y"], constants))
    assert {n for n, _ in module.named_parameters()} == {"w", "bias_of_one", "gain", "shift"}


def test_a_number_shared_by_a_formula_and_a_range_stays_constant() -> None:
    """MaskFormer by dynamo: one initializer, 1.0, is GELU's constant and where a range of positions starts."""
    nodes = [
        onnx.helper.make_node("MatMul", ["x", "w"], ["p"]),
        onnx.helper.make_node("Add", ["p", "one"], ["q"]),  # alone, this would be the bias of a one-channel layer
        onnx.helper.make_node("Range", ["one", "limit", "one"], ["positions"]),
        onnx.helper.make_node("Mul", ["q", "positions"], ["y"]),
    ]
    constants = {"w": np.ones((3, 1), np.float32), "one": np.array(1, np.float32), "limit": np.array(5, np.float32)}
    model = graph_model(nodes, {"x": (FLOAT, ["n", 3])}, ["y"], constants)
    module = to_torch(model)
    assert [n for n, _ in module.named_parameters()] == ["w"]
    x = np.random.default_rng(0).standard_normal((2, 3)).astype(np.float32)
    np.testing.assert_allclose(module(torch.from_numpy(x)).detach(), run_onnx(model, {"x": x})[0], rtol=1e-6)


def test_if_takes_the_branch_that_onnx_runtime_takes() -> None:
    branches = {}
    for name, op in (("then_branch", "Relu"), ("else_branch", "Neg")):
        out = onnx.helper.make_tensor_value_info(f"{name}_y", FLOAT, None)
        branches[name] = onnx.helper.make_graph([onnx.helper.make_node(op, ["z"], [f"{name}_y"])], name, [], [out])
    nodes = [
        onnx.helper.make_node("Mul", ["x", "w"], ["z"]),
        onnx.helper.make_node("Shape", ["x"], ["shape"]),
        onnx.helper.make_node("Gather", ["shape", "zero"], ["count"]),
        onnx.helper.make_node("Equal", ["count", "two"], ["condition"]),
        onnx.helper.make_node("If", ["condition"], ["y"], **branches),
    ]
    constants = {"w": np.array([1, -1, 2], np.float32), "zero": np.array(0), "two": np.array(2)}
    model = graph_model(nodes, {"x": (FLOAT, ["n", 3])}, ["y"], constants)
    module = to_torch(model)
    for count in (2, 3):
        x = np.random.default_rng(count).standard_normal((count, 3)).astype(np.float32)
        np.testing.assert_allclose(module(torch.from_numpy(x)).detach(), run_onnx(model, {"x": x})[0])


def test_unknown_operator_is_named() -> None:
    model = graph_model([onnx.helper.make_node("Det", ["x"], ["y"])], {"x": (FLOAT, [2, 2])}, ["y"])
    with pytest.raises(ModelError, match="Det"):
        to_torch(model)


def test_wrong_inputs_are_named() -> None:
    module = to_torch(residual_mlp())
    with pytest.raises(ModelError, match="the graph's inputs are x; got y"):
        module(y=torch.zeros(1, 8))


def test_weights_of_another_model_are_refused() -> None:
    with pytest.raises(ModelError, match="has shape"):
        to_onnx(to_torch(residual_mlp(width=8)), residual_mlp(width=6))


def test_not_finite_weights_are_refused() -> None:
    model = residual_mlp()
    module = to_torch(model)
    with torch.no_grad():
        module.get_parameter("head")[0, 0] = float("nan")
    with pytest.raises(ModelError, match="'head' is NaN"):
        to_onnx(module, model)


def test_recomputation_at_boundaries_gives_the_same_gradients(exported: Exported) -> None:
    module = to_torch(load_model(exported(zoo.Case("timm-vit"))))
    x = torch.from_numpy(zoo.inputs(exported(zoo.Case("timm-vit")), 2)["input"])
    gradients = []
    for boundaries in ((), ("/blocks/blocks.0/Add_1_output_0",)):
        module.zero_grad()
        module.boundaries = boundaries
        module(x).square().sum().backward()
        gradients.append({n: p.grad.clone() for n, p in module.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient)


def test_names_are_unique_and_never_both_weight_and_module() -> None:
    graph = onnx.GraphProto()
    names = readable_names(graph, ["a", "a.b", "a/b", "train", "1x"])
    assert len(set(names.values())) == len(names)
    for one in names.values():
        assert not any(other.startswith(f"{one}.") for other in names.values())
    constants = {n: np.ones(2, np.float32) for n in ("train.weight", "forward", "float")}
    nodes = [onnx.helper.make_node("Sum", ["x", *constants], ["y"])]
    module = to_torch(graph_model(nodes, {"x": (FLOAT, [2])}, ["y"], constants))
    assert set(module.initializers.values()) == set(constants)
    torch.testing.assert_close(module(torch.zeros(2)).detach(), torch.full((2,), 3.0))
