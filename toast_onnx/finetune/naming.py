"""Readable parameter names: the module path an exporter left behind, and the weight's role."""

from __future__ import annotations

import re

import onnx

from toast_onnx.matching.graph import scopes_of

_MADE_UP = re.compile(r"^(onnx::.*|val_\d+|_val_\d+|\d+|[A-Za-z_]+_\d+|unsqueeze.*|t_\d+)$")
_ROLES = {
    ("MatMul", 0): "weight",
    ("MatMul", 1): "weight",
    ("Gemm", 1): "weight",
    ("Gemm", 2): "bias",
    ("Conv", 1): "weight",
    ("Conv", 2): "bias",
    ("ConvTranspose", 1): "weight",
    ("ConvTranspose", 2): "bias",
    ("Mul", 0): "scale",
    ("Mul", 1): "scale",
    ("Add", 0): "bias",
    ("Add", 1): "bias",
    ("Gather", 0): "table",
    ("FusedMatMul", 1): "weight",
    ("Attention", 1): "weight",
    ("Attention", 2): "bias",
    ("BiasGelu", 1): "bias",
    ("SkipLayerNormalization", 2): "weight",
    ("SkipLayerNormalization", 3): "bias",
    ("SkipLayerNormalization", 4): "skip_bias",
}


def readable_names(graph: onnx.GraphProto, weights: list[str]) -> dict[str, str]:
    """A dotted, unique parameter name for every weight of a graph.

    The initializer's own name where it is a path (`blocks.0.attn.qkv.bias`); else (`onnx::MatMul_233`, `val_13`) the
    path of the node that reads it, from its name or from the scopes that the dynamo exporter records, with the role.

    Args:
        graph: the graph.
        weights: tensor names.

    Returns:
        Tensor name -> parameter name.
    """
    wanted = set(weights)
    readers: dict[str, tuple[onnx.NodeProto, int]] = {}
    for node in graph.node:
        for slot, name in enumerate(node.input):
            if name in wanted:
                readers.setdefault(name, (node, slot))
    biases = _sibling_biases(graph)
    result: dict[str, str] = {}
    taken: set[str] = set()
    for tensor in sorted(weights, key=lambda t: bool(_MADE_UP.match(t))):  # real names first, they keep theirs
        if not _MADE_UP.match(tensor):
            name = _clean(tensor)
        elif tensor in biases:
            name = f"{_clean(biases[tensor].removesuffix('.bias'))}.weight"
        else:
            name = _from_reader(tensor, readers.get(tensor))
        result[tensor] = _unique(name, taken)
    return {tensor: result[tensor] for tensor in weights}


def _sibling_biases(graph: onnx.GraphProto) -> dict[str, str]:
    """Second operand of a MatMul -> the initializer `*.bias` that is added to the product."""
    products = {n.output[0]: n.input[1] for n in graph.node if n.op_type == "MatMul"}
    found: dict[str, str] = {}
    for node in graph.node:
        if node.op_type == "Add":
            for product, bias in (tuple(node.input), tuple(node.input)[::-1]):
                if product in products and bias.endswith(".bias"):
                    found.setdefault(products[product], bias)
    return found


def _from_reader(tensor: str, reader: tuple[onnx.NodeProto, int] | None) -> str:
    if reader is None:
        return _clean(tensor)
    node, slot = reader
    path = _scope(node)
    role = _ROLES.get((node.op_type, slot), "weight" if slot == 1 else "value")
    return f"{path}.{role}" if path else f"{_clean(node.name or tensor)}.{role}"


def _scope(node: onnx.NodeProto) -> str:
    """Module path of a node, "" where the exporter left none."""
    scopes = [s for s in scopes_of(node)[:-1] if s]
    if scopes:
        return _clean(scopes[-1])
    parts = [p for p in node.name.split("/") if p][:-1]
    path: list[str] = []
    for part in parts:
        # TorchScript repeats the container: /blocks/blocks.0/attn is blocks.0.attn.
        if path and part.startswith(f"{path[-1]}."):
            path.pop()
        path.append(part)
    return _clean(".".join(path))


def _clean(name: str) -> str:
    """Dotted words of letters, digits and underscores."""
    words = re.split(r"[./:]+", name)
    return ".".join(w for w in (re.sub(r"\W+", "_", word).strip("_") for word in words) if w) or "weight"


def _unique(name: str, taken: set[str]) -> str:
    """`name`, changed where it is taken, or where it would be a parameter and a module at once."""
    while (parent := next((t for t in sorted(taken) if name.startswith(f"{t}.")), None)) is not None:
        name = f"{parent}_{name[len(parent) + 1 :]}"  # one dot fewer each time, so this ends
    candidate, k = name, 1
    while candidate in taken or any(t.startswith(f"{candidate}.") for t in taken):
        k += 1
        candidate = f"{name}_{k}"
    taken.add(candidate)
    return candidate
