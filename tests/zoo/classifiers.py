"""Families of image classifiers, vision towers and text encoders."""

from __future__ import annotations

import dataclasses
import functools
import os
from pathlib import Path

import torch

from tests.zoo.described import Subject, Unavailable, family
from tests.zoo.libraries import TINY, hf_image, hf_subject, image, timm_subject

# --- families of the first stage ---

for _suffix, _fused in (("", True), ("-unfused", False)):
    for _name, _model, _size, _options in (
        ("timm-vit", "vit_tiny_patch16_224", 64, {"depth": 2}),
        ("timm-deit", "deit_tiny_patch16_224", 64, {"depth": 3}),
        ("timm-deit-distilled", "deit_tiny_distilled_patch16_224", 64, {"depth": 2}),
        ("timm-swin", "swin_tiny_patch4_window7_224", 112, {"depths": (2, 2), "num_heads": (3, 6)}),
    ):
        family(_name + _suffix)(functools.partial(timm_subject, _model, _size, _fused, **_options))

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
        family(_name + _suffix)(functools.partial(hf_image, *_arguments, attention=_kind, **_options))


def _hf_vitmae(attention: str) -> Subject:
    """The encoder; its random masking sorts a noise tensor, which is an input here so that a run can be repeated."""
    import transformers

    config = transformers.ViTMAEConfig(**TINY | {"image_size": 96}, mask_ratio=0.5)
    inputs = {"pixel_values": image(96), "noise": torch.rand(1, 36, generator=torch.Generator().manual_seed(1))}
    return hf_subject("ViTMAEModel", config, inputs, "last_hidden_state", "ids_restore", attention=attention)


family("hf-vitmae")(functools.partial(_hf_vitmae, "sdpa"))
family("hf-vitmae-eager")(functools.partial(_hf_vitmae, "eager"))


@family("deit-tiny-real")
def _deit_tiny_real() -> Subject:
    """DeiT-Tiny at 224x224 with trained weights; these stay as they are."""
    import timm
    from safetensors.torch import load_file

    if "TOAST_DATA" not in os.environ:
        raise Unavailable("TOAST_DATA is not set: it names the folder with weights/deit_tiny_patch16_224.safetensors")
    subject = timm_subject("deit_tiny_patch16_224", 224)
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
    ("timm-vit-parallel", "vit_small_patch16_18x2_224", 64, {"depth": 2}),
    ("timm-dinov3", "vit_tiny_patch16_dinov3_qkvb", 64, {"depth": 2}),
    ("timm-hiera", "hiera_tiny_224", 64, {"stages": (1, 1, 2, 1), "fused": False}),
    ("timm-cait", "cait_xxs24_224", 64, {"depth": 2}),
    ("timm-sam2", "sam2_hiera_tiny", 128, {"img_size": None, "stages": (1, 1, 2, 1), "global_att_blocks": (3,)}),
    ("timm-eva02", "eva02_tiny_patch14_224", 70, {"depth": 2}),
    ("timm-eva02-unfused", "eva02_tiny_patch14_224", 70, {"depth": 2, "fused": False}),
    ("timm-eva02-base", "eva02_base_patch14_224", 70, SMALL),
    ("timm-eva02-base-unfused", "eva02_base_patch14_224", 70, SMALL | {"fused": False}),
):
    family(_name, 2)(functools.partial(timm_subject, _model, _size, **_options))

CLIP = TINY | {"projection_dim": 64}
GIANT = DINO | {"use_swiglu_ffn": True}
SEGFORMER = {"image_size": 64, "depths": [1, 1, 1, 1], "hidden_sizes": [32, 64, 96, 128], "decoder_hidden_size": 64}
BEIT = TINY | {"use_relative_position_bias": True, "use_absolute_position_embeddings": True, "num_labels": 10}
SWINV2 = SWIN | {"image_size": 128, "window_size": 8}

for _name, _arguments, _options in (
    ("hf-dinov2-giant", ("Dinov2Model", "Dinov2Config", "last_hidden_state"), GIANT),
    ("hf-dinov2-registers", ("Dinov2WithRegistersModel", "Dinov2WithRegistersConfig", "last_hidden_state"), DINO),
    ("hf-beit", ("BeitForImageClassification", "BeitConfig", "logits"), BEIT),
    ("hf-clip", ("CLIPVisionModelWithProjection", "CLIPVisionConfig", "image_embeds", "last_hidden_state"), CLIP),
    ("hf-siglip", ("SiglipVisionModel", "SiglipVisionConfig", "last_hidden_state", "pooler_output"), TINY),
    ("hf-segformer", ("SegformerForSemanticSegmentation", "SegformerConfig", "logits"), SEGFORMER),
    ("hf-swinv2", ("Swinv2ForImageClassification", "Swinv2Config", "logits"), SWINV2),
):
    _kind = "eager" if _name == "hf-swinv2" else "sdpa"  # Hugging Face has cosine attention in its eager form only
    family(_name, 2)(functools.partial(hf_image, *_arguments, attention=_kind, **_options))


@family("hf-vitmae-pretraining", 2)
def _hf_vitmae_pretraining() -> Subject:
    """Encoder of width 192 on the visible patches, decoder of width 128 on all."""
    import transformers

    decoder = {"decoder_hidden_size": 128, "decoder_num_attention_heads": 4, "decoder_num_hidden_layers": 2}
    config = transformers.ViTMAEConfig(**TINY | {"image_size": 96}, **decoder, decoder_intermediate_size=512)
    inputs = {"pixel_values": image(96), "noise": torch.rand(1, 36, generator=torch.Generator().manual_seed(1))}
    return hf_subject("ViTMAEForPreTraining", config, inputs, "logits", "mask", attention="sdpa")


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
    return Subject(module, {"input": image(112 if version == 1 else 128)}, ("logits",))


family("torchvision-swin", 2)(functools.partial(_torchvision_swin, 1))
family("torchvision-swinv2", 2)(functools.partial(_torchvision_swin, 2))


@family("torchvision-vit", 2)
def _torchvision_vit() -> Subject:
    from torchvision.models import VisionTransformer

    module = VisionTransformer(
        image_size=64, patch_size=16, num_layers=2, num_heads=3, hidden_dim=192, mlp_dim=768, num_classes=10
    )
    return Subject(module, {"input": image(64)}, ("logits",))


def _hf_text(hidden: int, heads: int, attention: str) -> Subject:
    """BERT's encoder with a mask and segment ids as inputs; MiniLM is the same at width 384, head size 32."""
    import transformers

    sizes = {"hidden_size": hidden, "num_attention_heads": heads, "intermediate_size": 4 * hidden}
    config = transformers.BertConfig(**sizes, num_hidden_layers=2, vocab_size=100, max_position_embeddings=64)
    ids = torch.randint(1, 100, (1, 12), generator=torch.Generator().manual_seed(0))
    mask = (torch.arange(12) < 9).long()[None]
    inputs = {"input_ids": ids, "attention_mask": mask, "token_type_ids": ids % 2}
    subject = hf_subject("BertModel", config, inputs, "last_hidden_state", "pooler_output", attention=attention)
    return dataclasses.replace(subject, symbolic=tuple((name, 1, "sequence") for name in inputs))


family("hf-bert", 2)(functools.partial(_hf_text, 192, 3, "sdpa"))
family("hf-bert-eager", 2)(functools.partial(_hf_text, 192, 3, "eager"))
family("hf-minilm", 2)(functools.partial(_hf_text, 384, 12, "sdpa"))
