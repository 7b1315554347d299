"""Attention with two head sizes before a build, and how many attentions became one kernel after it.

A fused kernel has one head size for Q, K and V and works in 16 bits. In 16 bits an uneven attention is therefore padded
with zeros: the products grow by less than what writing the scores to memory and reading them again costs. In float32
nothing fuses, so an uneven `Attention` node, which TensorRT refuses, is written as its parts.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import onnx

from toast_onnx.engines.even_heads import UnevenHeads, even_heads, uneven_heads
from toast_onnx.engines.uneven_attention import spell_out_uneven
from toast_onnx.errors import ConfigError, ModelError
from toast_onnx.matching.cores import find_cores
from toast_onnx.matching.graph import GraphView
from toast_onnx.matching.input_shapes import counted_shapes
from toast_onnx.model import Model

#: What to do with attention whose Q/K and V have different widths.
CHOICES = ("auto", "pad", "write-out")
_HALF = (onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16)


@dataclass(frozen=True)
class SettledHeads:
    """A model as a build should read it.

    Attributes:
        model: the model; the same one where nothing had to be done.
        attentions: how many attentions it holds; None where the graph could not be looked at.
        padded: how many of them were padded with zeros.
        written_out: how many `Attention` nodes were written as their parts.
        notes: what was chosen, with its multiply-accumulates.
    """

    model: Model
    attentions: int | None
    padded: int = 0
    written_out: int = 0
    notes: tuple[str, ...] = ()


def settle_heads(
    model: Model, choice: str, *, sixteen_bits: bool, given: Mapping[str, Sequence[int]] | None = None
) -> SettledHeads:
    """Pad uneven attention or write it out.

    Args:
        model: the model; it is not changed.
        choice: one of `CHOICES`; `auto` pads in 16 bits and writes out otherwise.
        sixteen_bits: whether the engine will compute attention in 16 bits.
        given: concrete shapes of inputs, for axes that are symbolic.

    Raises:
        ConfigError: an unknown choice.
    """
    if choice not in CHOICES:
        raise ConfigError(f"uneven heads: '{choice}' is unknown; use one of {', '.join(CHOICES)}")
    try:
        view = GraphView(model)
        facts = counted_shapes(view, given or {}).facts
    except ModelError as e:
        return SettledHeads(model, None, notes=(f"the attentions of this graph were not looked at: {e}",))
    cores, uneven = find_cores(view, facts)[0], uneven_heads(view, facts)
    half = sixteen_bits or any(facts.elem_type(core.q) in _HALF for core in cores)
    notes = []
    padded = 0
    if uneven and (choice == "pad" or (choice == "auto" and half)):
        evened = even_heads(model, given)
        model, padded = evened.model, len(evened.padded)
        if padded:
            notes.append(
                f"{_described(evened.padded)}: padded with zeros to one width, to be one fused kernel each, at "
                f"{_giga(evened.macs[1])} instead of {_giga(evened.macs[0])} (--uneven-heads write-out does not pad)"
            )
        uneven = [(core, left) for core, left in uneven if left in evened.left]
    spelled, written = spell_out_uneven(model)
    if written:
        cost = even_heads(model, given).macs
        notes.append(
            f"{written} Attention nodes with keys and values of different widths are built from their parts at "
            f"{_giga(cost[0])}: TensorRT takes them fused where both widths are equal, and padded with zeros at "
            f"{_giga(cost[1])} (--uneven-heads pad)"
        )
    elif uneven and half:
        notes.append(f"{_described([u for _, u in uneven])}: left in parts, which no fused kernel takes")
    return SettledHeads(spelled, len(cores), padded, written, tuple(notes))


def fused_notes(found: int, fused: int, dense: tuple[int, int] | None, *, sixteen_bits: bool) -> list[str]:
    """What to say of attentions that did not become one kernel.

    Args:
        found: attentions in the graph.
        fused: those that are one kernel in the engine.
        dense: the same two numbers of the dense model's engine, where it is known.
        sixteen_bits: whether the engine computes in 16 bits; in float32 nothing fuses.
    """
    if dense is not None and fused * dense[0] < dense[1] * found:
        return [
            f"pruning unfused attention: {fused} of {found} are one kernel in this engine, {dense[1]} of {dense[0]} in "
            "the dense model's; keep Q/K and V/Proj at one width, a multiple of 8 from 16 (`attention: {tie: true}`), "
            "or let --uneven-heads pad them"
        ]
    if sixteen_bits and fused < found:
        return [f"{fused} of {found} attentions are one fused kernel in this engine, the others run in parts"]
    return []


def attention_entry(settled: SettledHeads, fused: int | None) -> dict[str, Any] | None:
    """What the JSON beside an engine says of its attentions; None where nothing is known."""
    if settled.attentions is None:
        return None
    return {
        "found": settled.attentions,
        "fused": fused,
        "padded": settled.padded,
        "written_out": settled.written_out,
    }


def _described(uneven: Sequence[UnevenHeads]) -> str:
    """Such as `12 attentions with 32 dimensions in Q/K and 48 in V`."""
    counts = Counter((u.qk_dim, u.vo_dim) for u in uneven)
    parts = [f"{n} with {qk} dimensions in Q/K and {vo} in V" for (qk, vo), n in counts.items()]
    return f"attentions of two head sizes ({'; '.join(parts[:4])}{'; ...' if len(parts) > 4 else ''})"


def _giga(macs: int) -> str:
    return f"{macs / 1e9:.3f} GMACs"
