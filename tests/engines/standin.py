"""A STAND-IN for trtexec: no TensorRT in it and nothing is measured.

It is an executable script that accepts the flags of the version it plays (the lists are those of TensorRT's published
source for 10.16 and 11.1), refuses others as trtexec does, and prints and writes trtexec's documented formats with
made-up times. What it was called with goes to a file beside it, one JSON list a line.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

COMMON = """--help --onnx --loadEngine --saveEngine --minShapes --optShapes --maxShapes --shapes --warmUp --duration
    --iterations --avgRuns --percentile --exportTimes --exportProfile --exportLayerInfo --profilingVerbosity
    --skipInference --timingCacheFile --builderOptimizationLevel --memPoolSize --noTF32 --stronglyTyped"""
#: What only that version has with a meaning. trtexec 11 still accepts 10's three switches, as no-ops with a warning.
OWN = {
    10: {
        *("--fp16", "--bf16", "--int8", "--best"),
        *("--useCudaGraph", "--noDataTransfers", "--useSpinWait", "--separateProfileRun"),
    },
    11: {"--noCudaGraph", "--includeDataTransfers", "--noSpinWait"},
}
VERSIONS = {10: 101601, 11: 110100}

_BODY = r"""
import json, sys
from pathlib import Path

given = [a.partition("=") for a in sys.argv[1:]]
options = {name: value for name, _, value in given}
with open(LOG, "a") as log:
    log.write(json.dumps(sys.argv[1:]) + "\n")
print(f"&&&& RUNNING {PROGRAM} [{PRODUCT} v{NUMBER}] [b1] # " + " ".join(sys.argv))
if "--help" in options or not given:
    for flag in FLAGS:
        print(f"  {flag}")
    sys.exit(0)
unknown = [name for name in options if name not in FLAGS]
if unknown:
    print(f"[11/22/2026-10:00:00] [E] Unknown option: {unknown[0]}")
    sys.exit(1)
model = options.get("--loadEngine") or options.get("--onnx")
if not Path(model).exists():
    print("[11/22/2026-10:00:00] [E] Could not open file " + model)
    print(f"&&&& FAILED {PROGRAM}")
    sys.exit(1)
# Times depend on the file's name alone: 2 ms for one with "dense" in it, 1 ms for the others, +- 1 %.
base = 2.0 if "dense" in Path(model).name else 1.0
compute = [base * (1 + 0.01 * ((i % 5) - 2) / 2) for i in range(100)]
rows, now = [], 0.0
for c in compute:
    rows.append({"startEnqMs": now, "endEnqMs": now + 0.1, "startH2dMs": now, "endH2dMs": now,
                 "startComputeMs": now, "endComputeMs": now + c, "startD2hMs": now + c, "endD2hMs": now + c,
                 "h2dMs": 0.0, "computeMs": c, "d2hMs": 0.0, "latencyMs": c})
    now += c
if "--exportTimes" in options:
    Path(options["--exportTimes"]).write_text(json.dumps(rows))
if "--exportProfile" in options:
    layers = [{"name": n, "timeMs": 100 * t, "averageMs": t, "medianMs": t, "percentage": 0.0}
              for n, t in (("fused_a", 0.5 * base), ("fused_b", 0.25 * base), ("/head/MatMul", 0.25 * base))]
    Path(options["--exportProfile"]).write_text(json.dumps([{"count": 100}, *layers]))
if "--exportLayerInfo" in options:
    made_of = {"fused_a": ["/blocks/blocks.0/attn/MatMul", "/blocks/blocks.0/Add"],
               "fused_b": ["/blocks/blocks.1/mlp/fc1/MatMul"], "/head/MatMul": ["/head/MatMul"]}
    info = [{"Name": k, "Metadata": "".join(f"[ONNX Layer: {n}]" for n in v)} for k, v in made_of.items()]
    if options.get("--profilingVerbosity") != "detailed":
        info = list(made_of)
    Path(options["--exportLayerInfo"]).write_text(json.dumps({"Layers": info}))
stamp = "[11/22/2026-10:00:00] [I] "
def line(values):
    values = sorted(values)
    return (f"min = {values[0]:g} ms, max = {values[-1]:g} ms, mean = {sum(values) / len(values):g} ms, "
            f"median = {values[50]:g} ms, percentile(90%) = {values[89]:g} ms, percentile(99%) = {values[98]:g} ms")
print(stamp + "=== Performance summary ===")
print(stamp + f"Throughput: {len(rows) / now * 1000:g} qps")
print(stamp + "Latency: " + line(compute))
print(stamp + "Enqueue Time: " + line([0.1] * 100))
print(stamp + "H2D Latency: " + line([0.0] * 100))
print(stamp + "GPU Compute Time: " + line(compute))
print(stamp + "D2H Latency: " + line([0.0] * 100))
print(stamp + "Total Host Walltime: " + f"{now / 1000:g} s")
print(f"&&&& PASSED {PROGRAM}")
"""


def write(
    folder: Path, major: int, name: str = "trtexec", product: str = "TensorRT", number: int | None = None
) -> Path:
    """Write the stand-in for trtexec 10 or 11 into a folder and return its path."""
    path = folder / name
    settings = {
        "PROGRAM": f"TensorRT.{name}",
        "PRODUCT": product,
        "NUMBER": VERSIONS[major] if number is None else number,
        "FLAGS": [*COMMON.split(), *sorted(OWN[major])],
        "LOG": str(folder / f"{name}.log"),
    }
    head = "\n".join(f"{key} = {value!r}" for key, value in settings.items())
    path.write_text(f"#!{sys.executable}\n{head}\n{_BODY}")
    path.chmod(0o755)
    return path


def calls(path: Path) -> list[list[str]]:
    """Arguments of every call of a stand-in so far, the question for help aside."""
    lines = path.with_name(f"{path.name}.log").read_text().splitlines()
    return [words for words in map(json.loads, lines) if words != ["--help"]]
