"""Channels chosen while the graph runs, against PyTorch's masked form; what is refused; what the proof sees."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch

from tests import zoo
from tests.pace import mostly_slow
from tests.pruning import look, worst
from tests.selection import masked_form
from toast_onnx.choosing.synthetic import SyntheticStatistics
from toast_onnx.errors import ConfigError, MatchError, TwinError
from toast_onnx.matching.study import Study
from toast_onnx.model import save_model
from toast_onnx.planning.ratios import parse_ratios
from toast_onnx.proof.inputs import twin_inputs
from toast_onnx.pruning import Pruned, prune
from toast_onnx.runtime import expose
from toast_onnx.selection.rewrite import Chosen, select_at_run_time
from toast_onnx.selection.twin import check_scores

Exported = Callable[[zoo.Case], Path]

#: fc1 ratios that leave odd widths; block 0 stays dense, as in the release.
SELECT: dict[str, Any] = {"fc1": 0.3, "fc2": 0.6, "mode": "runtime", "residual": "masked"}
DENSE_FIRST: dict[Any, Any] = {0: {"ffn": {"fc1": 0, "fc2": 0}}}


def ratios(**ffn: Any) -> dict[str, Any]:
    return {"version": 1, "ffn": SELECT | ffn, "blocks": DENSE_FIRST, "align": 1, "rounding": "paper"}


def prune_at_run_time(path: Path, document: dict[str, Any], **options: Any) -> tuple[Study, Pruned]:
    dense = look(path)
    return dense, prune(dense, parse_ratios(document), SyntheticStatistics(dense), **options)


def run_and_choose(pruned: Pruned, x: np.ndarray, folder: Path) -> tuple[np.ndarray, dict[tuple[int, str], np.ndarray]]:
    """The first output, and what every selection chose, ascending."""
    path = folder / "pruned.onnx"
    save_model(pruned.model, path)
    proto = onnx.load(path)
    tops = [n.output[1] for n in proto.graph.node if n.op_type == "TopK" and "/ffn/" in n.name]
    found = ort.InferenceSession(expose(proto, tops).SerializeToString()).run(None, {proto.graph.input[0].name: x})
    order = sorted(pruned.selections, key=lambda s: (s.block, s.part))
    kept = {(s.block, s.part): np.sort(chosen[: s.kept]) for s, chosen in zip(order, found[-len(tops) :], strict=True)}
    return found[0], kept


def reference(
    family: str, pruned: Pruned, x: np.ndarray, residual: str
) -> tuple[np.ndarray, dict[tuple[int, str], np.ndarray]]:
    """Outputs and choices of the masked form in PyTorch, in float64."""
    module = zoo.build(family).module.double()
    kept = {(s.block, s.part): s.kept for s in pruned.selections}
    tokens = {(s.block, s.part): s.tokens for s in pruned.selections if s.tokens is not None}
    masked = masked_form.Masked(kept, tokens, residual)
    (masked_form.swin if "swin" in family else masked_form.vit)(module, masked)
    with torch.no_grad():
        return module(torch.from_numpy(x).double()).numpy(), masked.chosen


def images(size: int, batch: int = 3) -> np.ndarray:
    return np.random.default_rng(5).standard_normal((batch, 3, size, size)).astype(np.float32)


@pytest.mark.parametrize("residual", ["masked", "kept"])
@pytest.mark.parametrize(
    ("family", "size"), mostly_slow([("timm-deit", 64), ("timm-swin", 112)], ("timm-deit", 64).__eq__)
)
def test_equals_the_masked_form_of_pytorch(
    family: str, size: int, residual: str, exported: Exported, tmp_path: Path
) -> None:
    _, pruned = prune_at_run_time(exported(zoo.Case(family)), ratios(residual=residual))
    x = images(size)
    ours, ours_kept = run_and_choose(pruned, x, tmp_path)
    theirs, theirs_kept = reference(family, pruned, x, residual)
    assert worst([ours], [theirs]) < 1e-4
    assert {key: list(value) for key, value in ours_kept.items()} == {k: list(v) for k, v in theirs_kept.items()}
    assert pruned.twin is not None
    assert pruned.twin.worst < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("residual", ["masked", "kept"])
def test_deit_tiny_whole(residual: str, exported: Exported, tmp_path: Path) -> None:
    """Trained weights, twelve blocks, 224 x 224."""
    try:
        path = exported(zoo.Case("deit-tiny-real"))
    except zoo.Unavailable as reason:
        pytest.skip(str(reason))
    _, pruned = prune_at_run_time(path, ratios(residual=residual))
    x = images(224, 2)
    ours, ours_kept = run_and_choose(pruned, x, tmp_path)
    theirs, theirs_kept = reference("deit-tiny-real", pruned, x, residual)
    assert len(ours_kept) == 22
    assert worst([ours], [theirs]) < 1e-4
    assert all(np.array_equal(ours_kept[key], theirs_kept[key]) for key in theirs_kept)


@pytest.mark.slow
@pytest.mark.parametrize("residual", ["masked", "kept"])
def test_swin_tiny_whole(residual: str, tmp_path: Path) -> None:
    """timm's Swin-T at its own size, random weights."""
    import timm

    zoo.declare_torchvision_operators()
    module = timm.create_model("swin_tiny_patch4_window7_224", pretrained=False).eval()
    zoo.randomise(module, 3)
    path = tmp_path / "swin.onnx"
    names = {"input_names": ["input"], "output_names": ["logits"]}
    axes = {"input": {0: "batch"}, "logits": {0: "batch"}}
    example = torch.zeros(2, 3, 224, 224)
    torch.onnx.export(module, (example,), path, dynamo=False, opset_version=17, dynamic_axes=axes, **names)
    _, pruned = prune_at_run_time(path, ratios(residual=residual))
    x = images(224, 2)
    ours, ours_kept = run_and_choose(pruned, x, tmp_path)
    kept = {(s.block, s.part): s.kept for s in pruned.selections}
    tokens = {(s.block, s.part): s.tokens for s in pruned.selections if s.tokens is not None}
    masked = masked_form.Masked(kept, tokens, residual)
    masked_form.swin(module.double(), masked)
    with torch.no_grad():
        theirs = module(torch.from_numpy(x).double()).numpy()
    assert len(ours_kept) == 22
    assert worst([ours], [theirs]) < 1e-4
    assert all(np.array_equal(ours_kept[key], masked.chosen[key]) for key in masked.chosen)


def test_the_two_ways_with_the_residual_differ(exported: Exported, tmp_path: Path) -> None:
    """Else the mode would be a word."""
    path, x = exported(zoo.Case("timm-deit")), images(64)
    outputs = [
        run_and_choose(prune_at_run_time(path, ratios(residual=r))[1], x, tmp_path)[0] for r in ("masked", "kept")
    ]
    assert worst(outputs[:1], outputs[1:]) > 0.01


def test_products_are_as_small_as_the_ratios_say(exported: Exported, tmp_path: Path) -> None:
    """fc1 loses inputs and keeps its outputs, fc2 loses inputs: the paper's accounting; masking adds one row to fc1."""
    from toast_onnx.planning.macs import graph_macs

    path = exported(zoo.Case("timm-deit"))
    for residual, extra in (("kept", 0), ("masked", 1)):
        dense, pruned = prune_at_run_time(path, ratios(residual=residual, tokens=0.02))
        out = tmp_path / "pruned.onnx"
        save_model(pruned.model, out)
        after = look(out)
        tokens, blocks = 17, 2
        saved = blocks * tokens * ((192 - (134 + extra)) * 768 + (768 - 307) * 192)
        scores = blocks * (2 * 192 + 2 * 768)  # a (1, 1 + sampled) by (1 + sampled, channels) product each
        assert graph_macs(dense.view, dense.counted) - graph_macs(after.view, after.counted) == saved - scores


def test_static_attention_and_run_time_networks_together(exported: Exported) -> None:
    document = ratios() | {"attention": {"qk": 0.5, "vo": 0.25}}
    _, pruned = prune_at_run_time(exported(zoo.Case("timm-deit")), document)
    assert pruned.twin is not None
    assert pruned.twin.worst < 1e-4
    assert {b for b, w in pruned.weights.items() if w.ffn is not None} == set()
    assert {s.block for s in pruned.selections} == {1, 2}


@pytest.mark.parametrize("attention", [{}, {"qk": 0.5}])
def test_half_precision(attention: dict[str, Any], exported: Exported) -> None:
    """Compared in float32: what half precision would round is kept apart from what it rounds."""
    document = ratios() | {"attention": attention}
    _, pruned = prune_at_run_time(exported(zoo.Case("timm-deit", after="fp16")), document)
    assert pruned.twin is not None
    assert pruned.twin.worst < 1e-4


def test_one_block_at_run_time_the_others_static(exported: Exported) -> None:
    document = ratios() | {
        "ffn": {"fc2": 0.5},
        "blocks": {2: {"ffn": {"mode": "runtime"}}},
    }
    _, pruned = prune_at_run_time(exported(zoo.Case("timm-deit")), document)
    assert [s.block for s in pruned.selections] == [2]
    assert sorted(b for b, w in pruned.weights.items() if w.ffn is not None) == [0, 1]


@pytest.mark.parametrize(
    "case",
    mostly_slow(
        [
            zoo.Case("hf-vit"),
            zoo.Case("torchvision-swin"),
            zoo.Case("timm-dinov2", "dynamo-20"),
            zoo.Case("timm-vit", batch="static"),
            zoo.Case("hf-dinov2-giant"),
        ],
        lambda c: c.family not in ("torchvision-swin", "timm-dinov2") and c.exporter == "torchscript-17",
        lambda c: c.id,
    ),
)
def test_other_spellings_pass_the_proof(case: zoo.Case, exported: Exported) -> None:
    """Class tokens that are not the only output score like the rest; packed gates; a fixed batch."""
    try:
        path = exported(case)
    except zoo.Unavailable as reason:
        pytest.skip(str(reason))
    _, pruned = prune_at_run_time(path, ratios())
    assert pruned.twin is not None
    assert pruned.twin.worst < 1e-4


@pytest.mark.slow
def test_the_seed_decides_the_tokens_and_nothing_else(exported: Exported) -> None:
    path = exported(zoo.Case("timm-swin"))
    first, again, other = (prune_at_run_time(path, ratios(), seed=seed, check=False)[1] for seed in (0, 0, 1))
    assert first.model.proto.SerializeToString() == again.model.proto.SerializeToString()
    assert all(np.array_equal(first.model.arrays[n], again.model.arrays[n]) for n in first.model.arrays)
    assert any(not np.array_equal(a.tokens, b.tokens) for a, b in zip(first.selections, other.selections, strict=True))
    draws = [tuple(s.tokens) for s in first.selections if s.tokens is not None]
    assert len(set(draws)) == len(draws)  # every layer draws for itself


def test_all_tokens(exported: Exported, tmp_path: Path) -> None:
    _, pruned = prune_at_run_time(exported(zoo.Case("timm-deit")), ratios(tokens="all"))
    assert all(s.tokens is not None and list(s.tokens) == list(range(1, 17)) for s in pruned.selections)
    x = images(64)
    assert worst([run_and_choose(pruned, x, tmp_path)[0]], [reference("timm-deit", pruned, x, "masked")[0]]) < 1e-4


def test_the_result_for_an_image_depends_on_its_batch(exported: Exported, tmp_path: Path) -> None:
    """What the documentation warns of."""
    _, pruned = prune_at_run_time(exported(zoo.Case("timm-deit")), ratios(), check=False)
    x = images(64, 4)
    together, _ = run_and_choose(pruned, x, tmp_path)
    alone, _ = run_and_choose(pruned, x[:1], tmp_path)
    assert worst([together[:1]], [alone]) > 1e-3


def _bend(pruned: Pruned, op: str, change: Callable[[onnx.NodeProto, Pruned], None]) -> None:
    for node in pruned.model.proto.graph.node:
        if node.op_type == op and "/ffn/" in node.name:
            change(node, pruned)
            return
    raise AssertionError(f"no {op} to bend")


def _chosen(dense: Study, pruned: Pruned) -> tuple[Chosen, ...]:
    return select_at_run_time(dense, dense.view.model, pruned.selections)[1]


def test_a_wrong_choice_is_seen(exported: Exported) -> None:
    """The lowest scores in place of the highest."""
    dense, pruned = prune_at_run_time(exported(zoo.Case("timm-deit")), ratios(), check=False)
    chosen = _chosen(dense, pruned)
    check_scores(pruned.model, chosen, twin_inputs(dense))

    def lowest(node: onnx.NodeProto, _: Pruned) -> None:
        node.attribute.append(onnx.helper.make_attribute("largest", 0))

    _bend(pruned, "TopK", lowest)
    with pytest.raises(TwinError, match="keeps a channel of fc1"):
        check_scores(pruned.model, chosen, twin_inputs(dense))


def test_a_wrong_weight_row_is_seen(exported: Exported) -> None:
    from toast_onnx.proof.twin import compare_with_twin, padded_twin
    from toast_onnx.selection.twin import masked_twin
    from toast_onnx.solving.weights import BlockWeights

    dense, pruned = prune_at_run_time(exported(zoo.Case("timm-deit")), ratios(), check=False)
    chosen = _chosen(dense, pruned)
    name = next(n for n in pruned.model.arrays if n.endswith("fc2/weight"))
    pruned.model.arrays[name] = np.roll(pruned.model.arrays[name], 1, axis=0)
    blocks = dense.match.blocks
    twin = masked_twin(dense, padded_twin(dense.view, dense.facts, blocks, {}), chosen)
    changed = {s.block: BlockWeights() for s in pruned.selections}
    with pytest.raises(TwinError, match="first at block 1"):
        compare_with_twin(dense.view, twin, pruned.model, blocks, changed, twin_inputs(dense), [c.kept for c in chosen])


@pytest.mark.parametrize(
    ("case", "document", "error", "match"),
    [
        (zoo.Case("timm-deit"), ratios(score="variance"), ConfigError, "knows one score only"),
        (zoo.Case("timm-deit"), ratios() | {"compensation": {"kind": "local"}}, ConfigError, "local"),
        (zoo.Case("timm-deit", "torchscript-14"), ratios(), MatchError, "write residual: kept"),
        (zoo.Case("timm-vit", "dynamo-23"), ratios(), MatchError, "below 23"),
    ],
    ids=["score", "local", "opset-14", "fused"],
)
def test_what_cannot_be_is_refused_with_a_way_out(
    case: zoo.Case, document: dict[str, Any], error: type[Exception], match: str, exported: Exported
) -> None:
    try:
        path = exported(case)
    except zoo.Unavailable as reason:
        pytest.skip(str(reason))
    with pytest.raises(error, match=match):
        prune_at_run_time(path, document, refine=lambda weights: (dict(weights), ()))


def test_a_layer_that_cannot_select_is_skipped_on_request(exported: Exported) -> None:
    """Without a LayerNormalization node fc1 cannot mask the stream; fc2 needs none."""
    path = exported(zoo.Case("timm-deit", "torchscript-14"))
    dense, pruned = prune_at_run_time(path, ratios(), skip_unprunable=True)
    last = [b.index for b in dense.match.blocks][1:]
    assert [(s.block, s.part) for s in pruned.selections] == [(block, "fc2") for block in last]
    assert [(w.fc1 is None, w.fc2 is None) for w in pruned.widths] == [(True, True), *[(True, False) for _ in last]]
    _, same = prune_at_run_time(path, ratios(fc1=0))
    assert pruned.model.proto.SerializeToString() == same.model.proto.SerializeToString()


def test_without_a_layer_normalization_the_stream_can_be_kept(exported: Exported) -> None:
    _, pruned = prune_at_run_time(exported(zoo.Case("timm-deit", "torchscript-14")), ratios(residual="kept"))
    assert pruned.twin is not None
    assert pruned.twin.worst < 1e-4


@pytest.mark.parametrize("family", ["timm-deit", "timm-swin"])
def test_tensorrt_takes_the_graph(family: str, exported: Exported, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx", reason="tensorrt_rtx is not installed: pip install tensorrt_rtx")
    from toast_onnx.engines.backend import EngineOptions
    from toast_onnx.engines.build import BuildRequest, build

    _, pruned = prune_at_run_time(exported(zoo.Case(family)), ratios(), check=False)
    save_model(pruned.model, tmp_path / "model.onnx")
    options = EngineOptions(compute_capabilities=(89,))
    request = BuildRequest(backend="tensorrt-rtx", precision="fp32", batch=(1, 2, 4), options=options)
    record = build(tmp_path / "model.onnx", tmp_path / "model.engine", request)
    assert record["engine_bytes"] > 1000
