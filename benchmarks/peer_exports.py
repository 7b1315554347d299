"""Which real exports other tools and this one take: python benchmarks/peer_exports.py --work FOLDER

Every tool gets small models with random weights, exported by the real libraries (`tests/zoo/`), in a process of its own
with a limit of time, and is to halve what it can. A cell says how many attention blocks and feed-forward networks
became smaller; a file that does not hold, does not run or is larger than before counts against its tool. Results are
kept in the folder, so that a run can be stopped and continued.

    pip install onnxsim==0.8.1
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import onnx

from benchmarks.peer_tools import ONNXSIM
from benchmarks.peers import Store, add_run_options, call
from tests import zoo
from toast_onnx.errors import ToastError
from toast_onnx.matching.study import study
from toast_onnx.model import load_model
from toast_onnx.planning.width_costs import dense_widths
from toast_onnx_calibration.sessions import make_session, run

#: (family, exporter, what was done afterwards), as `tests/zoo/` names them.
GRAPHS = (
    ("timm-vit", "torchscript-17", ""),
    ("timm-vit", "dynamo-20", ""),
    ("timm-vit", "dynamo-23", ""),
    ("timm-vit", "torchscript-17", "ort-fused"),
    ("timm-dinov2", "dynamo-20", ""),
    ("timm-swin", "torchscript-17", ""),
    ("timm-eva02", "dynamo-20", ""),
    ("hf-vit", "torchscript-17", ""),
    ("hf-clip", "dynamo-20", ""),
    ("hf-dinov2", "dynamo-18", ""),
    ("hf-bert-eager", "torchscript-17", ""),
    ("hf-bert-eager", "torchscript-17", "ort-fused-mha"),
    ("torchvision-vit", "torchscript-17", ""),
)
GRAPH_TOOLS = (
    *(f"onnxsim: {function}" for function in ONNXSIM),
    *(f"onnxsim, simplified: {function}" for function in ONNXSIM),
    "toast-onnx",
)
#: What counts against a tool.
BAD = ["broken", "larger"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options = add_run_options(parser).parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    print(*graph_table(Store(options.work / "exports.json"), options), sep="\n")


def graph_table(store: Store, options: argparse.Namespace) -> Iterator[str]:
    """Which tool takes which export: attention blocks + feed-forward networks made smaller, of those there are."""
    given = {}
    for family, exporter, after in GRAPHS:
        try:
            path = zoo.export(zoo.Case(family, exporter, after=after))
        except zoo.Unavailable as e:
            print(f"{family} {exporter} {after}: {e}", file=sys.stderr)
            continue
        given[" ".join(part for part in (family, exporter, after) if part)] = path
    found: dict[str, dict[str, Any]] = {}
    for tool in GRAPH_TOOLS:
        unknown = {title: path for title, path in given.items() if f"{tool}: {title}" not in store.found}
        fresh = taken(tool, unknown, options) if unknown else {}
        found[tool] = {title: store.once(f"{tool}: {title}", partial(fresh.get, title)) for title in given}
    yield f"| export | blocks | {' | '.join(GRAPH_TOOLS)} |"
    yield "|---" * (len(GRAPH_TOOLS) + 2) + "|"
    for title, path in given.items():
        widths = block_widths(path)
        blocks = f"{sum('vo' in w for w in widths)} + {sum('fc2' in w for w in widths)}"
        yield f"| {title} | {blocks} | {' | '.join(graph_cell(found[tool][title]) for tool in GRAPH_TOOLS)} |"
    for title, keys in {"taken": ["taken"], "blocks": ["attention", "networks"], "invalid / larger": BAD}.items():
        sums = [[str(sum(f.get(key, 0) for f in found[tool].values())) for key in keys] for tool in GRAPH_TOOLS]
        yield f"| **{title}** | | {' | '.join((' / ' if keys is BAD else ' + ').join(s) for s in sums)} |"


def taken(tool: str, given: dict[str, Path], options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """What a tool makes of exports: blocks made smaller; whether the file is invalid or larger than what it got."""
    with tempfile.TemporaryDirectory(dir=options.work) as name:
        outs = {title: Path(name) / f"{k}.onnx" for k, title in enumerate(given)}
        listed = Path(name) / "list.json"
        listed.write_text(json.dumps([[str(path), str(outs[title])] for title, path in given.items()]))
        answers = call(options, "graphs", tool, str(listed))
        whys = [json.loads(line) for line in answers["answer"]]
        whys += [answers["why"]] * (len(given) - len(whys))
        return {title: made_of(given[title], outs[title], why) for title, why in zip(given, whys, strict=True)}


def made_of(graph: Path, out: Path, why: str) -> dict[str, Any]:
    """What became of one export."""
    if why or not out.exists():
        return {"why": why or "no file"}
    simplified = Path(f"{out}.given.onnx")
    given = simplified if simplified.exists() else graph
    broken = broken_why(out, graph)
    attention, networks = (0, 0) if broken else smaller_blocks(given, out)
    return {
        "why": "",
        "taken": int(not broken and attention + networks > 0),
        "attention": attention,
        "networks": networks,
        "broken": int(bool(broken)),
        "note": broken,
        "larger": int(out.stat().st_size > given.stat().st_size),
    }


def broken_why(out: Path, graph: Path) -> str:
    """Why a file does not hold or run; empty where it does."""
    try:
        onnx.checker.check_model(str(out))
        run(make_session(out, threads=1), zoo.inputs(graph, 1))
    except Exception as e:  # the checker and the runtime raise their own kinds
        return (str(e).strip().splitlines() or [type(e).__name__])[0][:120]
    return ""


def smaller_blocks(given: Path, out: Path) -> tuple[int, int]:
    """Attention blocks, and feed-forward networks, that lost widths; blocks are in the same order in both."""
    attention = networks = 0
    for before, after in zip(block_widths(given), block_widths(out), strict=False):
        attention += any(after.get(part, 0) < before.get(part, 0) for part in ("heads", "qk", "vo"))
        networks += after.get("fc2", 0) < before.get("fc2", 0)
    return attention, networks


def block_widths(path: Path) -> list[dict[Any, int]]:
    """Widths of every block that is found."""
    try:
        return [dict(dense_widths(b)) for b in study(load_model(path)).match.blocks]
    except ToastError:
        return []


def graph_cell(found: dict[str, Any]) -> str:
    """A cell of the table."""
    if found["why"]:
        return f"refused: {found['why'][:80]}".replace("|", "/")
    if found["broken"]:
        return f"invalid: {found['note']}".replace("|", "/")
    grown = ", larger" if found["larger"] else ""
    return (f"{found['attention']} + {found['networks']}" if found["taken"] else "untouched") + grown


if __name__ == "__main__":
    main()
