"""The page shows figures as this run's only where they are: not another model's of the same dense one."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest
from onnx import TensorProto, helper, save_model

from tests.report.documents import DENSE, PRUNED, comparison, evaluation, pruning, put, timing
from toast_onnx.report.lineage import side_of, trace
from toast_onnx.report.page import page_context, tiles
from toast_onnx.report.page_sources import find_sources

OTHER = "a" * 64


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return put(tmp_path / "m.pruned.json", pruning())


def shown(path: Path, *extra: Path) -> dict[str, str]:
    """Tiles by name: value and note."""
    return {tile["name"]: f"{tile['value']} {tile['note']}" for tile in tiles(find_sources(path, extra))}


def compared(sha256: str, agreement: float, drift: float = 0.1) -> dict[str, Any]:
    document = comparison(sha256)
    document["outputs"]["logits"]["top1_agreement"] = agreement
    for block in document["blocks"]:
        block["attention"]["relative_error"] = drift
    return document


def benched(path: Path, *results: dict[str, Any]) -> Path:
    document = {"runtime": "onnxruntime", "provider": "cpu", "threads": 1, "results": list(results)}
    return put(path.with_name("bench.json"), document)


def small_model(path: Path) -> str:
    """Write a model without external data; the SHA-256 of its file."""
    value = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in "xy"]
    graph = helper.make_graph([helper.make_node("Neg", ["x"], ["y"])], "g", value[:1], value[1:])
    save_model(helper.make_model(graph), path)
    return hashlib.sha256(path.read_bytes()).hexdigest()


def record(engine: str, source: str) -> dict[str, Any]:
    facts = {"backend": "onnx", "backend_version": "17", "precision": "fp16", "build_seconds": 1.0}
    return facts | {"engine": engine, "engine_bytes": 9, "model": "m.pruned.onnx", "model_sha256": source}


def test_agreement_of_another_pruned_model_of_the_same_dense_one_is_not_this_ones(path: Path) -> None:
    other = put(path.with_name("a.json"), compared(OTHER, 0.25, 0.9))
    assert find_sources(path).of("compare") == []
    assert "same answers" not in shown(path, other)
    named = page_context(find_sources(path, [other]))
    assert (len(named["compare_rows"]), named["drift"]["svg"]) == (1, "")  # shown as asked, not as this run's


def test_tile_and_drift_come_from_this_runs_comparison_whatever_else_is_shown(path: Path) -> None:
    own = put(path.with_name("b.json"), compared(PRUNED, 0.875))
    alone = page_context(find_sources(path))["drift"]
    own.unlink()
    elsewhere = path.parent / "elsewhere"
    elsewhere.mkdir()
    documents = [compared(OTHER, 0.25, 0.9), compared(PRUNED, 0.5, 0.9), compared(PRUNED, 0.875)]
    documents[1]["models"]["dense"]["sha256"] = OTHER  # this pruned model against another dense one
    named = [put(elsewhere / f"{k}.json", document) for k, document in enumerate(documents)]
    assert shown(path, *named)["same answers"] == "87.5% of the dense model's answers (logits)"
    assert page_context(find_sources(path, named))["drift"] == alone


@pytest.mark.parametrize("source", [PRUNED, OTHER])
def test_a_converted_copy_counts_where_its_record_says_what_it_was_made_of(path: Path, source: str) -> None:
    copy = path.with_name("half.onnx")
    put(path.with_name("compare.json"), compared(small_model(copy), 0.75))
    put(path.with_name("half.onnx.json"), record(copy.name, source))
    benched(path, timing("m.onnx", 4.0, 1.0), timing("half.onnx", 1.0, 4.0))
    found = shown(path)
    assert ("same answers" in found, "speed" in found) == (source == PRUNED,) * 2
    if source == PRUNED:
        assert found["speed"] == "4.00 × half.onnx over m.onnx, batch 8, 1.00 ms"


def test_copies_of_copies_are_followed_in_any_order(tmp_path: Path) -> None:
    half = small_model(tmp_path / "half.onnx")
    records = [record("last.engine", half), record("half.onnx", PRUNED), record("other.engine", OTHER)]
    pruned = trace({"file": "p.onnx", "sha256": PRUNED}, records, tmp_path)
    assert pruned.names == {"half.onnx", "last.engine"}
    assert pruned.hashes == {PRUNED, half}


def test_a_run_without_hashes_claims_no_document(path: Path) -> None:
    run = pruning()
    for side in ("dense", "pruned"):
        del run[side]["sha256"]
    put(path, run)
    put(path.with_name("a.json"), compared(OTHER, 0.25) | {"note": "a-hyphen"})
    unhashed = compared(OTHER, 0.25)
    del unhashed["models"]["pruned"]["sha256"]
    put(path.with_name("b.json"), unhashed)
    put(path.with_name("c.json"), evaluation("m.onnx", 0.5) | {"note": "a-hyphen"})
    sources = find_sources(path)
    assert sources.names == []
    assert ("pruned model", "m.pruned.onnx, SHA-256 –") in page_context(sources)["facts"]


@pytest.mark.parametrize("made", [PRUNED, OTHER])
def test_a_deployment_beside_the_run_is_its_own_only_where_it_made_this_model(path: Path, made: str) -> None:
    result = {"dense": {"sha256": DENSE}, "pruned": {"sha256": made, "macs": 1, "params": 1}}
    result["dense"] |= {"macs": 2, "params": 2}
    steps = {
        "prune": {"status": "done", "outputs": {"out/m.pruned.json": "h"}, "result": result},
        "compare": {"status": "done", "result": compared(made, 0.75)},
    }
    put(path.with_name("deploy.json"), {"format": "toast-onnx/deploy/1", "steps": steps})
    sources = find_sources(path)
    assert (sources.deploy is not None, len(sources.of("compare"))) == ((True, 1) if made == PRUNED else (False, 0))


@pytest.mark.parametrize(
    ("milliseconds", "ratio"),
    [
        ({"m.onnx": 4.0, "m.pruned.onnx": 2.0}, "2.00"),
        ({"m.pruned.onnx": 2.0, "m.onnx": 4.0}, "2.00"),
        ({"rival.onnx": 1.0, "m.onnx": 4.0, "m.pruned.onnx": 3.2}, "1.25"),
        ({"m.onnx": 4.0, "rival.onnx": 1.0, "m.pruned.onnx": 5.0}, "0.80"),
        ({"m.onnx": 4.0, "m.pruned.onnx": 4.0}, "1.00"),
        ({"m.onnx": 4.0, "m.fp16.onnx": 2.0, "m.pruned.fp16.onnx": 1.0, "m.pruned.onnx": 2.5}, "1.60"),
    ],
)
def test_speed_is_the_pruned_models_over_the_dense_ones(path: Path, milliseconds: dict[str, float], ratio: str) -> None:
    first = next(iter(milliseconds.values()))
    benched(path, *(timing(f"out/{name}", ms, first / ms) for name, ms in milliseconds.items()))
    own = milliseconds["m.pruned.onnx"]
    assert shown(path)["speed"] == f"{ratio} × of the dense model's, batch 8, {own:.2f} ms"


@pytest.mark.parametrize("names", [("rival.onnx", "m.pruned.onnx"), ("m.onnx", "rival.onnx"), ("a.onnx", "b.onnx")])
def test_no_speed_where_one_of_the_two_was_not_timed(path: Path, names: tuple[str, str]) -> None:
    bench = benched(path, timing(names[0], 4.0, 1.0), timing(names[1], 2.0, 2.0))
    assert "speed" not in shown(path, bench)


def test_both_models_are_taken_at_one_batch(path: Path) -> None:
    pairs = [timing("m.onnx", 4.0, 1.0), timing("m.onnx", 8.0, 1.0), timing("m.pruned.onnx", 2.0, 4.0)]
    for row, batch in zip(pairs, (1, 16, 16), strict=True):
        row["batch"] = batch
    benched(path, *pairs)
    assert shown(path)["speed"] == "4.00 × of the dense model's, batch 16, 2.00 ms"


@pytest.mark.parametrize("other", ["rival.onnx", "m.fp16.onnx", "m.pruned.again.onnx"])
def test_accuracy_of_any_other_file_is_not_this_runs(path: Path, other: str) -> None:
    named = [put(path.with_name(f"{k}.json"), evaluation(m, 0.8 - k / 10)) for k, m in enumerate(("m.onnx", other))]
    assert "top-1 accuracy" not in shown(path, *named)
    assert len(page_context(find_sources(path, named))["accuracy_rows"]) == 2
    named.append(put(path.with_name("own.json"), evaluation("m.pruned.onnx", 0.75)))
    assert shown(path, *named)["top-1 accuracy"] == "75.0% dense 80.0%, -5.0 points"


def test_hashes_tell_whose_accuracy_and_speed_it_is(path: Path) -> None:
    """An evaluation of the dense file is found; a model that had the pruned one's name before is not taken for it."""
    put(path.with_name("a.json"), evaluation("m.onnx", 0.8) | {"model_sha256": DENSE})
    put(path.with_name("b.json"), evaluation("out/m.pruned.onnx", 0.5) | {"model_sha256": OTHER})
    stale = timing("m.pruned.onnx", 1.0, 4.0) | {"model_sha256": OTHER}
    benched(path, timing("m.onnx", 4.0, 1.0) | {"model_sha256": DENSE}, stale)
    sources = find_sources(path)
    assert (sources.names, "speed" in shown(path)) == (["a.json"], False)
    put(path.with_name("c.json"), evaluation("renamed.onnx", 0.75) | {"model_sha256": PRUNED})
    assert shown(path)["top-1 accuracy"] == "75.0% dense 80.0%, -5.0 points"
    benched(path, timing("m.onnx", 4.0, 1.0), timing("m.pruned.onnx", 2.0, 2.0) | {"model_sha256": PRUNED}, stale)
    assert shown(path)["speed"].startswith("2.00 ×")


def test_a_name_that_both_models_have_tells_nothing(tmp_path: Path) -> None:
    dense, pruned = (trace({"file": "model.onnx", "sha256": h}, (), tmp_path) for h in (DENSE, PRUNED))
    assert side_of("out/model.onnx", dense, pruned) is None
    assert side_of("out/model.onnx", dense, pruned, PRUNED) == "pruned"


def test_another_programs_documents_of_like_form_are_left_alone(path: Path) -> None:
    put(path.with_name("a.json"), {"models": ["a"], "outputs": {}, "samples": 1})
    put(path.with_name("b.json"), {"runtime": "x", "results": [{"name": "m.pruned.onnx"}, "m.pruned.onnx"]})
    put(path.with_name("c.json"), evaluation("a.onnx", 0.5) | {"model_sha256": ["a"]})
    assert find_sources(path).names == []
