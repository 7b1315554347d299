"""Which families, exporters and aftermaths are matched, proven by the twin, and proven by planted dead dimensions.

    python benchmarks/coverage.py [--family NAME ...] [--exporter NAME ...] [--after NAME ...] [--output FILE]

Every cell exports a small model of `tests/zoo.py` with the real library (some take minutes) and prunes it. Results are
kept in a JSON file beside the output, so that a run can be stopped and continued; `--redo` forgets them.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tests import zoo  # noqa: E402
from tests.pruning import UNEVEN, prune_file, run, worst  # noqa: E402
from tests.surgery.test_zoo_twin import TRUE_RANK  # noqa: E402
from toast_onnx.errors import ToastError  # noqa: E402
from toast_onnx.matching.study import Study  # noqa: E402

PROOF = 1e-4


def cell(case: zoo.Case) -> dict[str, Any]:
    """One row of the table: parts found, reasons, the twin's and the planted proof's largest differences."""
    try:
        path = zoo.export(case)
        planted = zoo.export(zoo.Case(case.family, case.exporter, case.batch, planted=True, after=case.after))
    except zoo.Unavailable as e:
        return {"unavailable": str(e)}
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "pruned.onnx"
        try:
            dense, pruned = prune_file(path, UNEVEN, skip_unprunable=True)
            prune_file(planted, TRUE_RANK, out, check=False, skip_unprunable=True)
        except ToastError as e:
            return {"refused": str(e)}
        batches = (1, 3) if dense.dynamic_batch else (1,)
        feeds = [zoo.inputs(planted, b) for b in batches]
        proof = max(worst(run(out, f), run(planted, f)) for f in feeds)
    expected = zoo.expected(case.family)
    assert pruned.twin is not None
    return {
        "attentions": [len([b for b in dense.match.blocks if b.attention]), len(expected.attentions)],
        "ffns": [len([b for b in dense.match.blocks if b.ffn]), len(expected.ffns)],
        "reasons": reasons(dense),
        "twin": pruned.twin.worst,
        "planted": proof,
    }


def reasons(dense: Study) -> list[str]:
    """Why parts cannot be pruned, node names left out."""
    found = []
    for block in dense.match.blocks:
        parts = {}
        if block.attention is not None:
            parts |= {"qk": block.attention.qk_reason, "vo": block.attention.vo_reason}
        if block.ffn is not None:
            parts |= {"fc1": block.ffn.fc1_reason, "fc2": block.ffn.fc2_reason}
        found += [f"{part}: {reason.split(chr(39))[0].strip()}" for part, reason in parts.items() if reason]
    return sorted(set(found))


def row(case: zoo.Case, found: dict[str, Any]) -> str:
    """A line of the Markdown table."""
    name = [case.family, case.exporter, case.batch, case.after or "-"]
    if "unavailable" in found:
        return f"| {' | '.join(name)} | the library cannot export it: {found['unavailable']} | | |"
    if "refused" in found:
        return f"| {' | '.join(name)} | refused: {found['refused']} | | |"
    parts = f"{'/'.join(map(str, found['attentions']))} attention, {'/'.join(map(str, found['ffns']))} FFN"
    note = f"; not pruned: {'; '.join(found['reasons'])}" if found["reasons"] else ""
    return f"| {' | '.join(name)} | {parts}{note} | {found['twin']:.0e} | {found['planted']:.0e} |"


def main() -> None:
    """Fill the table and write it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", nargs="*", default=list(zoo.FAMILIES))
    parser.add_argument("--exporter", nargs="*", default=["torchscript-17", "dynamo-18", "dynamo-20", "dynamo-23"])
    parser.add_argument("--batch", nargs="*", default=["dynamic"])
    parser.add_argument("--after", nargs="*", default=[""], help='aftermaths; "" is the export as it is')
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "coverage.md")
    parser.add_argument("--results", type=Path, help="JSON file with results so far; default beside the output")
    parser.add_argument("--redo", action="store_true")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    store = options.results or options.output.with_suffix(".json")
    done = json.loads(store.read_text()) if store.exists() and not options.redo else {}
    wanted = [
        zoo.Case(family, exporter, batch, after=after)
        for after in options.after
        for exporter in options.exporter
        for batch in options.batch
        for family in options.family
    ]
    for case in wanted:
        if case.id not in done:
            done[case.id] = {"case": [case.family, case.exporter, case.batch, case.after], "found": cell(case)}
            store.write_text(json.dumps(done, indent=1))
        print(row(case, done[case.id]["found"]), flush=True)
    options.output.write_text(page(done))


def page(done: dict[str, Any]) -> str:
    """The whole page from all results so far."""
    lines = [
        "# Coverage",
        "",
        "Small models with random weights, built and exported by the real libraries (`tests/zoo.py`), pruned by",
        "different fractions in every part. *Twin* is the largest difference between the pruned graph and its padded",
        "twin; *planted* the largest change of the outputs when dimensions that are dead in the PyTorch module are",
        f"removed. Both are fractions of a tensor's scale; {PROOF:.0e} is allowed. Made by",
        "`python benchmarks/coverage.py`.",
        "",
        "| family | exporter | batch | afterwards | found | twin | planted |",
        "|---|---|---|---|---|---|---|",
    ]
    rows = [
        row(zoo.Case(f, e, b, after=a), entry["found"]) for entry in done.values() for f, e, b, a in [entry["case"]]
    ]
    return "\n".join([*lines, *sorted(rows), ""])


if __name__ == "__main__":
    main()
