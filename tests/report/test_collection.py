"""Several pruned models side by side: which are beaten, in what order, and what the table and the page say."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from tests.report.documents import DENSE as SHA256
from tests.report.documents import comparison, evaluation, pruning, put
from tests.report.test_page import Reader
from toast_onnx.report.collection import Collection, Point, of_comparisons
from toast_onnx.report.collection_page import pareto_panels, render_collection, short_names
from toast_onnx_cli.main import main

DENSE = Point("m.onnx", 100, 100, 100)


def point(name: str, macs: float, agreement: float | None, error: float | None = 0.1) -> Point:
    return Point(name, macs, macs, macs, agreement=agreement, error=error, samples=64)


@given(st.lists(st.tuples(st.integers(1, 5), st.integers(1, 5)), min_size=1, max_size=8))
def test_a_model_is_beaten_where_another_is_as_cheap_and_as_good_and_better_in_one(
    pairs: list[tuple[int, int]],
) -> None:
    found = Collection(DENSE, tuple(point(str(k), 10 * c, a / 5) for k, (c, a) in enumerate(pairs))).beaten()
    for k, (cost, good) in enumerate(pairs):
        better = {str(j) for j, (c, g) in enumerate(pairs) if c <= cost and g >= good and (c, g) != (cost, good)}
        assert (str(k) in found) is bool(better)
        assert found.get(str(k), next(iter(better), None)) in better | {None}


def test_the_best_come_first_and_the_unknown_last() -> None:
    found = Collection(DENSE, (point("a", 30, 0.5), point("b", 20, None), point("c", 10, 0.9)))
    orders = {key: [p.file for p in found.ordered(key).points] for key in ("agreement", "macs", "file", None)}
    assert orders == {
        "agreement": ["c", "a", "b"],
        "macs": ["c", "b", "a"],
        "file": ["a", "b", "c"],
        None: ["a", "b", "c"],
    }


def test_the_sentence_names_the_nearest_the_smallest_the_beaten_and_the_wrecked() -> None:
    found = Collection(DENSE, (point("a", 80, 0.9), point("b", 60, 0.95), point("c", 40, 0.4)))
    assert found.sentence == (
        "HARDLY AGREES any more: c; b is nearest to m.onnx: 95.0% same answers at 60% of the MACs; c takes the fewest "
        "MACs, 40%: 40.0% same answers; beaten by another one in both: a (by b)"
    )
    errors = Collection(DENSE, (point("a", 80, None, 0.01),))
    assert errors.sentence == "a is nearest to m.onnx: relative error 0.01 at 80% of the MACs"
    assert "no answers were compared" in Collection(DENSE, (point("a", 80, None, None),)).sentence


def test_csv_and_document_hold_plain_numbers() -> None:
    found = Collection(DENSE, (point("a", 80, 0.9), point("b", 60, 0.95)))
    rows = list(csv.DictReader(io.StringIO(found.csv())))
    assert [r["file"] for r in rows] == ["m.onnx", "a", "b"]
    assert [float(r["macs_share"]) for r in rows] == [1, 0.8, 0.6]
    assert [r["beaten_by"] for r in rows] == ["", "b", ""]
    document = json.loads(json.dumps(found.to_document()))
    assert document["judged_by"] == "agreement"
    assert [m["beaten_by"] for m in document["models"]] == ["b", None]


def test_a_chart_has_a_dot_a_model_and_its_front() -> None:
    found = Collection(DENSE, (point("m.macs-0.8.onnx", 80, 0.9), point("m.macs-0.6.onnx", 60, 0.95)))
    macs = pareto_panels(found)[0]
    assert [(d.name, d.cost, d.quality, d.beaten) for d in macs.dots] == [
        ("0.8", 0.8, 90, True),
        ("0.6", 0.6, 95, False),
    ]
    assert macs.dense is not None
    assert (macs.dense.cost, macs.dense.quality) == (1, 100)


@pytest.mark.parametrize(
    ("names", "short"),
    [
        (["m.onnx"], ["m.onnx"]),
        (["m.macs-0.65.onnx", "m.macs-0.6.onnx"], ["0.65", "0.6"]),
        (["a/m.onnx", "b/m.onnx"], ["a", "b"]),
        (["m.onnx", "m.pruned.onnx"], ["m.onnx", "pruned"]),
    ],
)
def test_names_in_charts_are_what_differs(names: list[str], short: list[str]) -> None:
    assert [s.strip(".") for s in short_names(names)] == short


def test_the_page_is_whole_and_one_model_makes_no_curve() -> None:
    several = Collection(DENSE, (point("a<b", 80, 0.9), point("b", 60, 0.95)))
    reader = Reader()
    reader.feed(render_collection([several], "many"))
    assert reader.open == []
    text = " ".join(" ".join(reader.text).split())
    assert "a<b 90.0% 0.1 80 (80%)" in text
    html = render_collection([several], "many")
    assert 'role="img" aria-label="same answers against MACs left' in html
    assert "<figure" not in render_collection([Collection(DENSE, several.points[:1])], "one")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two runs of one dense model, one of them compared and evaluated afterwards."""
    first, second = pruning(), pruning()
    second["pruned"] = second["pruned"] | {"file": "s.pruned.onnx", "sha256": "f" * 64, "macs": 1_000_000}
    told = {"top1_agreement": 0.5, "kl": 1.0, "cosine": 0.9, "relative_error": 0.5}
    put(tmp_path / "m.pruned.json", first | {"agreement": {"samples": 8, "outputs": {"logits": told}}})
    put(tmp_path / "s.pruned.json", second | {"agreement": {"samples": 8, "outputs": {"logits": told}}})
    put(tmp_path / "c.json", comparison())
    put(tmp_path / "dense.json", evaluation("m.onnx", 0.8) | {"model_sha256": SHA256})
    put(tmp_path / "eval.json", evaluation("m.pruned.onnx", 0.75))
    put(tmp_path / "foreign.json", {"name": "package"})
    return tmp_path


def test_reports_of_a_folder_are_shown_with_what_was_measured_on_their_models(folder: Path) -> None:
    result = CliRunner().invoke(main, ["report", str(folder), "--json", "--sort", "macs"])
    assert result.exit_code == 0, result.output
    document = json.loads(result.stdout)
    small, large = document["models"]
    assert (small["file"], small["agreement"], small["samples"], small["accuracy"]) == (
        "m.pruned.onnx",
        0.875,
        64,
        0.75,
    )
    assert (large["file"], large["agreement"], large["samples"], large["accuracy"]) == ("s.pruned.onnx", 0.5, 8, None)
    assert document["dense"]["accuracy"] == 0.8
    assert "m.pruned.onnx" in (folder / "report.html").read_text()


def test_folders_of_the_same_names_are_told_apart(folder: Path) -> None:
    other = folder / "other"
    other.mkdir()
    put(other / "m.pruned.json", pruning() | {"dense": pruning()["dense"]})
    result = CliRunner().invoke(main, ["report", str(folder), str(other), "--csv", "-o", str(folder / "o.html")])
    assert result.exit_code == 0, result.output
    names = [row["file"] for row in csv.DictReader(io.StringIO(result.stdout))]
    assert names == ["m.onnx", f"{folder.name}/m.pruned.onnx", f"{folder.name}/s.pruned.onnx", "other/m.pruned.onnx"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["empty"], "holds no report of a pruned model"),
        (["nowhere"], "does not exist"),
        (["run.json", "--sort", "macs"], "are about many runs"),
        (["empty", "--with", "x.json"], "--with goes with one run"),
        (["empty", "--csv", "--json"], "either --csv or --json"),
    ],
)
def test_what_is_no_collection_is_said_in_one_line(
    words: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    put(Path("run.json"), pruning())
    result = CliRunner().invoke(main, ["report", *words])
    assert result.exit_code
    assert said in result.stderr.splitlines()[-1]


def test_comparisons_make_a_collection() -> None:
    sides = {
        side: {"file": f"{side}.onnx", "macs": macs, "params": 1, "bytes": 1}
        for side, macs in (("dense", 10), ("pruned", 5))
    }
    document = comparison() | {
        "models": sides,
        "latency": [{"speedup": 1.0, "spread": 0.4}, {"speedup": 2.0, "spread": 0.1}],
    }
    found = of_comparisons([document], [Path("x/p.onnx")])
    assert found.dense.file == "dense.onnx"
    (only,) = found.points
    assert "speed: this machine was busy, rounds differ by 40%" in " ".join(found.table.lines)
    assert (only.file, only.macs, only.agreement, only.kl, only.error, only.speed, only.samples) == (
        "p.onnx", 5, 0.875, 0.0625, 0.125, 2.0, 64,
    )  # fmt: skip
