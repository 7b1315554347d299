"""Head sizes before a build and fused kernels after it: what is chosen, and what the builder really makes of it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tests import zoo
from tests.engines.test_uneven_attention import save
from tests.pruning import UNEVEN, prune_file
from toast_onnx.engines.heads import fused_notes, settle_heads
from toast_onnx.engines.layers import Layer, count_fused_attention, layers_of_inspector, layers_of_log
from toast_onnx.errors import ConfigError
from toast_onnx.model import load_model

Exported = Callable[[zoo.Case], Path]

LOG = """Layers:
Name: node_MatMul_1+node_MatMul_2_myl0_2, LayerType: gemm, Inputs: [ { Name: x, Dimensions: [1,2] }], TacticName: stub,
Name: _gemm_mha_v2_myl0_15, LayerType: kgen, Inputs: [], Outputs: [], TacticName: _gemm_mha_v2_0x3797, StreamId: 0
Name: __myl_MaxrSubExpSumDivMul_myl0_9, LayerType: kgen, Inputs: [], TacticName: , Metadata: [ONNX Layer: a]

Bindings:
"""


def test_layers_of_a_log_and_of_the_inspector() -> None:
    layers = layers_of_log(LOG)
    assert layers is not None
    assert [(layer.kind, layer.tactic, layer.is_fused_attention) for layer in layers] == [
        ("gemm", "stub", False),
        ("kgen", "_gemm_mha_v2_0x3797", True),
        ("kgen", "", False),
    ]
    listed = [{"Name": layer.name, "LayerType": layer.kind, "TacticName": layer.tactic} for layer in layers]
    assert layers_of_inspector(json.dumps({"Layers": listed})) == layers
    assert layers_of_inspector(json.dumps({"Layers": ["only", "names"]})) is None
    assert layers_of_inspector("no JSON") is None
    assert layers_of_log("Layers:\n") is None


@pytest.mark.parametrize(
    ("name", "fused"),
    [("fmha_v2_flash_attention_fp16", True), ("MHA_1", True), ("alpha_mhattan", False), ("blocks.0/softmax", False)],
)
def test_names_of_fused_kernels(name: str, fused: bool) -> None:
    assert count_fused_attention([Layer(name, "kgen")]) == fused


@pytest.mark.parametrize(
    ("choice", "half", "ends"),
    [
        ("auto", True, "padded"),
        ("auto", False, "written out"),
        ("pad", False, "padded"),
        ("write-out", True, "written out"),
    ],
)
def test_what_is_chosen_is_told_with_its_cost(choice: str, half: bool, ends: str, tmp_path: Path) -> None:
    settled = settle_heads(load_model(save(tmp_path, 24)), choice, sixteen_bits=half)
    assert settled.attentions == 1
    assert (settled.padded, settled.written_out) == ((1, 0) if ends == "padded" else (0, 1))
    (note,) = settled.notes
    # 3 heads, 5 queries and 7 keys in each of 2 items, 8 dimensions in Q and K and 24 in V, or 24 in all
    assert f"{2 * 3 * 5 * 7 * (8 + 24) / 1e9:.3f} GMACs" in note
    assert f"{2 * 3 * 5 * 7 * (24 + 24) / 1e9:.3f} GMACs" in note


def test_even_heads_are_left_alone(tmp_path: Path) -> None:
    model = load_model(save(tmp_path, 8))
    settled = settle_heads(model, "auto", sixteen_bits=True)
    assert (settled.model, settled.attentions, settled.notes) == (model, 1, ())
    with pytest.raises(ConfigError, match="use one of auto, pad, write-out"):
        settle_heads(model, "split", sixteen_bits=True)


@pytest.mark.parametrize(
    ("found", "fused", "dense", "half", "said"),
    [
        (12, 12, (12, 12), True, ""),
        (12, 3, (12, 12), True, "pruning unfused attention: 3 of 12 .* 12 of 12 in the dense"),
        (6, 6, (12, 12), True, ""),  # blocks may be gone
        (12, 3, (12, 2), True, "3 of 12 attentions are one fused kernel"),
        (12, 0, (12, 0), False, ""),
        (12, 0, None, True, "0 of 12"),
    ],
)
def test_a_warning_where_pruning_unfused(
    found: int, fused: int, dense: tuple[int, int] | None, half: bool, said: str
) -> None:
    notes = fused_notes(found, fused, dense, sixteen_bits=half)
    assert len(notes) == bool(said)
    if said:
        with pytest.raises(RuntimeError, match=said):
            raise RuntimeError(notes[0])


def test_a_padded_attention_is_one_kernel_where_an_uneven_one_was_refused(exported: Exported, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx", reason="tensorrt_rtx is not installed: pip install tensorrt_rtx")
    from toast_onnx.engines.backend import EngineOptions
    from toast_onnx.engines.backends import choose
    from toast_onnx.engines.build import BuildRequest, build
    from toast_onnx.engines.engine import UnsupportedGraphError, build_engine

    source = exported(zoo.Case("hf-vit", "dynamo-23", "static"))
    pruned, options = tmp_path / "uneven.onnx", EngineOptions(compute_capabilities=(89,))
    prune_file(source, UNEVEN, pruned, check=False)
    with pytest.raises(UnsupportedGraphError, match="Attention"):
        build_engine(choose("tensorrt-rtx"), pruned, options)

    def built(model: Path, name: str, choice: str, baseline: Path | None = None) -> dict:
        request = BuildRequest(
            "tensorrt-rtx", precision="fp16", uneven_heads=choice, baseline=baseline, options=options
        )
        return build(model, tmp_path / name, request)

    assert built(source, "dense", "auto")["attention"] == {"found": 2, "fused": 2, "padded": 0, "written_out": 0}
    padded = built(pruned, "padded", "auto", tmp_path / "dense")
    assert padded["attention"] == {"found": 2, "fused": 2, "padded": 2, "written_out": 0}
    assert not any("unfused" in note for note in padded["notes"])
    parts = built(pruned, "parts", "write-out", tmp_path / "dense")
    assert parts["attention"] == {"found": 2, "fused": 0, "padded": 0, "written_out": 2}
    assert any("pruning unfused attention: 0 of 2" in note for note in parts["notes"])
    with pytest.raises(ConfigError, match="drop --baseline"):
        built(pruned, "parts", "auto", tmp_path / "nowhere")
