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


def relative_mse(student: Tensor, teacher: Tensor, class_token: float = 1.0) -> Tensor:
    """Mean squared error as a fraction of the teacher's variance; (B, ..., C).

    The variance is taken around each channel's mean over batch and tokens, so that the constant part that a residual
    stream carries does not hide the error. Where nothing varies, around zero.

    Args:
        student: what is trained.
        teacher: what it should be.
        class_token: how often token 0 of (B, N, C) tensors counts in both means, against once for the others.
    """
    s, t = student.float(), teacher.float()
    dims = list(range(t.ndim - 1))
    error = (s - t).square()
    spread = (t - t.mean(dims, keepdim=True)).square() if t.numel() > t.shape[-1] else t.square()
    if class_token != 1.0 and t.ndim == 3:
        weight = torch.ones(t.shape[1], 1, device=t.device)
        weight[0] = class_token
        error, spread = error * weight, spread * weight
    scale = spread.mean()
    scale = torch.where(scale > 0, scale, t.square().mean())
    return error.mean() / scale.clamp_min(torch.finfo(torch.float32).tiny)


def cross_entropy(logits: Tensor, targets: Tensor, smoothing: float = 0.0) -> Tensor:
    """Cross-entropy with labels: class numbers (B,), or distributions (B, K) where images were blended."""
    return F.cross_entropy(logits.float(), targets, label_smoothing=smoothing)
