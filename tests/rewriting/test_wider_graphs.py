"""Graphs of real libraries beyond the zoo's layouts: packed per head, channels first, queries chosen by score."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.pruning import UNEVEN, look, prune_file, run, worst
from tests.rewriting.test_zoo_twin import TRUE_RANK
from tests.zoo.building import randomise
from tests.zoo.exporting import export_module
from tests.zoo.feeds import inputs
from tests.zoo.libraries import declare_torchvision_operators, hf_subject, image, timm_subject

declare_torchvision_operators()


def _plant_dead(module: torch.nn.Module, kind: str) -> int:
    """Zero every second dimension of layers (heads, [q, k, v], dim); returns how many attentions there are."""
    parts = [p for p in module.modules() if type(p).__name__ == kind]
    with torch.no_grad():
        for part in parts:
            for tensor in (part.qkv.weight, part.qkv.bias):
                tensor.view(part.num_heads, 3, -1, *tensor.shape[1:])[:, :, 1::2] = 0
            part.proj.weight.view(part.proj.weight.shape[0], part.num_heads, -1)[:, :, 1::2] = 0
    return len(parts)


@pytest.mark.parametrize(
    ("model", "kind", "size"),
    [("test_coatnet", "Attention2d", 64), pytest.param("tiny_vit_5m_224", "Attention", 224, marks=pytest.mark.slow)],
)
def test_layers_packed_head_by_head_lose_planted_dimensions(model: str, kind: str, size: int, tmp_path: Path) -> None:
    """CoAtNet weighs values (head_dim, tokens) by transposed probabilities; TinyViT is the encoder of MobileSAM."""
    subject = timm_subject(model, size, fused=False, **({} if size == 64 else {"img_size": None}))
    randomise(subject.module, 0)
    attentions = _plant_dead(subject.module, kind)
    subject.module.eval()
    path = export_module(subject, tmp_path / "model.onnx")
    attention = {name: value for name, value in TRUE_RANK.items() if name != "ffn"}
    dense, pruned = prune_file(path, attention, tmp_path / "pruned.onnx")
    found = [b.attention for b in dense.match.blocks if b.attention is not None]
    assert len(found) == attentions > 0
    assert {(a.qk_reason, a.vo_reason, a.heads_reason) for a in found} == {(None, None, None)}
    assert pruned.twin is not None
    for batch in (1, 3):
        feeds = inputs(path, batch)
        assert worst(run(tmp_path / "pruned.onnx", feeds), run(path, feeds)) < 1e-4
    assert {b.attention.qk_dim for b in look(tmp_path / "pruned.onnx").match.blocks if b.attention} == {
        a.qk_dim // 2 for a in found
    }


@pytest.mark.slow
def test_a_detector_that_picks_its_queries_by_score_is_proven(tmp_path: Path) -> None:
    """RT-DETR: all but the deformable attention shrinks, and the proof holds."""
    import transformers

    sizes = {"embedding_size": 16, "hidden_sizes": [16, 32, 48, 64], "depths": [1, 1, 1, 1], "layer_type": "basic"}
    backbone = transformers.RTDetrResNetConfig(**sizes, out_features=["stage2", "stage3", "stage4"])
    layers = {"decoder_layers": 2, "encoder_ffn_dim": 128, "decoder_ffn_dim": 128, "num_queries": 30, "num_labels": 5}
    widths = {"d_model": 64, "encoder_hidden_dim": 64, "encoder_in_channels": [32, 48, 64]}
    heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "decoder_in_channels": [64, 64, 64]}
    config = transformers.RTDetrConfig(
        backbone_config=backbone, use_pretrained_backbone=False, **layers, **widths, **heads
    )
    subject = hf_subject("RTDetrForObjectDetection", config, {"pixel_values": image(256)}, "logits", "pred_boxes")
    randomise(subject.module, 0)
    subject.module.eval()
    path = export_module(subject, tmp_path / "model.onnx")
    dense, pruned = prune_file(path, UNEVEN, skip_unprunable=True)
    assert len([b for b in dense.match.blocks if b.attention]) == 3
    assert len([b for b in dense.match.blocks if b.ffn]) == 4  # the fourth makes positions of boxes
    assert pruned.twin is not None
    assert pruned.twin.worst < 1e-4
