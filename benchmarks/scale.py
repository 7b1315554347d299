"""Memory and time of a large model: python benchmarks/scale.py WORK [--model NAME] [--step NAME ...] [--results FILE]

Writes a timm model with random weights and external data into the folder WORK (ViT-H/14: 2.5 GB), then runs the
installed command on it, each step in a process of its own. Peak memory and processor time are the operating system's
own account of that process. Results are kept in a JSON file, so that steps can be run one by one; so is what the step
`statistics` measures (ViT-H/14: 3.6 GB), which the steps behind it read. Below the table stands what the algebra of the
step `half` would take at the speed of this machine's matrix products, on as many threads as BLAS takes here.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.external_data_helper as external

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.algebra import dgemm, flops  # noqa: E402
from tests.weightless import export_weightless  # noqa: E402
from toast_onnx.matching.study import study  # noqa: E402
from toast_onnx.model import load_model  # noqa: E402

HALF = "version: 1\nattention: {qk: 0.5, vo: 0.5}\nffn: {fc2: 0.5}\n"
THIRD = HALF.replace("0.5", "0.35")
WEIGHTS_ALONE = (
    "version: 1\nattention: {qk: 0.5, vo: 0.5, score: l2}\nffn: {fc2: 0.5, score: l2}\ncompensation: {kind: none}\n"
)
BLOCK = "{attention: {qk: 0.5, vo: 0.5}, ffn: {fc2: 0.5}}"
TWO_BLOCKS = f"version: 1\nblocks: {{0: {BLOCK}, 1: {BLOCK}}}\n"
FROM_STATISTICS = ["prune", "MODEL", "--statistics", "KEPT", "--no-check"]
#: What is run: title, ratios file if any, and the command's arguments.
STEPS: dict[str, tuple[str, str | None, list[str]]] = {
    "inspect": ("inspect", None, ["inspect", "MODEL"]),
    "weights": ("prune by weights alone, no twin", WEIGHTS_ALONE, ["prune", "MODEL", "--no-check"]),
    "twin": ("the same, with the twin", WEIGHTS_ALONE, ["prune", "MODEL"]),
    "two": ("prune two blocks with the defaults, no twin", TWO_BLOCKS, ["prune", "MODEL", "--no-check"]),
    "prune": ("prune with the defaults, with the twin", HALF, ["prune", "MODEL"]),
    "calibrate": ("calibrate on 4 images", None, ["calibrate", "MODEL", "--data", "IMAGES", "-o", "STATISTICS"]),
    "statistics": (
        "calibrate, statistics kept",
        None,
        ["calibrate", "MODEL", "--data", "MANY", "--threads", "1", "-o", "KEPT"],
    ),
    "half": ("prune from them with the defaults, a half, no twin", HALF, FROM_STATISTICS),
    "third": ("prune from them with the defaults, 35 %, no twin", THIRD, FROM_STATISTICS),
}


def random_weights(path: Path) -> None:
    """Fill a model's external weights with N(0, 1 / rows), gains 1 + N(0, 0.04) and biases N(0, 0.04), in place."""
    rng = np.random.default_rng(0)
    proto = onnx.load(str(path), load_external_data=False)
    for tensor in proto.graph.initializer:
        if not external.uses_external_data(tensor):
            continue
        info = external.ExternalDataInfo(tensor)
        values = rng.standard_normal(tuple(tensor.dims), dtype=np.float32)
        if len(tensor.dims) >= 2:
            values *= float(np.prod(tensor.dims[1:])) ** -0.5
        else:
            values = 0.2 * values + float("norm" in tensor.name and tensor.name.endswith("weight"))
        with (path.parent / info.location).open("r+b") as stream:
            stream.seek(info.offset or 0)
            stream.write(values.tobytes())


def fold_transposes(path: Path) -> None:
    """Turn transposed weights into weights, as the exporter does where it sees their values; one at a time."""
    proto = onnx.load(str(path), load_external_data=False)
    known = {t.name: t for t in proto.graph.initializer}
    readers = [name for node in proto.graph.node for name in node.input]
    kept = []
    for node in proto.graph.node:
        source = known.get(node.input[0]) if node.op_type == "Transpose" else None
        if source is None or len(source.dims) != 2 or readers.count(source.name) > 1:
            kept.append(node)
            continue
        info = external.ExternalDataInfo(source)
        data = np.memmap(path.parent / info.location, np.float32, "r+", info.offset or 0, tuple(source.dims)[::-1])
        data[:] = np.array(data).reshape(tuple(source.dims)).T
        source.name, source.dims[:] = node.output[0], data.shape
    del proto.graph.node[:]
    proto.graph.node.extend(kept)
    onnx.save(proto, str(path))


def make_images(folder: Path, count: int) -> None:
    """Images of noise, 256 x 256."""
    from PIL import Image

    rng = np.random.default_rng(0)
    for k in range(count):
        Image.fromarray(rng.integers(0, 256, (256, 256, 3), dtype=np.uint8)).save(folder / f"{k}.png")


#: A process takes over the peak of the one that starts it, so a small one stands in between.
METER = """
import json, resource, subprocess, sys
subprocess.run(sys.argv[1:], check=True, stdout=subprocess.DEVNULL)
usage = resource.getrusage(resource.RUSAGE_CHILDREN)
print(json.dumps({"peak_mb": usage.ru_maxrss * 1024 / 1e6, "cpu_s": usage.ru_utime + usage.ru_stime}))
"""


def measure(arguments: list[str]) -> dict[str, float]:
    """Run the installed command; peak resident memory in MB, processor seconds and elapsed seconds of its process."""
    command = [str(Path(sys.executable).with_name("toast-onnx")), *arguments]
    started = time.monotonic()
    answer = subprocess.run([sys.executable, "-c", METER, *command], check=True, stdout=subprocess.PIPE).stdout
    return json.loads(answer) | {"elapsed_s": time.monotonic() - started}


def rows(done: dict[str, Any], size: float) -> Iterator[str]:
    """The table's lines."""
    yield "| step | peak memory, MB | of the model's size | processor s | elapsed s |"
    yield "|---|---:|---:|---:|---:|"
    for step, (title, _, _) in STEPS.items():
        if step in done:
            d = done[step]
            numbers = f"{d['peak_mb']:.0f} | {d['peak_mb'] / size:.2f} | {d['cpu_s']:.0f} | {d['elapsed_s']:.0f}"
            yield f"| {title} | {numbers} |"


def roofline(model: Path) -> str:
    """Flops of selecting and solving with half of everything removed, and their time at dgemm's speed, in words."""
    total = 0.0
    for block in study(load_model(model)).match.blocks:
        attention, ffn = block.attention, block.ffn
        assert attention is not None
        assert ffn is not None
        total += sum(flops(ffn.fc2.out_features, attention.num_heads, ffn.fc2.in_features).values())
    rate = dgemm()
    return (
        f"the algebra of `half` is {total / 1e9:.0f} Gflop without the predicted errors: {total / rate:.0f} s at "
        f"dgemm's {rate / 1e9:.0f} Gflop a second"
    )


def write_model(work: Path, name: str) -> Path:
    """The model in the folder `work`, written where it is not there yet."""
    model = work / f"{name}.onnx"
    if not model.exists():
        work.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=work) as folder:
            made = export_weightless(name, Path(folder))
            random_weights(made)
            fold_transposes(made)
            for file in sorted(Path(folder).iterdir(), reverse=True):  # the graph last: a model is whole where it is
                os.replace(file, work / file.name)
    return model


def run_step(step: str, model: Path, images: int) -> dict[str, float]:
    """What a step takes, as `measure` says.

    Args:
        step: one of `STEPS`.
        model: from `write_model`; statistics are kept beside it.
        images: how many images the kept statistics are of.
    """
    _, ratios, arguments = STEPS[step]
    with tempfile.TemporaryDirectory(dir=model.parent) as name:
        folder = Path(name)
        places = {"MODEL": model, "STATISTICS": folder / "statistics.npz", "KEPT": model.with_suffix(".statistics.npz")}
        for word, count in {"IMAGES": 4, "MANY": images}.items():
            places[word] = folder / word.lower()
            places[word].mkdir()
            make_images(places[word], count)
        filled = [str(places.get(word, word)) for word in arguments]
        if ratios is not None:
            (folder / "ratios.yaml").write_text(ratios)
            filled += ["--ratios", str(folder / "ratios.yaml"), "-o", str(folder / "pruned.onnx")]
        if step == "statistics":
            places["KEPT"].unlink(missing_ok=True)
        return measure(filled)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path, help="folder for the model and its statistics, kept, and results, removed")
    parser.add_argument("--model", default="vit_huge_patch14_224")
    parser.add_argument("--step", nargs="*", choices=STEPS, default=list(STEPS))
    parser.add_argument("--images", type=int, default=16, help="images of the step `statistics`")
    parser.add_argument("--results", type=Path, help="JSON file; default WORK/scale.json")
    options = parser.parse_args()
    model = write_model(options.work, options.model)
    size = sum(file.stat().st_size for file in (model, model.with_name(f"{model.name}.data"))) / 1e6
    store = options.results or options.work / "scale.json"
    done = json.loads(store.read_text()) if store.exists() else {}
    for step in options.step:
        done[step] = run_step(step, model, options.images)
        store.write_text(json.dumps(done, indent=1))
    print(f"{options.model}, {size:.0f} MB")
    print(*rows(done, size), sep="\n")
    print(f"\n{roofline(model)}")


if __name__ == "__main__":
    main()
