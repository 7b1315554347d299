"""The schedules published with ToaSt, by name: `paper:deit_small@2.7`."""

from __future__ import annotations

import os
from dataclasses import dataclass
from decimal import Decimal
from difflib import get_close_matches
from functools import cache
from importlib import resources
from typing import Any

from toast_onnx.errors import ConfigError
from toast_onnx.planning.paper_accounting import ModelMacs, paper_gmacs, static_gmacs, swin_macs, vit_macs
from toast_onnx.planning.ratios import Ratios, load_ratios, parse_ratios
from toast_onnx.planning.strict_yaml import read_document

PREFIX = "paper:"


@dataclass(frozen=True)
class Preset:
    """One published schedule with its figures, those of accuracy and speed as the authors report them.

    Attributes:
        model: timm's name of the model.
        short: Our short name of it.
        aliases: Other names it answers to.
        budget: The budget's name, GMACs as the authors round them.
        head: Fraction of every head's dimensions removed (Q/K and V/Proj), one entry a block.
        fc1: Fraction of fc1's inputs removed, one entry a block.
        fc2: Fraction of fc2's inputs removed, one entry a block.
        dense_gmacs: GMACs of the dense model.
        gmacs: GMACs of the schedule in the paper's accounting, which describes selection at run time.
        static_gmacs: GMACs of the static graph that the schedule yields here, which is lower.
        dense_top1: Reported ImageNet top-1 of the dense model, percent.
        top1: Reported top-1 after pruning and fine-tuning, percent.
        speedup: Reported speed-up over the dense model on an H100 at batch 128.
    """

    model: str
    short: str
    aliases: tuple[str, ...]
    budget: str
    head: tuple[Decimal, ...]
    fc1: tuple[Decimal, ...]
    fc2: tuple[Decimal, ...]
    dense_gmacs: float
    gmacs: float
    static_gmacs: float
    dense_top1: float
    top1: float
    speedup: float

    @property
    def name(self) -> str:
        """The name that `--ratios` takes."""
        return f"{PREFIX}{self.short}@{self.budget}"

    @property
    def expects(self) -> str:
        """What the schedule was published for."""
        return (
            f"{self.name} expects fine-tuning: its {self.top1:g} % top-1 is reported after training, and without it "
            "hardly any answer is right; train with `toast-onnx finetune`, or let --macs plan widths that need none "
            "(--compensation ridge keeps these widths and compensates the weights)"
        )

    def ratios(self) -> Ratios:
        """Returns the schedule as a ratios file would hold it.

        The paper's method: coupled `gm` index selection in attention, activation scores in the FFN (which need
        calibration data), nothing compensated, no alignment, the paper's rounding. The first block stays dense.
        """
        document = {
            "version": 1,
            "attention": {
                "qk": list(self.head),
                "vo": list(self.head),
                "select": "index",
                "score": "gm",
                "coupling": "coupled",
            },
            "ffn": {"fc1": list(self.fc1), "fc2": list(self.fc2), "score": "activation", "mode": "static"},
            "align": 1,
            "rounding": "paper",
            "compensation": {"kind": "none"},
        }
        return parse_ratios(document, self.name)


@cache
def list_presets() -> tuple[Preset, ...]:
    """Returns all published schedules, in the order of the paper's tables."""
    source = resources.files("toast_onnx.planning") / "paper_schedules.yaml"
    with resources.as_file(source) as path:
        document: Any = read_document(path)
    return tuple(_preset(model, entry, budget) for model, entry in document.items() for budget in entry["budgets"])


def find_preset(name: str) -> Preset:
    """Returns the preset called `paper:MODEL@BUDGET`; the prefix may be missing.

    Args:
        name: MODEL is a short name (`deit_small`) or timm's, with or without its weight tag; BUDGET one of the model's.

    Raises:
        ConfigError: The model or budget is unknown; the message names the nearest.
    """
    model, separator, budget = name.removeprefix(PREFIX).partition("@")
    presets = [preset for preset in list_presets() if _answers_to(preset, model)]
    if not presets:
        raise ConfigError(f"no preset for model {model!r}{_similar(model) or '.'} `toast-onnx presets` lists them all")
    budgets = ", ".join(f"{PREFIX}{model}@{preset.budget}" for preset in presets)
    if not separator:
        raise ConfigError(f"{name} names no budget; give one of {budgets}")
    for preset in presets:
        if _number(budget) == float(preset.budget):
            return preset
    raise ConfigError(f"{name}: no published budget {budget!r} for this model; give one of {budgets}")


def preset(name: str) -> Ratios:
    """Returns the ratios of the preset called `paper:MODEL@BUDGET` (see `find_preset`).

    Raises:
        ConfigError: The model or budget is unknown; the message names the nearest.
    """
    return find_preset(name).ratios()


def read_ratios(argument: str | os.PathLike[str]) -> Ratios:
    """Returns what `--ratios` asks for: a preset where the text starts with `paper:`, otherwise a file.

    Raises:
        ConfigError: The preset is unknown or the file is at fault.
    """
    text = os.fspath(argument)
    number = _number(text.rstrip("%"))
    if number is not None and not os.path.exists(text):
        part = f"{number / 100 if number > 1 else number:g}"
        raise ConfigError(
            f"--ratios takes a file or a preset, not the number {text}; to remove that much everywhere write a file "
            f"with `version: 1`, `attention: {{qk: {part}, vo: {part}}}` and `ffn: {{fc2: {part}}}`, a line each"
        )
    return preset(text) if text.startswith(PREFIX) else load_ratios(text)


def _preset(model: str, entry: Any, budget: str) -> Preset:
    figures, dense, macs = entry["budgets"][budget], entry["dense"], _dense_macs(entry["shape"])
    blocks = len(macs.blocks)
    head = (Decimal(0), *[Decimal(figures["head"])] * (blocks - 1))
    fc1 = _padded(figures["fc1_last"], blocks)
    fc2 = _padded(figures["fc2_last"], blocks)
    return Preset(
        model=model,
        short=entry["short"],
        aliases=tuple(entry["aliases"]),
        budget=budget,
        head=head,
        fc1=fc1,
        fc2=fc2,
        dense_gmacs=macs.total / 1e9,
        gmacs=paper_gmacs(macs, head, fc1, fc2),
        static_gmacs=static_gmacs(macs, head, fc1, fc2),
        dense_top1=float(dense["top1"]),
        top1=float(figures["top1"]),
        speedup=float(figures["speedup"]),
    )


def _dense_macs(shape: Any) -> ModelMacs:
    if "window" in shape:
        return swin_macs(shape["width"], shape["depths"], shape["heads"], shape["patch"], shape["window"])
    return vit_macs(shape["width"], shape["depths"][0], shape["heads"][0], shape["patch"])


def _padded(last: list[Any], blocks: int) -> tuple[Decimal, ...]:
    """Returns the ratios of all blocks from those of the last ones."""
    return (*[Decimal(0)] * (blocks - len(last)), *map(Decimal, last))


def _answers_to(preset: Preset, model: str) -> bool:
    """Whether a name means this preset's model; timm's tag of the weights, as in `.fb_in1k`, does not matter."""
    names = {preset.model, preset.short, *preset.aliases}
    return model in names or model.partition(".")[0] in names


def _similar(model: str) -> str:
    spellings = {
        name: preset.short for preset in list_presets() for name in (preset.model, preset.short, *preset.aliases)
    }
    nearest = get_close_matches(model, spellings, n=1, cutoff=0.4)
    return f", did you mean {spellings[nearest[0]]}?" if nearest else ""


def _number(text: str) -> float | None:
    try:
        return float(text.rstrip("Gg"))
    except ValueError:
        return None
