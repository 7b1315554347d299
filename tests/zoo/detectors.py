"""Families of detection and segmentation models; height and width are symbolic with the batch where they can be."""

from __future__ import annotations

import dataclasses

from tests.zoo.described import Subject, family
from tests.zoo.libraries import TINY, hf_subject, image, image_of

IMAGE_AXES = (("pixel_values", 2, "height"), ("pixel_values", 3, "width"))
PYRAMID = {"embed_dim": 48, "depths": [2, 2, 1, 1], "num_heads": [3, 6, 12, 24], "window_size": 4, "image_size": 64}
STAGES = ["stage1", "stage2", "stage3", "stage4"]


@family("hf-yolos", 2)
def _hf_yolos() -> Subject:
    import transformers

    options = TINY | {"image_size": [64, 96], "num_detection_tokens": 10}
    config = transformers.YolosConfig(**options, num_labels=5)
    inputs = {"pixel_values": image_of(64, 96)}
    subject = hf_subject("YolosForObjectDetection", config, inputs, "logits", "pred_boxes", attention="sdpa")
    return dataclasses.replace(subject, symbolic=IMAGE_AXES)


@family("hf-vitdet", 2)
def _hf_vitdet() -> Subject:
    """One block on windows (padded: 3 does not divide 8), one on all; relative positions read Q a second time."""
    import transformers

    sizes = {"hidden_size": 192, "num_attention_heads": 3, "num_hidden_layers": 2, "image_size": 128, "patch_size": 16}
    config = transformers.VitDetConfig(
        **sizes, pretrainimage_size=128, window_block_indices=[0], window_size=3, use_relative_position_embeddings=True
    )
    return hf_subject("VitDetModel", config, {"pixel_values": image(128)}, "last_hidden_state")


@family("hf-upernet", 2)
def _hf_upernet() -> Subject:
    """Semantic segmentation on a Swin backbone, whose last stage (6 x 6) the pooling pyramid (1, 2, 3, 6) divides."""
    import transformers

    backbone = transformers.SwinConfig(**PYRAMID | {"image_size": 192, "window_size": 6}, out_features=STAGES)
    options = {"hidden_size": 64, "use_auxiliary_head": False, "num_labels": 5}
    config = transformers.UperNetConfig(backbone_config=backbone, **options)
    return hf_subject("UperNetForSemanticSegmentation", config, {"pixel_values": image(192)}, "logits")


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
    subject = hf_subject("MaskFormerForInstanceSegmentation", config, {"pixel_values": image_of(64, 96)}, *outputs)
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
    inputs = {"pixel_values": image_of(64, 96)}
    subject = hf_subject("Mask2FormerForUniversalSegmentation", config, inputs, *outputs)
    return dataclasses.replace(subject, symbolic=IMAGE_AXES)


@family("hf-detr", 2)
def _hf_detr() -> Subject:
    """Convolutional backbone, transformer encoder and decoder."""
    import transformers

    sizes = {"embedding_size": 16, "hidden_sizes": [16, 32, 48, 64], "depths": [1, 1, 1, 1]}
    backbone = transformers.ResNetConfig(**sizes, layer_type="basic", out_features=["stage4"])
    config = transformers.DetrConfig(**DECODER, backbone_config=backbone, num_labels=5)
    inputs = {"pixel_values": image_of(64, 96)}
    subject = hf_subject("DetrForObjectDetection", config, inputs, "logits", "pred_boxes")
    return dataclasses.replace(subject, symbolic=IMAGE_AXES)
