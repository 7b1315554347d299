"""How many blocks may be solved at once."""

from __future__ import annotations

from math import prod

import onnx.helper

from toast_onnx.importance.arithmetic import arithmetic
from toast_onnx.matching.blocks import Block
from toast_onnx.matching.study import Study

#: Square matrices of a block's widest part, in float64, that selecting and solving it take at their most: what a second
#: block adds to the peak of a DeiT-B (`benchmarks/scale.py --step half`, with one thread and with two).
MATRICES = 5
#: Bytes for blocks beside the first where the model itself is small.
ALLOWANCE = 128_000_000


def blocks_at_once(study: Study) -> int:
    """How many blocks may be solved side by side: those beside the first take no more memory than the model is large.

    One, where a GPU solves them.
    """
    if not arithmetic().shared:
        return 1
    one = MATRICES * 8 * max(map(_widest, study.match.blocks), default=1) ** 2
    return 1 + (_weight_bytes(study) + ALLOWANCE) // one


def _widest(block: Block) -> int:
    """Rows of the largest matrix of second moments that a block has: of all heads' values together, or hidden units."""
    a, f = block.attention, block.ffn
    return max(1, a.num_heads * a.vo_dim if a is not None else 0, max(f.width, f.in_features) if f is not None else 0)


def _weight_bytes(study: Study) -> int:
    tensors = study.view.initializers.values()
    return sum(prod(t.dims) * onnx.helper.tensor_dtype_to_np_dtype(t.data_type).itemsize for t in tensors)
