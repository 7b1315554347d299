"""Token channel selection, ToaSt's score of FFN channels (arXiv 2602.15720): how strongly the tokens use a channel."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]

CLASS_WEIGHT = 2.0  # the paper's boost of the class token


def token_channel_scores(
    patches: ArrayLike, class_token: ArrayLike | None = None, patch_count: int = 0, class_weight: float = CLASS_WEIGHT
) -> Array:
    """Scores of channels from mean magnitudes, with the class token as one token among many after its boost.

    Args:
        patches: (C,) mean over images and (sampled) patches of |x_p|, times the class token's head-averaged
            attention to p where the model has a class token (see `attended_magnitude`).
        class_token: (C,) mean over images of |x_cls|; None where there is no class token (Swin).
        patch_count: P, the patches of one image (not the sampled ones); read with a class token only.
        class_weight: boost of the class token.

    Returns:
        (C,), the highest stay.
    """
    patch_mean = np.asarray(patches, dtype=np.float64)
    if class_token is None:
        return patch_mean
    boosted = class_weight * np.asarray(class_token, dtype=np.float64)
    return (boosted + patch_count * patch_mean) / (1.0 + patch_count)


def attended_magnitude(tokens: ArrayLike, attention: ArrayLike | None = None) -> Array:
    """Mean of |x_p| over images and patches, each patch weighted by the attention it gets from the class token.

    Args:
        tokens: (B, P, C) patches, without the class token.
        attention: (B, P) from the class token, averaged over heads; averaged over the batch here, as in the paper.

    Returns:
        (C,).
    """
    magnitude = np.abs(np.asarray(tokens, dtype=np.float64))
    if attention is not None:
        magnitude = magnitude * np.asarray(attention, dtype=np.float64).mean(axis=0)[None, :, None]
    return np.asarray(magnitude.mean(axis=(0, 1)), dtype=np.float64)


def sample_patches(patch_count: int, fraction: float, seed: int) -> NDArray[np.int64]:
    """Patch numbers 0..P-1 drawn with replacement, max(1, int(P * fraction)) of them; all once where fraction >= 1.

    The paper draws 2 % of the patches of a ViT and 20 % of a Swin's.
    """
    count = max(1, int(patch_count * fraction))
    if count >= patch_count:
        return np.arange(patch_count, dtype=np.int64)
    return np.random.default_rng(seed).integers(0, patch_count, size=count, dtype=np.int64)
