"""The algebra of one block of ViT-H/14: processor seconds of each part beside what its flops take at dgemm's speed.

Needs nothing: weights are random, activations are 32 images' worth of tokens with a falling spectrum through GELU. Half
of everything goes. Run it with OPENBLAS_NUM_THREADS=1; a tree of another commit is measured by its place in PYTHONPATH.
With `--solve-on cuda`, wall seconds on a GPU, matrices sent there and back.

    python benchmarks/algebra.py
    python benchmarks/algebra.py --solve-on cuda
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import TypeVar

import numpy as np

from toast_onnx.importance.arithmetic import SOLVERS, arithmetic, set_solver, solver
from toast_onnx.importance.ffn import select_ffn_second_order
from toast_onnx.importance.moments import Moments
from toast_onnx.solving.ffn import solve_ffn
from toast_onnx.solving.qk import solve_qk_subspace
from toast_onnx.solving.vo import solve_vo_subspace

T = TypeVar("T")
#: Flops of a Cholesky factor and an inverse, as a multiple of n^3: what so few tokens ask of a covariance.
FACTORED = 4 / 3


def timed(work: Callable[[], T]) -> tuple[T, float]:
    """A result and its seconds: of the processor, or of the clock where something else works."""
    clock = time.process_time if solver() == "cpu" else time.perf_counter
    started = clock()
    return work(), clock() - started


def dgemm(n: int = 2048) -> float:
    """Flops a second of a matrix product."""
    a = np.random.default_rng(0).standard_normal((n, n))
    return 2 * n**3 / min(timed(lambda: a @ a)[1] for _ in range(3))


def flops(width: int, heads: int, hidden: int) -> dict[str, float]:
    """Flops of each part when half is kept and the tokens leave no ridge strength to choose."""
    k, d = hidden // 2, width // heads
    rank = d // 2
    others, together = (heads - 1) * rank, heads * rank
    turn = 2 * others**3 + 2 * others**2 * d + 2 * others * d * width + 6 * d * d * width
    selection = hidden**3 + (hidden**3 - k**3) / 3 + width * (hidden**2 - k**2)
    refit = FACTORED * k**3 + 2 * k * (hidden - k) * width + 4 * k**2 * width
    read_out = 4 * width**3 + FACTORED * (others**3 + together**3) + 4 * together**2 * width
    return {
        "queries and keys": 4 * width * width * rank + heads * 40 * d**3,
        "values and output projection": 2 * heads * turn + read_out,
        "hidden units: which stay": selection,
        "hidden units: fc2 refitted": refit,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", type=int, nargs=3, default=(1280, 16, 5120), metavar=("WIDTH", "HEADS", "HIDDEN"))
    parser.add_argument("--tokens", type=int, default=32 * 257)
    parser.add_argument("--solve-on", choices=SOLVERS, default="cpu")
    options = parser.parse_args()
    rate = dgemm()
    set_solver(options.solve_on)
    if options.solve_on != "cpu":
        arithmetic().inverse(np.eye(1024))  # libraries are loaded by the first call
    width, heads, hidden = options.shape
    tokens, d = options.tokens, width // heads
    normal = np.random.default_rng(0).standard_normal

    def weight(rows: int, columns: int) -> np.ndarray:
        return (normal((rows, columns)) * rows**-0.5).astype(np.float32)

    spectrum = np.arange(1, width + 1) ** -0.5
    spectrum *= (width / np.square(spectrum).sum()) ** 0.5
    x = (normal((tokens, width)) * spectrum @ np.linalg.qr(normal((width, width)))[0]).astype(np.float32)
    before = 1.2 * x @ weight(width, hidden) - 0.5
    hidden_moments = Moments.of(before / (1 + np.exp(-1.702 * before)))
    context = Moments.of(x @ weight(width, width))
    q, k = ((x @ weight(width, width)).reshape(tokens, heads, d).swapaxes(0, 1).astype(np.float64) for _ in "qk")
    s_qq, s_kk = q.swapaxes(1, 2) @ q / tokens, k.swapaxes(1, 2) @ k / tokens
    wq, wk, wv = (weight(width, width).reshape(width, heads, d) for _ in "qkv")
    wo, w2 = weight(width, width).reshape(heads, d, width), weight(hidden, width)
    of_heads, of_outputs = np.zeros((heads, d), np.float32), np.zeros(width, np.float32)

    qk = timed(lambda: solve_qk_subspace(wq, of_heads, wk, of_heads, s_qq, s_kk, d // 2))
    vo = timed(lambda: solve_vo_subspace(wv, of_heads, wo, of_outputs, context, d // 2))
    kept, choice = timed(lambda: select_ffn_second_order(hidden_moments, w2, hidden // 2))
    refit = timed(lambda: solve_ffn(kept, w2, of_outputs, hidden_moments))
    needed = flops(width, heads, hidden)
    seconds = dict(zip(needed, (qk[1], vo[1], choice, refit[1]), strict=True))
    print(f"dgemm: {rate / 1e9:.0f} Gflop a second\n")
    clock = "processor" if solver() == "cpu" else "wall"
    print(f"| part | Gflop | at dgemm's speed, s | {clock} s | of dgemm's speed |")
    print("|---|---:|---:|---:|---:|")
    for part, count in [*needed.items(), ("together", sum(needed.values()))]:
        spent = seconds.get(part, sum(seconds.values()))
        print(f"| {part} | {count / 1e9:.0f} | {count / rate:.1f} | {spent:.1f} | {count / rate / spent:.2f} |")


if __name__ == "__main__":
    main()
