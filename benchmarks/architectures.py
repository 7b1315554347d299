"""Which architectures of timm, Hugging Face and vit-pytorch are matched and proven, as their libraries export them.

    python benchmarks/architectures.py --results FILE [--only PATTERN ...] [--redo] [--output FILE]

Every model is the library's own, the smallest of its kind with random weights, at its own image size (Hugging Face: two
layers where its configuration says how many). It is exported by TorchScript 17 with a dynamic batch and by dynamo 20
with a fixed one, pruned by different fractions in every part, and compared with its twin. One process a model; results
are kept in a JSON file, so that a run can be stopped and continued. About an hour for all on one core.
"""

from __future__ import annotations

import argparse
import copy
import fnmatch
import importlib
import json
import logging
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from torch import nn  # noqa: E402

from benchmarks.coverage import one_line, read, reasons  # noqa: E402
from tests.pruning import UNEVEN, look  # noqa: E402
from tests.zoo.building import randomise  # noqa: E402
from tests.zoo.libraries import declare_torchvision_operators  # noqa: E402
from toast_onnx.choosing.synthetic import SyntheticStatistics  # noqa: E402
from toast_onnx.errors import ToastError  # noqa: E402
from toast_onnx.files import write_bytes  # noqa: E402
from toast_onnx.planning.ratios import parse_ratios  # noqa: E402
from toast_onnx.pruning import prune  # noqa: E402

EXPORTERS = ("TorchScript 17", "dynamo 20")
SECONDS = 600
TIMM = (
    "aimv2_large_patch14_224", "beit3_base_patch16_224", "botnet26t_256", "cait_xxs24_224", "caformer_s18",
    "coat_lite_tiny", "coatnet_nano_rw_224", "convit_tiny", "convnext_atto", "cpubone_b0_bfrobust", "crossvit_9_240",
    "davit_tiny", "edgenext_xx_small", "efficientformer_l1", "efficientformerv2_s0", "efficientvit_b0",
    "efficientvit_m0", "fastvit_sa12", "focalnet_tiny_srf", "gcvit_xxtiny", "gemma4_vit_167m", "gmlp_ti16_224",
    "halonet26t", "hiera_tiny_224", "inception_next_atto", "levit_128s", "mambaout_femto", "maxvit_tiny_tf_224",
    "maxxvitv2_nano_rw_256", "mixer_s32_224", "mobilenetv5_base", "mobilevit_xxs", "mobilevitv2_050",
    "mvitv2_tiny", "naflexvit_base_patch16_gap", "nest_tiny", "nextvit_small", "pit_ti_224", "poolformer_s12",
    "pvt_v2_b0", "pvt_v2_b2_li", "qwen3_vit_88m", "repvit_m0_9", "resmlp_12_224", "sam2_hiera_tiny",
    "samvit_base_patch16_224", "sequencer2d_s", "shvit_s1", "swiftformer_xs", "swinv2_cr_tiny_224", "test_vit3",
    "tiny_vit_5m_224", "tnt_s_patch16_224", "twins_pcpvt_small", "twins_svt_small", "visformer_tiny",
    "vit_base_patch16_rpn_224", "vit_base_patch16_xp_224", "vit_dlittle_patch16_reg1_gap_256",
    "vit_intern300m_patch14_448", "vit_pe_core_tiny_patch16_384", "vit_pe_spatial_tiny_patch16_512",
    "vit_relpos_small_patch16_224", "vit_small_patch16_18x2_224", "vit_small_patch16_rope_224",
    "vit_small_plus_patch16_dinov3_qkvb", "vit_so150m_patch16_reg4_map_256", "vit_tiny_r_s16_p8_224",
    "vitamin_small_224", "volo_d1_224", "xcit_nano_12_p16_224",
)  # fmt: skip
TWO = {"num_hidden_layers": 2}
RELATIVE = TWO | {"use_relative_position_bias": True}
WINDOWS = {"depths": [2, 2], "num_heads": [6, 6]}
QWEN = {"depth": 2}
SHALLOW = {"depths": [1, 1, 1, 1]}
DETR = {"use_pretrained_backbone": False, "encoder_layers": 2, "decoder_layers": 2}
#: Hugging Face: name -> model, configuration, its options, image size (channels, height, width) or number of tokens.
HF: dict[str, tuple[str, str, dict[str, Any], tuple[int, ...]]] = {
    "aimv2": ("Aimv2VisionModel", "Aimv2VisionConfig", TWO, (3, 224, 224)),
    "ast": ("ASTModel", "ASTConfig", TWO, (1024, 128)),
    "blip": ("BlipVisionModel", "BlipVisionConfig", TWO | {"image_size": 224}, (3, 224, 224)),
    "blip-2": ("Blip2VisionModel", "Blip2VisionConfig", TWO, (3, 224, 224)),
    "clip-text": ("CLIPTextModel", "CLIPTextConfig", TWO, (16,)),
    "conditional-detr": ("ConditionalDetrForObjectDetection", "ConditionalDetrConfig", DETR, (3, 256, 256)),
    "d-fine": ("DFineForObjectDetection", "DFineConfig", {"decoder_layers": 2}, (3, 320, 320)),
    "data2vec": ("Data2VecVisionModel", "Data2VecVisionConfig", RELATIVE, (3, 224, 224)),
    "deberta-v2": ("DebertaV2Model", "DebertaV2Config", TWO, (16,)),
    "deformable-detr": ("DeformableDetrForObjectDetection", "DeformableDetrConfig", DETR, (3, 256, 256)),
    "deimv2": ("Deimv2ForObjectDetection", "Deimv2Config", {}, (3, 320, 320)),
    "depth-anything": ("DepthAnythingForDepthEstimation", "DepthAnythingConfig", {}, (3, 224, 224)),
    "distilbert": ("DistilBertModel", "DistilBertConfig", {"n_layers": 2}, (16,)),
    "electra": ("ElectraModel", "ElectraConfig", TWO, (16,)),
    "eomt": ("EomtForUniversalSegmentation", "EomtConfig", TWO | {"image_size": 224, "num_blocks": 1}, (3, 224, 224)),
    "focalnet": ("FocalNetModel", "FocalNetConfig", {}, (3, 224, 224)),
    "glpn": ("GLPNForDepthEstimation", "GLPNConfig", SHALLOW, (3, 128, 128)),
    "hiera": ("HieraModel", "HieraConfig", {"depths": [1, 1, 2, 1]}, (3, 224, 224)),
    "i-jepa": ("IJepaModel", "IJepaConfig", TWO, (3, 224, 224)),
    "mobilevit": ("MobileViTModel", "MobileViTConfig", {}, (3, 256, 256)),
    "modernbert": ("ModernBertModel", "ModernBertConfig", TWO, (16,)),
    "mpnet": ("MPNetModel", "MPNetConfig", TWO, (16,)),
    "owlv2": ("Owlv2VisionModel", "Owlv2VisionConfig", TWO | {"image_size": 224, "patch_size": 32}, (3, 224, 224)),
    "prompt-depth-anything": ("PromptDepthAnythingForDepthEstimation", "PromptDepthAnythingConfig", {}, (3, 224, 224)),
    "pvt": ("PvtModel", "PvtConfig", SHALLOW, (3, 224, 224)),
    "rf-detr": ("RfDetrForObjectDetection", "RfDetrConfig", {}, (3, 448, 448)),
    "roberta": ("RobertaModel", "RobertaConfig", TWO, (16,)),
    "rt-detr": ("RTDetrForObjectDetection", "RTDetrConfig", {"decoder_layers": 2}, (3, 320, 320)),
    "rt-detr-v2": ("RTDetrV2ForObjectDetection", "RTDetrV2Config", {"decoder_layers": 2}, (3, 320, 320)),
    "sam": ("SamVisionModel", "SamVisionConfig", TWO | {"image_size": 256, "global_attn_indexes": [1]}, (3, 256, 256)),
    "segformer": ("SegformerForSemanticSegmentation", "SegformerConfig", SHALLOW, (3, 128, 128)),
    "swin2sr": ("Swin2SRForImageSuperResolution", "Swin2SRConfig", WINDOWS, (3, 64, 64)),
    "table-transformer": ("TableTransformerForObjectDetection", "TableTransformerConfig", DETR, (3, 256, 256)),
    "timesformer": ("TimesformerModel", "TimesformerConfig", TWO, (8, 3, 224, 224)),
    "videomae": ("VideoMAEModel", "VideoMAEConfig", TWO, (16, 3, 224, 224)),
    "vit-msn": ("ViTMSNModel", "ViTMSNConfig", TWO, (3, 224, 224)),
    "vitpose": ("VitPoseForPoseEstimation", "VitPoseConfig", {}, (3, 256, 192)),
    "whisper-encoder": ("WhisperEncoder", "WhisperConfig", {"encoder_layers": 2}, (80, 3000)),
    "zoedepth": ("ZoeDepthForDepthEstimation", "ZoeDepthConfig", {}, (3, 384, 384)),
    "dinov3": ("DINOv3ViTModel", "DINOv3ViTConfig", TWO, (3, 224, 224)),
    "florence-2 (davit)": ("Florence2VisionBackbone", "Florence2VisionConfig", {"depths": [1, 1, 1, 1]}, (3, 224, 224)),
    "grounding-dino": ("GroundingDinoForObjectDetection", "GroundingDinoConfig", DETR, (3, 256, 256)),
    "internvl": ("InternVLVisionModel", "InternVLVisionConfig", TWO | {"image_size": [224, 224]}, (3, 224, 224)),
    "qwen2.5-vl": ("Qwen2_5_VisionTransformerPretrainedModel", "Qwen2_5_VLVisionConfig", QWEN, (64, 1176)),
    "qwen3-vl": ("Qwen3VLVisionModel", "Qwen3VLVisionConfig", QWEN | {"deepstack_visual_indexes": [0]}, (64, 1536)),
    "sam2": ("Sam2VisionModel", "Sam2VisionConfig", {}, (3, 256, 256)),
    "sam3": ("Sam3VisionModel", "Sam3VisionConfig", {}, (3, 252, 252)),
    "siglip2": ("Siglip2VisionModel", "Siglip2VisionConfig", TWO | {"num_patches": 64}, (64, 768)),
}  # fmt: skip
#: Inputs that stay as they are in the exported graph: the arrangement of patches, a text, a mask.
FIXED: dict[str, dict[str, torch.Tensor]] = {
    "grounding-dino": {"input_ids": torch.tensor([[101, 3899, 1012, 102]] * 2)},
    "qwen2.5-vl": {"grid_thw": torch.tensor([[1, 8, 8]])},
    "qwen3-vl": {"grid_thw": torch.tensor([[1, 8, 8]])},
    "siglip2": {"pixel_attention_mask": torch.ones(2, 64).long(), "spatial_shapes": torch.tensor([[8, 8]] * 2)},
}
PLAIN = {"num_classes": 10, "dim": 192, "depth": 2, "heads": 3, "mlp_dim": 384}
VIT = PLAIN | {"image_size": 64, "patch_size": 16}
NAMED = {"img_size": 64, "embedding_dim": 192, "num_layers": 2, "num_heads": 3, "num_classes": 10}
LEVIT = {
    "image_size": 112,
    "num_classes": 10,
    "stages": 2,
    "dim": (64, 128),
    "depth": 2,
    "heads": (2, 4),
    "mlp_mult": 2,
}
MOBILE = {
    "image_size": (64, 64),
    "dims": [64, 80, 96],
    "channels": [16, 16, 24, 24, 48, 48, 64, 64, 80, 80, 160],
    "num_classes": 10,
}
NEST = {"image_size": 64, "patch_size": 4, "num_classes": 10, "dim": 96, "heads": 3} | {
    "num_hierarchies": 2,
    "block_repeats": (1, 2),
}
VIDEO = {
    **{"image_size": 64, "image_patch_size": 16, "frames": 4, "frame_patch_size": 2, "num_classes": 10},
    **{"dim": 192, "heads": 3, "mlp_dim": 384, "spatial_depth": 2, "temporal_depth": 2},
}
#: vit-pytorch: module -> class, its options, image size. All its classifiers of images that take one picture at a time.
VIT_PYTORCH: dict[str, tuple[str, dict[str, Any], tuple[int, ...]]] = {
    "cait": ("CaiT", VIT | {"cls_depth": 2}, (3, 64, 64)),
    "cct": ("CCT", NAMED, (3, 64, 64)),
    "cross_vit": ("CrossViT", {"image_size": 96, "num_classes": 10, "sm_dim": 96, "lg_dim": 192}, (3, 96, 96)),
    "crossformer": ("CrossFormer", {"num_classes": 10, "depth": (1, 1, 2, 1)}, (3, 224, 224)),
    "cvt": ("CvT", {"num_classes": 10, "s3_depth": 2}, (3, 112, 112)),
    "deepvit": ("DeepViT", VIT, (3, 64, 64)),
    "jumbo_vit": ("JumboViT", VIT, (3, 64, 64)),
    "levit": ("LeViT", LEVIT, (3, 112, 112)),
    "local_vit": ("LocalViT", VIT, (3, 64, 64)),
    "look_vit": ("LookViT", {"image_size": 96, "num_classes": 10, "dim": 192, "depth": 2, "heads": 3}, (3, 96, 96)),
    "max_vit": ("MaxViT", {"num_classes": 10, "dim": 64, "depth": (1, 1), "dim_conv_stem": 32}, (3, 112, 112)),
    "mobile_vit": ("MobileViT", MOBILE, (3, 64, 64)),
    "na_vit": ("NaViT", VIT, (3, 64, 64)),
    "nest": ("NesT", NEST, (3, 64, 64)),
    "normalized_vit": ("nViT", VIT, (3, 64, 64)),
    "parallel_vit": ("ViT", VIT, (3, 64, 64)),
    "pit": ("PiT", VIT | {"depth": (1, 2)}, (3, 64, 64)),
    "regionvit": ("RegionViT", {"num_classes": 10, "depth": (1, 1, 2, 1)}, (3, 224, 224)),
    "rvt": ("RvT", VIT, (3, 64, 64)),
    "simple_uvit": ("SimpleUViT", VIT, (3, 64, 64)),
    "simple_vit": ("SimpleViT", VIT, (3, 64, 64)),
    "simple_vit_with_qk_norm": ("SimpleViT", VIT, (3, 64, 64)),
    "simple_vit_with_register_tokens": ("SimpleViT", VIT, (3, 64, 64)),
    "simple_vit_with_value_residual": ("SimpleViT", VIT, (3, 64, 64)),
    "t2t": ("T2TViT", PLAIN | {"image_size": 112}, (3, 112, 112)),
    "twins_svt": ("TwinsSVT", {"num_classes": 10, "s3_depth": 1, "s4_depth": 1}, (3, 224, 224)),
    "vit": ("ViT", VIT, (3, 64, 64)),
    "vit_5": ("ViT", VIT, (3, 64, 64)),
    "vit_for_small_dataset": ("ViT", VIT, (3, 64, 64)),
    "vit_nd_rotary": ("ViTND", PLAIN | {"ndim": 2, "input_shape": (64, 64), "patch_size": 16}, (3, 64, 64)),
    "vit_with_patch_merger": ("ViT", VIT, (3, 64, 64)),
    "vivit": ("ViViT", VIDEO, (3, 4, 64, 64)),
    "xcit": ("XCiT", VIT | {"cls_depth": 2}, (3, 64, 64)),
}  # fmt: skip


LIBRARIES = {"timm": TIMM, "Hugging Face": HF, "vit-pytorch": VIT_PYTORCH}


class Tensors(nn.Module):
    """Calls a Hugging Face model with its one input and returns the first floating-point tensors of its output."""

    def __init__(self, model: nn.Module, name: str, fixed: dict[str, torch.Tensor]) -> None:
        super().__init__()
        self.model, self.name, self.fixed = model, name, fixed

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        result = self.model(**{self.name: x}, **self.fixed)
        if isinstance(result, torch.Tensor):
            return (result,)
        found = [t for t in result.to_tuple() if isinstance(t, torch.Tensor) and t.is_floating_point()]
        return tuple(found[:4])


def build(name: str) -> tuple[nn.Module, torch.Tensor]:
    """The named model in eval mode and an example input of batch 2."""
    declare_torchvision_operators()
    torch.manual_seed(0)
    library, _, model = name.partition(": ")
    if library == "timm":
        import timm

        module: Any = timm.create_model(model, pretrained=False, num_classes=10, exportable=True)
        return module, torch.randn(2, *module.pretrained_cfg["input_size"])
    if library == "vit-pytorch":
        kind, options, size = VIT_PYTORCH[model]
        module = getattr(importlib.import_module(f"vit_pytorch.{model}"), kind)(**options)
        return module, torch.randn(2, *size)
    import transformers

    kind, config, options, size = HF[model]
    made = _class(transformers, config)(**options)
    text = len(size) == 1
    example = torch.randint(1, 99, (2, *size)) if text else torch.randn(2, *size)
    named = {"ast": "input_values", "whisper-encoder": "input_features", "florence-2 (davit)": "hidden_states"}
    if model.startswith("qwen"):  # one row for every patch of all images, how many there are says grid_thw
        named[model], example = "hidden_states", example[0]
    name = named.get(model, "input_ids" if text else "pixel_values")
    return Tensors(_with_sdpa(_class(transformers, kind), made), name, FIXED.get(model, {})), example


#: Where classes of transformers stand that are not exported at the top.
INNER = {
    "WhisperEncoder": "whisper.modeling_whisper",
    "Florence2VisionBackbone": "florence2.modeling_florence2",
    "Qwen2_5_VisionTransformerPretrainedModel": "qwen2_5_vl.modeling_qwen2_5_vl",
    "Qwen2_5_VLVisionConfig": "qwen2_5_vl.configuration_qwen2_5_vl",
    "Qwen3VLVisionConfig": "qwen3_vl.configuration_qwen3_vl",
    "Florence2VisionConfig": "florence2.configuration_florence2",
}


def _with_sdpa(kind: Any, config: Any) -> Any:
    """A model of Hugging Face with PyTorch's fused attention, or its own where it or its backbone knows no other."""
    try:
        config._attn_implementation = "sdpa"
        return kind(config)
    except ValueError:
        config._attn_implementation = "eager"
        return kind(config)


def _class(transformers: Any, name: str) -> Any:
    if name in INNER:
        return getattr(importlib.import_module(f"transformers.models.{INNER[name]}"), name)
    return getattr(transformers, name)


def measure(name: str) -> dict[str, Any]:
    """What became of a model, by exporter."""
    module, example = build(name)
    module.eval()
    randomise(module, 0)
    module = steadier(module, example)
    found = {}
    for exporter in EXPORTERS:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "model.onnx"
            try:
                with torch.no_grad():
                    export(module, example, path, exporter, name.partition(": ")[2] not in FIXED)
            except Exception as e:  # exporters raise whatever they like
                found[exporter] = {"unavailable": one_line(e)}
                continue
            found[exporter] = pruned(path)
    return found


def steadier(module: nn.Module, example: torch.Tensor) -> nn.Module:
    """The module with its batch norms settled or as they came, whichever rounds less.

    Statistics that fit nothing let a deep convolutional stage multiply its rounding by a thousand; but those of two
    images make a batch norm of pooled features divide by variances near zero. No comparison of two spellings of such
    a model means anything.
    """
    settled = settle(copy.deepcopy(module), example)
    if settled is None:
        return module
    try:
        return min(settled, module, key=lambda made: rounding(made, example))
    except RuntimeError:  # tables in float32 inside: it cannot be run in float64
        return settled


def settle(module: nn.Module, example: torch.Tensor) -> nn.Module | None:
    """The module once its batch norms know the activations of its weights, as after training; None without any."""
    norms = [part for part in module.modules() if isinstance(part, nn.modules.batchnorm._BatchNorm)]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # plain means over all calls
        norm.train()
    if not norms:
        return None
    with torch.no_grad():
        module(example)
    return module.eval()


def rounding(module: nn.Module, example: torch.Tensor) -> float:
    """Largest difference of an output between float32 and float64, as a fraction of its largest magnitude."""
    with torch.no_grad():
        plain = module(example)
        exact = copy.deepcopy(module).double()(example.double() if example.is_floating_point() else example)
    pairs = [(plain, exact)] if isinstance(plain, torch.Tensor) else zip(plain, exact, strict=True)
    return max(float((ours.double() - theirs).abs().max() / theirs.abs().max()) for ours, theirs in pairs)


def export(module: nn.Module, example: torch.Tensor, path: Path, exporter: str, dynamic: bool = True) -> None:
    """Write the model with its input called `input`; with inputs that are fixed the batch is."""
    kind, opset = exporter.split()
    options: dict[str, Any] = {"input_names": ["input"], "opset_version": int(opset)}
    if kind == "dynamo":
        example = example[:1] if dynamic else example
        torch.onnx.export(module, (example,), path, dynamo=True, external_data=False, verbose=False, **options)
    else:
        axes = {"input": {0: "batch"}} if dynamic else None
        torch.onnx.export(module, (example,), path, dynamo=False, dynamic_axes=axes, **options)


def pruned(path: Path) -> dict[str, Any]:
    """Parts found, reasons, and the twin's largest difference."""
    try:
        dense = look(path)
    except ToastError as e:
        return {"refused": one_line(e)}
    blocks = dense.match.blocks
    attentions, ffns = [b.attention for b in blocks if b.attention], [b.ffn for b in blocks if b.ffn]
    found: dict[str, Any] = {
        "attentions": len(attentions),
        "qk": sum(a.qk_reason is None for a in attentions),
        "vo": sum(a.vo_reason is None for a in attentions),
        "ffns": len(ffns),
        "fc2": sum(f.fc2_reason is None for f in ffns),
        "reasons": reasons(dense),
    }
    if not blocks:
        return found
    try:
        result = prune(dense, parse_ratios(UNEVEN), SyntheticStatistics(dense), skip_unprunable=True)
    except ToastError as e:
        return found | {"refused": one_line(e)}
    assert result.twin is not None
    return found | {"twin": result.twin.worst}


def cell(found: dict[str, Any]) -> str:
    """One result as a table shows it."""
    if "unavailable" in found:
        return "no export"
    if "attentions" not in found:
        return "refused"
    parts = "/".join(str(found[part]) for part in ("attentions", "qk", "vo", "ffns", "fc2"))
    return parts + (" refused" if "refused" in found else "")


def page(done: dict[str, Any]) -> Iterator[str]:
    """The whole page from all results so far."""
    yield from (
        "# Architectures",
        "",
        "What `inspect` finds in models that nobody here changed: the smallest of their kind in timm and Hugging Face",
        "transformers, and the models of vit-pytorch at small sizes; random weights, two layers where a configuration",
        "says how many. A cell counts attentions, how many of them lose dimensions of Q/K and of V/Proj, feed-forward",
        "networks, and how many of those lose hidden units. Every cell was pruned in all these parts and agrees with",
        "its twin; *refused* says that the proof failed, *no export* that the library cannot be exported this way.",
        "Made by `python benchmarks/architectures.py`.",
        "",
        "| model | " + " | ".join(EXPORTERS) + " | twin | what is left as it is, and why |",
        "|---|---|---|---:|---|",
    )
    for name in sorted(done):
        results = [done[name].get(exporter, {"unavailable": ""}) for exporter in EXPORTERS]
        twins = [r["twin"] for r in results if "twin" in r]
        worst = f"{max(twins):.0e}" if twins else "-"
        why = sorted({text for r in results for text in [*r.get("reasons", []), r.get("refused")] if text})
        yield f"| {name} | {' | '.join(map(cell, results))} | {worst} | {'; '.join(why) or 'nothing'} |"
    yield ""


def main() -> None:
    """Fill the table and write it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, required=True, help="JSON file with the results so far")
    parser.add_argument("--only", nargs="*", default=["*"], metavar="PATTERN", help="such as 'timm: vit_*'")
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "architectures.md")
    parser.add_argument("--redo", action="store_true", help="measure again what was measured before")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    if options.one:
        print(json.dumps(measure(options.one)))
        return
    names = [f"{lib}: {name}" for lib, those in LIBRARIES.items() for name in those]
    for name in (n for n in names if any(fnmatch.fnmatch(n, pattern) for pattern in options.only)):
        if name in read(options.results) and not options.redo:
            continue
        command = [sys.executable, __file__, "--results", str(options.results), "--one", name]
        try:
            ran = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=True)
            found = json.loads(ran.stdout.splitlines()[-1])
        except subprocess.TimeoutExpired:
            found = {exporter: {"unavailable": f"not done in {SECONDS} s"} for exporter in EXPORTERS}
        except subprocess.CalledProcessError as e:
            said = (e.stderr.strip().splitlines() or [str(e)])[-1]
            found = {exporter: {"unavailable": said} for exporter in EXPORTERS}
        write_bytes(options.results, json.dumps(read(options.results) | {name: found}, indent=1).encode())
        print(f"{name}: {' | '.join(cell(found[exporter]) for exporter in EXPORTERS)}", flush=True)
    options.output.write_text("\n".join(page(read(options.results))))


if __name__ == "__main__":
    main()
