"""How timm and Hugging Face models are built and called here."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn

from tests.zoo.described import Subject

_DECLARED: list[torch.library.Library] = []  # a declaration lasts as long as its Library object


@functools.cache
def declare_torchvision_operators() -> None:
    """Declare two native operators that importing torchvision needs, where its compiled library does not load."""
    for name in ("nms", "qnms"):
        if not hasattr(torch.ops.torchvision, name):
            _DECLARED.append(torch.library.Library("torchvision", "FRAGMENT"))
            _DECLARED[-1].define(f"{name}(Tensor boxes, Tensor scores, float threshold) -> Tensor")


def image(size: int, batch: int = 1) -> Tensor:
    """Seeded square images (batch, 3, size, size)."""
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(0))


def timm_subject(name: str, size: int, fused: bool = True, **options: Any) -> Subject:
    """A timm model with 10 classes; `fused` chooses PyTorch's scaled_dot_product_attention.

    Options overrule; `img_size=None` is for models that take any size and no such option.
    """
    import timm

    given = {name: value for name, value in ({"img_size": size} | options).items() if value is not None}
    module = timm.create_model(name, pretrained=False, num_classes=10, **given)
    for part in module.modules():
        if hasattr(part, "fused_attn"):
            part.fused_attn = fused
    return Subject(module, {"input": image(size)}, ("logits",))


class Outputs(nn.Module):
    """Calls a Hugging Face model with named inputs and returns the named fields of its output as a tuple of tensors."""

    def __init__(self, model: nn.Module, inputs: tuple[str, ...], outputs: tuple[str, ...]) -> None:
        super().__init__()
        self.model, self.inputs, self.outputs = model, inputs, outputs

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        result = self.model(**dict(zip(self.inputs, tensors, strict=True)))
        return tuple(result[name] for name in self.outputs)


def hf_subject(model: str, config: Any, inputs: dict[str, Tensor], *outputs: str, attention: str = "eager") -> Subject:
    """A model of transformers by class name, wrapped so that it takes `inputs` and returns the fields `outputs`."""
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


def hf_image(model: str, config: str, *outputs: str, attention: str = "eager", **options: Any) -> Subject:
    """A Hugging Face model that reads square images, its configuration made from `options`."""
    import transformers

    made = getattr(transformers, config)(**options)
    return hf_subject(model, made, {"pixel_values": image(options["image_size"])}, *outputs, attention=attention)


def image_of(height: int, width: int) -> Tensor:
    """One seeded image (1, 3, height, width)."""
    return torch.randn(1, 3, height, width, generator=torch.Generator().manual_seed(0))
