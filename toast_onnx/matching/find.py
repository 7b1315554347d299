"""Finding all transformer blocks of a model."""

from __future__ import annotations

import os.path
from collections import Counter
from collections.abc import Sequence

from toast_onnx.errors import ModelError
from toast_onnx.matching.attention import match_attention
from toast_onnx.matching.blocks import Attention, Block, Ffn, Match
from toast_onnx.matching.cores import find_cores
from toast_onnx.matching.facts import Probe
from toast_onnx.matching.ffn import match_ffn
from toast_onnx.matching.graph import GraphView, scopes_of
from toast_onnx.matching.linear import find_linears
from toast_onnx.matching.operators import ATTENTIONS, QUANTIZED
from toast_onnx.model import all_nodes
from toast_onnx.reasons import Decline, Kind, Reason

#: Operators that a transformer block's layers are made of.
_PRODUCTS = ("MatMul", "Gemm", "Conv", "Einsum", "FusedMatMul", *ATTENTIONS)


def find_blocks(probe: Probe) -> Match:
    """Find attention and feed-forward blocks.

    Args:
        probe: the graph and its facts.
    """
    view, facts = probe.view, probe.facts
    linears = find_linears(view, facts)
    declined: dict[str, Reason] = {}
    cores, no_cores = find_cores(view, facts)
    declined.update({view.label(i): reason for i, reason in no_cores.items()})
    parts: list[tuple[int, Attention | Ffn]] = []
    for core in cores:
        try:
            parts.append((core.softmax, match_attention(probe, linears, core)))
        except Decline as e:
            declined[view.label(core.softmax)] = e.reason
    for fc2 in linears.values():
        try:
            ffn = match_ffn(view, facts, linears, fc2)
        except Decline as e:
            declined[view.label(fc2.node)] = e.reason
            continue
        except ModelError as e:
            declined[view.label(fc2.node)] = Kind.UNEVALUATED.says("{error}", error=e)
            continue
        if ffn is not None:
            parts.append((fc2.node, ffn))
    parts.sort(key=lambda p: p[0])
    quantized = [i for i, node in enumerate(view.nodes) if node.op_type in QUANTIZED]
    if quantized and not parts:
        label, text = view.label(quantized[0]), "{nodes} nodes are quantized; prune first, then quantize"
        declined[label] = Kind.QUANTIZED.says(text, node=label, nodes=len(quantized))
    declined.update(_hidden_in_bodies(view))
    return Match(tuple(_group(view, [p for _, p in parts])), declined)


def _hidden_in_bodies(view: GraphView) -> dict[str, Reason]:
    """Control flow whose bodies hold attention or products, which no search here enters: node label -> reason."""
    hidden = {}
    for i, node in enumerate(view.nodes):
        ops = Counter(inner.op_type for inner in all_nodes([node]) if inner is not node)
        products = sum(ops[op] for op in _PRODUCTS)
        if products:
            softmaxes = sum(ops[op] for op in ("Softmax", *ATTENTIONS))
            hidden[view.label(i)] = Kind.BODY.says(
                "its body holds {products} matrix products and {softmaxes} attentions or softmaxes, and bodies of "
                "{operator} are not looked into; export the model without the condition or loop",
                node=view.label(i),
                operator=node.op_type,
                products=products,
                softmaxes=softmaxes,
            )
    return hidden


def _group(view: GraphView, parts: Sequence[Attention | Ffn]) -> list[Block]:
    """Pair every attention with the feed-forward network that follows it."""
    pairs: list[tuple[Attention | None, Ffn | None]] = []
    for part in parts:
        if isinstance(part, Attention):
            pairs.append((part, None))
        elif pairs and pairs[-1][1] is None:
            pairs[-1] = (pairs[-1][0], part)
        else:
            pairs.append((None, part))
    blocks = []
    for index, (attention, ffn) in enumerate(pairs):
        nodes = [*_attention_nodes(attention), *_ffn_nodes(ffn)]
        names = tuple(name for i in nodes if (name := view.nodes[i].name))
        blocks.append(Block(index, _block_name(view, nodes, index), names, attention, ffn))
    return blocks


def _attention_nodes(attention: Attention | None) -> list[int]:
    if attention is None:
        return []
    return sorted({*attention.core.nodes, *(i for linear in attention.linears for i in linear.nodes)})


def _ffn_nodes(ffn: Ffn | None) -> list[int]:
    return [] if ffn is None else [i for linear in ffn.linears for i in linear.nodes]


def _block_name(view: GraphView, nodes: Sequence[int], index: int) -> str:
    """The module path that the nodes share, from exporter metadata or from node names."""
    scopes = [scopes_of(view.nodes[i]) for i in nodes]
    if all(scopes):
        shared = [s for s in scopes[0] if s and all(s in other for other in scopes)]
        if shared:
            return max(shared, key=len)
    paths = [view.nodes[i].name for i in nodes if "/" in view.nodes[i].name]
    if paths:
        common = os.path.commonpath(paths) if all(p.startswith("/") == paths[0].startswith("/") for p in paths) else ""
        if common.strip("/"):
            return common.strip("/")
    return f"block.{index}"
