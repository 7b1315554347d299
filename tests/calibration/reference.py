"""Statistics computed a second time: float64 NumPy on activations hooked from the original PyTorch module."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from tests import zoo
from toast_onnx.importance.moments import Moments


@dataclass(frozen=True)
class Reference:
    """One block, as the module computes it.

    Attributes:
        q, k: (groups, heads, tokens, d); a group is an image or a window.
        p: (groups, heads, tokens, tokens) attention probabilities.
        context: (groups, tokens, heads * d).
        hidden: (items, tokens, width).
        inputs: (items, tokens, in_features).
    """

    q: np.ndarray
    k: np.ndarray
    p: np.ndarray
    context: np.ndarray
    hidden: np.ndarray
    inputs: np.ndarray


def references(family: str, feeds: dict[str, np.ndarray]) -> list[Reference]:
    """Run the family's module in double precision and gather what each block's layers read."""
    subject = zoo.build(family)
    module = subject.module.double()
    read: dict[int, Tensor] = {}  # start of a layer's weights -> its input
    drops: dict[str, Tensor] = {}  # timm's dropout on the probabilities, by module name
    for name, part in module.named_modules():
        if isinstance(part, nn.Linear):
            part.register_forward_pre_hook(lambda m, args: read.__setitem__(m.weight.data_ptr(), args[0]))
        elif name.endswith("attn_drop"):
            part.register_forward_pre_hook(lambda m, args, name=name: drops.__setitem__(name, args[0]))
    tensors = [torch.from_numpy(feeds[n]) for n in subject.inputs]
    with torch.no_grad():
        module(*(t.double() if t.is_floating_point() else t for t in tensors))
    mask = feeds.get("attention_mask")
    found = []
    for a, f in zip(zoo.attentions(module), zoo.ffns(module), strict=True):
        x = read[a.q[0].data_ptr()].numpy()
        q, k = (_heads(x, part, a.heads) for part in (a.q, a.k))
        probabilities = drops.get(f"{a.name}.attn_drop")
        p = _softmax(q, k, mask) if probabilities is None else probabilities.numpy()
        layers = [read[t.data_ptr()].numpy() for t in (a.proj, f.exit, f.entries[0])]
        context, hidden, inputs = (t.reshape(t.shape[0], -1, t.shape[-1]) for t in layers)
        found.append(Reference(q, k, p, context, hidden, inputs))
    return found


def _heads(x: np.ndarray, layer: tuple[Tensor, ...], heads: int) -> np.ndarray:
    y = x @ layer[0].numpy().T + (layer[1].numpy() if len(layer) > 1 else 0)
    return y.reshape(*x.shape[:2], heads, -1).transpose(0, 2, 1, 3)


def _softmax(q: np.ndarray, k: np.ndarray, mask: np.ndarray | None) -> np.ndarray:
    scores = q @ k.swapaxes(-1, -2) / np.sqrt(q.shape[-1])
    if mask is not None:
        scores = np.where(mask[:, None, None, :] > 0, scores, -np.inf)
    e = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def moments(x: np.ndarray, weights: np.ndarray) -> Moments:
    """Moments of tokens (groups, tokens, n) with weights (groups, tokens)."""
    return Moments.of(x.reshape(-1, x.shape[-1]), np.broadcast_to(weights, x.shape[:2]).reshape(-1))


def query_moments(r: Reference, weights: np.ndarray) -> np.ndarray:
    """E[q q^T] with token weights (groups, tokens), (heads, d, d)."""
    w = np.broadcast_to(weights, (r.q.shape[0], r.q.shape[2]))
    return np.asarray(np.einsum("ghne,ghnf,gn->hef", r.q, r.q, w) / w.sum())


def seen_keys(r: Reference, valid: np.ndarray) -> np.ndarray:
    """Covariance of the keys around what each counting query sees, weighted by its attention, (heads, d, d)."""
    w = np.broadcast_to(valid, (r.q.shape[0], r.q.shape[2]))
    centred = r.k[:, :, None] - (r.p @ r.k)[:, :, :, None]  # (groups, heads, queries, keys, d)
    return np.asarray(np.einsum("ghij,gi,ghije,ghijf->hef", r.p, w, centred, centred, optimize=True) / w.sum())


def image_keys(r: Reference, valid: np.ndarray) -> np.ndarray:
    """Covariance of the keys around their group's mean over the tokens that count, (heads, d, d)."""
    w = np.broadcast_to(valid, (r.k.shape[0], r.k.shape[2]))[:, None, :, None].astype(np.float64)
    centred = (r.k - (r.k * w).sum(axis=2, keepdims=True) / w.sum(axis=2, keepdims=True)) * w
    return np.asarray(np.einsum("ghne,ghnf->hef", centred, centred) / w.sum())
