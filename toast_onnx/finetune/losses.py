"""What is minimised: distances between the pruned model's tensors and the dense one's, and labels."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def kl_divergence(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """Mean over the batch of T^2 KL(teacher || student) at temperature T (Hinton et al. 2015); logits (..., K)."""
    s = F.log_softmax(student.float() / temperature, -1).flatten(0, -2)
    t = F.log_softmax(teacher.float() / temperature, -1).flatten(0, -2)
    return F.kl_div(s, t, reduction="batchmean", log_target=True) * temperature**2


def relative_mse(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared error as a fraction of the teacher's variance; (B, ..., C).

    The variance is taken around each channel's mean over batch and tokens, so that the constant part that a residual
    stream carries does not hide the error. Where nothing varies, around zero.
    """
    s, t = student.float(), teacher.float()
    dims = list(range(t.ndim - 1))
    spread = (t - t.mean(dims, keepdim=True)).square().mean() if t.numel() > t.shape[-1] else t.square().mean()
    spread = torch.where(spread > 0, spread, t.square().mean())
    return (s - t).square().mean() / spread.clamp_min(torch.finfo(torch.float32).tiny)


def cross_entropy(logits: Tensor, targets: Tensor, smoothing: float = 0.0) -> Tensor:
    """Cross-entropy with labels: class numbers (B,), or distributions (B, K) where images were blended."""
    return F.cross_entropy(logits.float(), targets, label_smoothing=smoothing)
