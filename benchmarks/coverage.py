"""Which families, exporters and aftermaths are matched, proven by the twin, and proven by planted dead dimensions.

    python benchmarks/coverage.py [--tokens] [--family NAME ...] [--way NAME ...] [--redo] [--output FILE]
        --results FILE

Every cell exports a small model of `tests/zoo/` with the real library (some take minutes) and prunes it; with --tokens
it merges tokens instead, and the page's second table is made. Results are kept in a JSON file, so that a run can be
stopped and continued; `--redo` measures the cells asked for once more.
"""

from __future__ import annotations

import argparse
import json
import logging
import re
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tests import zoo  # noqa: E402
from tests.pruning import UNEVEN, look, run, worst  # noqa: E402
from tests.rewriting.test_zoo_twin import TRUE_RANK  # noqa: E402
from toast_onnx.choosing.synthetic import SyntheticStatistics  # noqa: E402
from toast_onnx.errors import ToastError  # noqa: E402
from toast_onnx.files import write_bytes  # noqa: E402
from toast_onnx.matching.study import Study  # noqa: E402
from toast_onnx.model import save_model  # noqa: E402
from toast_onnx.planning.ratios import parse_ratios  # noqa: E402
from toast_onnx.proof.inputs import twin_inputs  # noqa: E402
from toast_onnx.pruning import Pruned, prune  # noqa: E402
from toast_onnx.reasons import Reason  # noqa: E402
from toast_onnx.tokens.points import study_tokens  # noqa: E402
from toast_onnx.tokens.rewrite import write_merging  # noqa: E402
from toast_onnx.tokens.twin import prove_merging  # noqa: E402

PROOF = 1e-4
TOKENS_HEADING = "## Merging tokens"
#: Columns: an exporter as it is, or what is done to the export afterwards.
WAYS = {
    "TorchScript 17": ("torchscript-17", ""),
    "dynamo 18": ("dynamo-18", ""),
    "dynamo 20": ("dynamo-20", ""),
    "dynamo 23": ("dynamo-23", ""),
    "onnxsim": ("torchscript-17", "onnxsim"),
    "onnxslim": ("torchscript-17", "onnxslim"),
    "ORT basic": ("torchscript-17", "ort-basic"),
}


def case_of(family: str, way: str) -> zoo.Case:
    """The case of a cell: a dynamic batch where it can be; aftermaths of dynamo 20 where TorchScript fails."""
    exporter, after = WAYS[way]
    exporters = [exporter, "dynamo-20"] if after else [exporter]
    cases = [zoo.Case(family, e, batch, after=after) for e in exporters for batch in ("dynamic", "static")]
    return next((case for case in cases if zoo.why_not(case) is None), cases[0])


def cell(case: zoo.Case) -> dict[str, Any]:
    """What became of a case: parts found, reasons, the twin's and the planted proof's largest differences."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "pruned.onnx"
        try:
            path = zoo.export(case)
            planted = zoo.export(zoo.Case(case.family, case.exporter, case.batch, planted=True, after=case.after))
        except Exception as e:  # exporters and optimizers raise whatever they like
            return {"unavailable": one_line(e)}
        try:
            dense, pruned = prune_case(case, path, UNEVEN)
            save_model(prune_case(case, planted, TRUE_RANK, check=False)[1].model, out)
            feeds = [zoo.inputs(planted, b) for b in ((1, 3) if dense.dynamic_batch else (1,))]
            proof = max(worst(run(out, f), run(planted, f)) for f in feeds)
        except ToastError as e:
            return {"refused": one_line(e)}
        except Exception as e:  # a defect of ours, which must not stop the others' measurement
            return {"failed": f"{type(e).__name__}: {one_line(e)}"}
    expected = zoo.expected(case.family)
    assert pruned.twin is not None
    return {
        "attentions": [len([b for b in dense.match.blocks if b.attention]), len(expected.attentions)],
        "ffns": [len([b for b in dense.match.blocks if b.ffn]), len(expected.ffns)],
        "reasons": reasons(dense),
        "twin": pruned.twin.worst,
        "planted": proof,
    }


def token_cell(case: zoo.Case) -> dict[str, Any]:
    """What becomes of a case when two tokens go behind every attention that allows it."""
    try:
        path = zoo.export(case)
    except Exception as e:  # exporters and optimizers raise whatever they like
        return {"unavailable": one_line(e)}
    try:
        dense = look(path, **{name: tuple(t.shape) for name, t in zoo.build(case.family).inputs.items()})
        tokens = study_tokens(dense)
        merged, merges = write_merging(dense, tokens, dict.fromkeys(tokens.mergeable, 2), "auto")
        worst = prove_merging(dense, merged, merges, twin_inputs(dense)).worst if merges else None
    except ToastError as e:
        return {"refused": one_line(e)}
    except Exception as e:  # a defect of ours, which must not stop the others' measurement
        return {"failed": f"{type(e).__name__}: {one_line(e)}"}
    why = {f"not merged: {without_names(str(p.reason))}" for p in tokens.points if p.reason is not None}
    return {"blocks": [len(tokens.mergeable), len(tokens.points)], "worst": worst, "reasons": sorted(why)}


def prune_case(case: zoo.Case, path: Path, ratios: dict[str, Any], check: bool = True) -> tuple[Study, Pruned]:
    """Prune a file at the sizes it was exported at: Mask2Former's dynamo graphs take no others."""
    dense = look(path, **{name: tuple(t.shape) for name, t in zoo.build(case.family).inputs.items()})
    statistics = SyntheticStatistics(dense)
    return dense, prune(dense, parse_ratios(ratios), statistics, skip_unprunable=True, check=check)


def one_line(error: Exception) -> str:
    """The part of an error's text that says something, in at most 160 characters; stated reasons whole."""
    if isinstance(error, zoo.Unavailable):
        return str(error)
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    said = re.sub(r"^\S+\.onnx: ", "", lines[0] if lines else type(error).__name__)
    return without_names(said)[:200].replace("|", "/")


def reasons(dense: Study) -> list[str]:
    """Why parts cannot be pruned, and what was declined; node names left out."""
    found = [f"no block: {without_names(str(reason))}" for reason in dense.match.declined.values()]
    for block in dense.match.blocks:
        parts: dict[str, Reason | None] = {}
        if block.attention is not None:
            parts |= {"Q/K": block.attention.qk_reason, "V/Proj": block.attention.vo_reason}
        if block.ffn is not None:
            parts |= {"fc1": block.ffn.fc1_reason, "fc2": block.ffn.fc2_reason}
        found += [f"{part}: {without_names(str(reason))}" for part, reason in parts.items() if reason]
    return sorted(set(found))


def without_names(reason: str) -> str:
    """A reason with the names of nodes and tensors left out; their operators stay."""
    return re.sub(r"(?<!\w)'[^']+'", "...", re.sub(r"(?<!\w)'[^']+' \((\w+)\)", r"\1", reason))


def mark(found: dict[str, Any], case: zoo.Case, note: Callable[[str], str]) -> str:
    """A cell: parts found and whether both proofs hold, or a reference to the note that says why not."""
    for key, words in (("unavailable", "cannot be made"), ("refused", "refused"), ("failed", "FAILS")):
        if key in found:
            return f"{words} {note(found[key])}"
    parts = "+".join(
        str(n) if n == wanted else f"{n} of {wanted}" for n, wanted in (found["attentions"], found["ffns"])
    )
    holds = found["twin"] < PROOF and found["planted"] < PROOF
    notes = [note(reason) for reason in found["reasons"]]
    notes += [note("batch and image size fixed: the library's export needs them to be")] * (case.batch == "static")
    notes += [note("after dynamo 20")] * (bool(case.after) and case.exporter != "torchscript-17")
    return " ".join(["" if holds else "FAILS", parts, *notes]).strip()


def token_mark(found: dict[str, Any], case: zoo.Case, note: Callable[[str], str]) -> str:
    """A cell of the second table: blocks that merge, or a reference to the note that says why none does."""
    for key, words in (("unavailable", "cannot be made"), ("refused", "refused"), ("failed", "FAILS")):
        if key in found:
            return f"{words} {note(found[key])}"
    able, blocks = found["blocks"]
    parts = "no" if not able else str(able) if able == blocks else f"{able} of {blocks}"
    holds = found["worst"] is None or found["worst"] < PROOF
    return " ".join(["" if holds else "FAILS", parts, *(note(reason) for reason in found["reasons"])]).strip()


class Notes:
    """Numbered notes, each text once."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def __call__(self, text: str) -> str:
        """The reference to a note."""
        if text not in self.texts:
            self.texts.append(text)
        return f"[{self.texts.index(text) + 1}]"


def page(done: dict[str, Any]) -> Iterator[str]:
    """The whole page from all results so far."""
    yield from (
        "# Coverage",
        "",
        "Small models with random weights, built and exported by the real libraries (`tests/zoo/`), pruned by",
        "different fractions in every part. A cell says how many attentions + feed-forward networks were found; where",
        "that is less than what the PyTorch module holds, it says of how many. In every such cell two proofs hold.",
        "*Twin*: the pruned graph against its padded twin. *Planted*: dimensions that are dead in the PyTorch module",
        "are removed and no output changes. The last columns give the worst of a family, as a fraction of a tensor's",
        f"scale; {PROOF:.0e} is allowed. onnxsim, onnxslim and ONNX Runtime's basic optimizer (ORT basic) work on the",
        "export of TorchScript 17. Notes, which say what is not pruned and why, stand below the table.",
        "Made by `python benchmarks/coverage.py`.",
        "",
        f"| family | {' | '.join(WAYS)} | twin | planted |",
        "|---" * (len(WAYS) + 3) + "|",
    )
    notes = Notes()
    for family in sorted(zoo.FAMILIES):
        cells, measured = [], []
        for way in WAYS:
            found = done.get(f"{family}/{way}")
            cells.append("not measured" if found is None else mark(found, case_of(family, way), notes))
            measured += [found] if found is not None and "twin" in found else []
        worsts = [f"{max(m[key] for m in measured):.0e}" if measured else "-" for key in ("twin", "planted")]
        yield f"| {family} | {' | '.join([*cells, *worsts])} |"
    yield from ("", *(f"{number}. {text}" for number, text in enumerate(notes.texts, start=1)), "")


def token_section(done: dict[str, Any]) -> Iterator[str]:
    """The second table from all results so far."""
    yield from (
        TOKENS_HEADING,
        "",
        "The same graphs with two tokens merged behind every attention that allows it, each against its averaging",
        "twin ([what that is](tokens.md#the-proof)). A cell says in how many blocks tokens are merged; the last column",
        "gives the worst of a family. Made by `python benchmarks/coverage.py --tokens`.",
        "",
        f"| family | {' | '.join(WAYS)} | twin |",
        "|---" * (len(WAYS) + 2) + "|",
    )
    notes = Notes()
    for family in sorted(zoo.FAMILIES):
        found = {way: done[f"tokens/{family}/{way}"] for way in WAYS if f"tokens/{family}/{way}" in done}
        if not found:
            continue
        cells = []
        for way in WAYS:
            one = found.get(way)
            cells.append("not measured" if one is None else token_mark(one, case_of(family, way), notes))
        worsts = [f["worst"] for f in found.values() if f.get("worst") is not None]
        yield f"| {family} | {' | '.join(cells)} | {f'{max(worsts):.0e}' if worsts else '-'} |"
    yield from ("", *(f"{number}. {text}" for number, text in enumerate(notes.texts, start=1)), "")


def main() -> None:
    """Fill one of the tables and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", nargs="*", choices=zoo.FAMILIES, default=list(zoo.FAMILIES))
    parser.add_argument("--way", nargs="*", choices=WAYS, default=list(WAYS))
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "coverage.md")
    parser.add_argument("--results", type=Path, required=True, help="JSON file with the results so far")
    parser.add_argument("--redo", action="store_true", help="measure the cells asked for even if they were before")
    parser.add_argument("--tokens", action="store_true", help="make the second table: tokens merged")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    measure, marked, prefix = (token_cell, token_mark, "tokens/") if options.tokens else (cell, mark, "")
    for family in options.family:
        for way in options.way:
            key, case = f"{prefix}{family}/{way}", case_of(family, way)
            if options.redo or key not in read(options.results):
                found = measure(case)
                # Read again: other cells may have been measured meanwhile.
                write_bytes(options.results, json.dumps(read(options.results) | {key: found}, indent=1).encode())
                print(f"{key}: {marked(found, case, str)}", flush=True)
    before, heading, behind = options.output.read_text().partition(TOKENS_HEADING)
    done = read(options.results)
    if options.tokens:
        heading, behind = "\n".join(token_section(done)), ""
    else:
        before = "\n".join(page(done)) + "\n"
    options.output.write_text(before + heading + behind)


def read(results: Path) -> dict[str, Any]:
    """The results so far."""
    return dict(json.loads(results.read_text())) if results.exists() else {}


if __name__ == "__main__":
    main()
