"""A plan as a ratios file: the ratio for each kept count, with what was asked for and predicted as comments."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from decimal import ROUND_HALF_EVEN, Decimal
from typing import Any

from toast_onnx.planning.ratios import Ratios, parse_ratios
from toast_onnx.planning.schema import plain
from toast_onnx.planning.search import Kept
from toast_onnx.planning.width_costs import PARTS, Part, aligned_to
from toast_onnx.planning.widths import kept_count

_SECTIONS: dict[Part, str] = {
    "heads": "attention",
    "qk": "attention",
    "vo": "attention",
    "fc1": "ffn",
    "fc2": "ffn",
}


def selection_only(ratios: Ratios) -> Ratios:
    """The same selection, scores, compensation and alignment with nothing removed."""
    return parse_ratios(_without_ratios(ratios))


def planned_ratios(
    settings: Ratios, kept: Kept, dense: Sequence[Mapping[Part, int]], merge: Sequence[Decimal] = ()
) -> Ratios:
    """Ratios that keep exactly the planned counts.

    Args:
        settings: selection, scores, compensation and alignment; its own ratios do not count.
        kept: block number -> part -> kept count; what is missing keeps its width.
        dense: for each block the widths of its parts.
        merge: for each block the share of the entering tokens that is merged away behind its attention; empty for none.
    """
    document = _without_ratios(settings)
    if any(merge):
        document.setdefault("tokens", {})["merge"] = list(merge)
    for part in PARTS:
        align = aligned_to(part, settings.align)
        ratios = [
            exact_ratio(width[part], kept.get(index, {}).get(part, width[part]), align) if part in width else Decimal(0)
            for index, width in enumerate(dense)
        ]
        if any(ratios):
            document.setdefault(_SECTIONS[part], {})[part] = ratios
    return parse_ratios(document)


def exact_ratio(width: int, kept: int, align: int) -> Decimal:
    """The shortest ratio for which `kept_count` keeps exactly `kept` of `width`.

    Raises:
        ValueError: no ratio keeps that count at this alignment.
    """
    if kept == width:
        return Decimal(0)
    exact = 1 - Decimal(kept) / Decimal(width)
    for digits in range(2, 12):
        ratio = exact.quantize(Decimal(1).scaleb(-digits), ROUND_HALF_EVEN)
        if 0 < ratio < 1 and kept_count(width, ratio, align) == kept:
            return ratio.normalize()
    raise ValueError(f"no ratio keeps {kept} of {width} at an alignment of {align}")


def _without_ratios(ratios: Ratios) -> dict[Any, Any]:
    document: dict[Any, Any] = {"version": ratios.version, **plain(ratios, given_only=True)}
    overrides = document.pop("blocks", {})
    for section in (document, *overrides.values()):
        section.get("tokens", {}).pop("merge", None)
        for part, name in _SECTIONS.items():
            section.get(name, {}).pop(part, None)
        for name in ("attention", "ffn", "tokens"):
            if name in section and not section[name]:
                del section[name]
    overrides = {block: settings for block, settings in overrides.items() if settings}
    return document | ({"blocks": overrides} if overrides else {})
