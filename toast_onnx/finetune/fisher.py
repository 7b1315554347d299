"""What errors inside a model change of its answers: Fisher information at some tensors, without labels. Needs PyTorch.

The classes are drawn from the model's own answer, so the mean of g g^T over gradients g of their log-likelihood is the
Hessian of the KL divergence from the model as it is (Amari, 1998), as far as one tensor's channels go.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from toast_onnx.errors import DataError
from toast_onnx.finetune.convert import to_torch
from toast_onnx.model import Model
from toast_onnx.require import require_torch, with_gradients

if TYPE_CHECKING:
    import torch

Array = NDArray[np.float64]

#: Classes drawn for each sample.
DRAWS = 2


@dataclass(frozen=True)
class Probe:
    """A tensor that errors are put into.

    Attributes:
        tensor: its name.
        axis: of the channels.
        first_weight: of token 0, where the answers are shown to read it alone; 1 elsewhere.
    """

    tensor: str
    axis: int
    first_weight: float = 1.0


@with_gradients
def fisher(
    model: Model,
    probes: Sequence[Probe],
    classifiers: Sequence[str],
    batches: Iterable[Mapping[str, NDArray[Any]]],
    seed: int = 0,
) -> tuple[dict[str, Array], dict[str, float]]:
    """Sums of g g^T over samples, tokens and draws, g being gradients of the model's answers at some tensors.

    Outputs that hold classes count by the log-likelihood of classes drawn from them; all others by random projections,
    relative to their own size.

    Args:
        model: the model.
        probes: where the gradients are taken.
        classifiers: outputs that hold class scores or probabilities, (batch, classes).
        batches: inputs by name.
        seed: of all draws.

    Returns:
        The sums (channels, channels) by tensor, and by tensor the weights of all tokens added up.

    Raises:
        BackendError: PyTorch is not installed.
        ModelError: an operator of the model has no counterpart in PyTorch.
        DataError: a gradient is not finite, or no tensor has any.
    """
    torch = require_torch("ffn score 'fisher' needs", ", or choose second-order")
    module = to_torch(model)
    draw = torch.Generator().manual_seed(seed)
    names = [probe.tensor for probe in probes]
    sums: dict[str, Array] = {}
    counts = dict.fromkeys(names, 0.0)
    for feeds in batches:
        given = {n: torch.from_numpy(np.array(feeds[n])) for n in module.input_names}
        for tensor in given.values():
            tensor.requires_grad_(tensor.is_floating_point())
        found = module(**given, keep=names)
        outputs = {n: found[n] for n in module.output_names if found[n].requires_grad}
        at = [found[n] for n in names]
        for _ in range(DRAWS):
            answer = sum(_answer(n in classifiers, outputs[n], draw) for n in outputs)
            gradients = torch.autograd.grad(answer, at, retain_graph=True, allow_unused=True)
            for probe, gradient, tensor in zip(probes, gradients, at, strict=True):
                value = torch.zeros_like(tensor) if gradient is None else gradient
                gram, count = _gram(probe, value)
                sums[probe.tensor] = sums.get(probe.tensor, np.zeros(gram.shape)) + gram
                counts[probe.tensor] += count
    if not all(np.isfinite(gram).all() for gram in sums.values()) or not any(gram.any() for gram in sums.values()):
        raise DataError("the model's answers have no usable gradients on these samples; choose ffn score second-order")
    return sums, counts


def _answer(classes: bool, output: torch.Tensor, draw: torch.Generator) -> torch.Tensor:
    """A number whose gradients tell of one output: drawn classes' log-likelihood, or a random projection."""
    import torch

    if not classes:
        size = output.detach().float().square().mean().sqrt().clamp_min(1e-30)
        return (output.float() * torch.randn(output.shape, generator=draw)).sum() / size
    logs = log_likelihoods(output)
    drawn = torch.multinomial(logs.detach().exp(), 1, generator=draw)
    return logs.gather(-1, drawn).sum()


def log_likelihoods(output: torch.Tensor) -> torch.Tensor:
    """Logarithms of the classes' probabilities, of scores or of probabilities (batch, classes); float32."""
    import torch

    rows = output.float()
    held = rows.detach()
    is_likelihood = bool((held >= 0).all()) and torch.allclose(held.sum(-1), held.new_ones(len(held)), atol=1e-3)
    return rows.clamp_min(1e-30).log() if is_likelihood else rows.log_softmax(-1)


def _gram(probe: Probe, gradient: torch.Tensor) -> tuple[Array, float]:
    """Weighted sum of g g^T over all but the channels, and the weights added up."""
    rows = gradient.detach().float().movedim(probe.axis, -1)
    weights = rows.new_ones(rows.shape[:-1])
    if probe.first_weight != 1:
        weights[:, 0] = probe.first_weight
    flat, counted = rows.flatten(0, -2), weights.flatten()
    return ((flat * counted[:, None]).T @ flat).numpy().astype(np.float64), float(counted.sum())
