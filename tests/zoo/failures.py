"""Cases that the library itself cannot export."""

from __future__ import annotations

import fnmatch

from tests.zoo.described import BATCHES, EXPORTERS, FAMILIES, STAGE, Case

# Pattern of case ids -> the library's error, shortened.
KNOWN_FAILURES: dict[str, str] = {
    "timm-eva02/torchscript-*": "timm: is_causal of scaled_dot_product_attention is traced as a tensor",
    "timm-eva02-base/torchscript-*": "timm: is_causal of scaled_dot_product_attention is traced as a tensor",
    "timm-dinov3/torchscript-*": "timm: is_causal of scaled_dot_product_attention is traced as a tensor",
    "hf-dinov2-registers/torchscript-*": "aten::_upsample_bicubic2d_aa has no TorchScript export",
    "hf-upernet/torchscript-*/dynamic*": "adaptive_avg_pool2d needs a known input size",
    "hf-mask2former/torchscript-14/*": "aten::grid_sampler has a TorchScript export from opset 16 on",
}


def why_not(case: Case) -> str | None:
    """Why the library itself cannot export this case (its own error, shortened), or None."""
    return next((why for pattern, why in KNOWN_FAILURES.items() if fnmatch.fnmatchcase(case.id, pattern)), None)


def cases(stage: int = 1, planted: bool = False) -> list[Case]:
    """Every case of a stage that its library can export, in a fixed order."""
    every = (Case(f, e, b, planted) for f in FAMILIES if STAGE[f] == stage for e in EXPORTERS for b in BATCHES)
    return [case for case in every if why_not(case) is None]
