"""`toast-onnx sensitivity`, `plan` and `costs` on a small classifier, from file to file."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from click.testing import CliRunner, Result

from tests import zoo
from tests.pruning import look
from toast_onnx.model import file_hash
from toast_onnx.planning.macs import graph_macs
from toast_onnx.planning.ratios import load_ratios
from toast_onnx_cli.main import SUBCOMMANDS, main

Exported = Callable[[zoo.Case], Path]
QUICK = ("--threads", "1", "--align-heads", "16", "--align-width", "64")


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exported: Exported) -> Path:
    monkeypatch.chdir(tmp_path)
    source = exported(zoo.Case("timm-vit"))
    (tmp_path / "m.onnx").write_bytes(source.read_bytes())
    np.save(tmp_path / "x.npy", zoo.inputs(source, 8)["input"])
    np.save(tmp_path / "labels.npy", np.arange(8))
    return tmp_path


def run(*arguments: str) -> Result:
    return CliRunner().invoke(main, list(arguments))


def document(result: Result) -> dict[str, Any]:
    assert result.exit_code == 0, result.stderr
    found: dict[str, Any] = json.loads(result.stdout)
    return found


def error(result: Result) -> str:
    assert result.exit_code == 1, result.stdout
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("Error:")]
    return line


def test_they_are_commands() -> None:
    assert {"sensitivity", "plan", "costs"} <= set(SUBCOMMANDS)


def test_a_plan_is_what_prune_keeps(files: Path) -> None:
    common = ("m.onnx", "--data", "x.npy", *QUICK, "--points", "0.5")
    found = document(run("plan", *common, "--macs", "0.7", "--json"))
    text = (files / "m.ratios.yaml").read_text()
    assert "# budget: --macs 0.7" in text
    assert f"# statistics: sha256 {found['statistics_sha256']}" in text
    assert f"{found['predicted']['damage']:.4f}" in text
    assert found["model_sha256"] == file_hash(files / "m.onnx")
    assert load_ratios(files / "m.ratios.yaml").align.width == 64
    pruned = run("prune", "m.onnx", "--ratios", "m.ratios.yaml", "--data", "x.npy", "--threads", "1", "--json")
    after = document(pruned)["blocks"]
    for block, kept in found["kept"].items():
        sizes = after[int(block)]["after"]
        assert (sizes["qk_dim"], sizes["vo_dim"], sizes["width"]) == (kept["qk"], kept["vo"], kept["fc2"])
    small = look(files / "m.pruned.onnx")
    dense = look(files / "m.onnx")
    share = graph_macs(small.view, small.counted) / graph_macs(dense.view, dense.counted)
    assert share <= 0.7
    assert share == pytest.approx(found["reached"]["macs"]["share"], abs=1e-9)


@pytest.mark.slow
def test_plans_for_fused_kernels_tie_heads(files: Path) -> None:
    """One width a head in the plan itself, so that prune removes what was planned."""
    common = ("m.onnx", "--data", "x.npy", "--threads", "1", "--align-width", "64", "--points", "0.5", "--macs", "0.75")
    common = (*common, "--parts", "qk,vo,fc2", "--sensitivity", "s.json", "--json", "--overwrite")
    tied = document(run("plan", *common, "--target", "tensorrt"))
    assert load_ratios(files / "m.ratios.yaml").attention.tie
    pairs = [(kept["qk"], kept["vo"]) for kept in tied["kept"].values()]
    assert all(qk == vo and qk >= 16 and qk % 8 == 0 for qk, vo in pairs)
    pruned = run("prune", "m.onnx", "--ratios", "m.ratios.yaml", "--data", "x.npy", "--threads", "1", "--json")
    after = [block["after"] for block in document(pruned)["blocks"]]
    assert [(sizes["qk_dim"], sizes["vo_dim"]) for sizes in after] == pairs
    assert tied["reached"]["macs"]["share"] <= 0.75
    free = document(run("plan", *common, "--target", "tensorrt", "--no-tie-heads"))
    assert not load_ratios(files / "m.ratios.yaml").attention.tie
    assert free["predicted"]["damage"] <= tied["predicted"]["damage"]
    alone = [{"qk,vo,fc2": "qk", "0.75": "0.95"}.get(word, word) for word in common]
    assert "plan both of them" in error(run("plan", *alone, "--tie-heads", "--no-heads"))


def test_a_plan_drops_heads_where_nothing_else_may_shrink(files: Path) -> None:
    common = ("m.onnx", "--data", "x.npy", *QUICK, "--points", "0.5", "--macs", "0.85", "--json")
    found = document(run("plan", *common, "--parts", "heads"))
    assert {kept for block in found["kept"].values() for kept in block} == {"heads"}
    assert any(kept["heads"] < 3 for kept in found["kept"].values())
    assert load_ratios(files / "m.ratios.yaml").given("attention.heads")
    pruned = run("prune", "m.onnx", "--ratios", "m.ratios.yaml", "--data", "x.npy", "--threads", "1", "--json")
    for block, after in zip(found["kept"].values(), document(pruned)["blocks"], strict=True):
        assert after["after"]["heads"] == block["heads"]
        assert len(after["kept"]["heads"] or range(3)) == block["heads"]
    small, dense = look(files / "m.pruned.onnx"), look(files / "m.onnx")
    share = graph_macs(small.view, small.counted) / graph_macs(dense.view, dense.counted)
    assert share == pytest.approx(found["reached"]["macs"]["share"], abs=1e-9)


@pytest.mark.parametrize("option", ["--heads", "--no-heads"])
def test_heads_may_be_left_alone(option: str, files: Path) -> None:
    common = ("m.onnx", "--data", "x.npy", *QUICK, "--points", "0.5", "--macs", "0.8", "--sensitivity", "s.json")
    found = document(run("plan", *common, "--parts", "qk,vo", option, "--json"))
    offered = {part for block in found["kept"].values() for part in block}
    assert offered == {"qk", "vo"} | ({"heads"} if option == "--heads" else set())
    trials = json.loads((files / "s.json").read_text())["trials"]
    assert {t["part"] for t in trials} == offered


def test_sensitivity_is_resumed_and_used_by_plan(files: Path) -> None:
    common = ("m.onnx", "--data", "x.npy", *QUICK)
    first = document(
        run("sensitivity", *common, "--ratios", "0.5", "--parts", "vo,fc2,fc1+fc2", "--plot", "f.png", "--json")
    )
    assert {(t["block"], t["part"]) for t in first["trials"]} == {
        (b, p) for b in (0, 1) for p in ("vo", "fc2", "fc1+fc2")
    }
    assert first["metric"] == "kl"
    assert (files / "f.png").stat().st_size > 1000
    again = run("sensitivity", *common, "--ratios", "0.5", "--parts", "vo,fc2,fc1+fc2")
    assert again.exit_code == 0, again.stderr
    assert "going on from there" in again.stderr
    assert "fc1+fc2" in again.stdout
    (files / "longer.yaml").write_text("version: 1\ncompensation: {steps: 7}\n")  # of training, which trials do without
    longer = run("sensitivity", *common, "--ratios", "0.5", "--parts", "vo", "--settings", "longer.yaml")
    assert "going on from there" in longer.stderr, longer.stderr
    planned = run("plan", *common, "--params", "0.8", "--points", "0.5", "--sensitivity", "m.sensitivity.json")
    assert planned.exit_code == 0, planned.stderr
    assert "parameters" in planned.stdout
    after = json.loads((files / "m.sensitivity.json").read_text())["trials"]
    assert [t for t in after if t["part"] in ("vo", "fc2", "fc1+fc2")] == first["trials"]
    assert {t["part"] for t in after} == {"heads", "qk", "vo", "fc2", "fc1+fc2"}
    assert "another settings" in error(run("sensitivity", *common, "--compensation", "none", "--ratios", "0.5"))


def test_a_plan_goes_on_with_the_samples_of_its_results(files: Path) -> None:
    """Trials on fewer samples are never mixed with those on all."""
    common = ("m.onnx", "--data", "x.npy", *QUICK, "--batch", "2")
    planned = ("plan", *common, "--parts", "vo", "--macs", "0.9", "--points", "0.5", "--json", "--overwrite")
    kept = (*planned, "--sensitivity", "s.json")
    first = document(run(*kept, "--trial-samples", "4"))
    assert (first["samples"], first["trial_samples"]) == (8, 4)
    assert json.loads((files / "s.json").read_text())["trial_samples"] == 4
    found = json.loads((files / "s.json").read_text())["trials"]
    assert document(run(*kept, "--points", "0.5,0.7"))["trial_samples"] == 4
    more = json.loads((files / "s.json").read_text())["trials"]
    assert all(trial in more for trial in found)
    assert len(more) > len(found)
    refusal = "its trials ran on 4 samples each, and these would run on 8; plan with --trial-samples 4"
    assert refusal in error(run(*kept, "--trial-samples", "8"))
    assert refusal in error(run("sensitivity", *common, "--parts", "vo", "-o", "s.json"))
    whole = document(run("sensitivity", *common, "--parts", "vo,heads", "--ratios", "0.5", "-o", "a.json", "--json"))
    del whole["trial_samples"]  # as it was written before
    (files / "a.json").write_text(json.dumps(whole))
    assert document(run(*planned, "--sensitivity", "a.json"))["trial_samples"] == 8
    assert json.loads((files / "a.json").read_text())["trials"] == whole["trials"]


def test_top1_with_labels(files: Path) -> None:
    found = document(
        run(
            "sensitivity", "m.onnx", "--data", "x.npy", "--labels", "labels.npy", *QUICK,
            "--ratios", "0.5", "--parts", "qk", "--blocks", "1", "--json",
        )
    )  # fmt: skip
    (trial,) = found["trials"]
    assert trial["block"] == 1
    assert 0 <= trial["damage"]["top1"] <= 1
    assert found["dense_top1"] is not None


def test_a_plan_for_latency(files: Path) -> None:
    timed = run("costs", "m.onnx", "--threads", "1", "--rounds", "2", "--align-heads", "32", "--align-width", "256")
    assert timed.exit_code == 0, timed.stderr
    assert "of dense" in timed.stdout
    table = json.loads((files / "m.costs.json").read_text())
    # a machine where half of the hidden units of both blocks take half of the time
    table["dense_milliseconds"] = 10.0
    for part in table["parts"]:
        part["milliseconds"] = {k: 10 - 5 * (1 - int(k) / part["dense"]) for k in part["milliseconds"]}
    assert table.pop("merged")
    (files / "t.json").write_text(json.dumps(table))
    measured = ("--points", "0.5", "--sensitivity", "s.json")  # the second plan goes on from the first one's trials
    common = ("plan", "m.onnx", "--data", "x.npy", "--threads", "1", *measured, "--latency", "0.8")
    widths = ("--align-heads", "32", "--align-width", "256", "--overwrite")
    found = document(run(*common, *widths, "--costs", "t.json", "--no-timing", "--json"))
    assert found["latency"]["predicted_share"] <= 0.8
    assert found["latency"]["measured_share"] is None
    assert "not measured here" in (files / "m.ratios.yaml").read_text()
    fewer = [part for part in table["parts"] if part["part"] != "heads"]
    (files / "old.json").write_text(json.dumps(table | {"parts": fewer}))
    without = run(*common, *widths, "--costs", "old.json", "--no-timing", "--json")
    assert set(next(iter(document(without)["kept"].values()))) >= {"qk", "vo", "fc2"}
    assert "no times for tokens, heads" in without.stderr
    here = document(run(*common, *widths, "--costs", "t.json", "--json"))
    assert here["latency"]["measured_share"] > 0
    assert "still take" in error(run(*common[:-1], "0.05", *widths, "--costs", "t.json", "--no-timing"))


@pytest.mark.parametrize(("share", "met"), [(0.95, False), pytest.param(0.8, True, marks=pytest.mark.slow)])
def test_a_missed_latency_is_said(share: float, met: bool, files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where every smaller width alone halves the latency, and the planned model takes the given share of it."""
    from toast_onnx_calibration.costs import Runtime
    from toast_onnx_calibration.planning import LatencyCheck

    clock = Runtime(lambda models: [10.0, *(5.0 for _ in models[1:])], {"program": "onnxruntime"}, 1)
    monkeypatch.setattr("toast_onnx_calibration.costs.onnxruntime_runtime", lambda *_, **__: clock)
    monkeypatch.setattr("toast_onnx_calibration.planning.time_plan", lambda *_: LatencyCheck(share, 10.0, 0))
    result = run("plan", "m.onnx", "--data", "x.npy", *QUICK, "--points", "0.5", "--latency", "0.8", "--json")
    assert document(result)["latency"]["met"] is met
    for text in (result.stderr, (files / "m.ratios.yaml").read_text()):
        assert ("the latency budget of 0.8 is missed" in text) is not met


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (("plan", "--data", "x.npy"), 2, "one budget"),
        (("plan", "--data", "x.npy", "--macs", "0.5", "--params", "0.5"), 2, "one budget"),
        (("plan", "--data", "x.npy", "--macs", "1.5"), 2, "--macs"),
        (("plan", "--data", "x.npy", "--macs", "0.5", "--parts", "fc3"), 2, "fc1"),
        (("plan", "--data", "x.npy", "--macs", "0.5", "--parts", "qk,heads", "--no-heads"), 2, "contradicts"),
        (("plan", "--data", "x.npy", "--macs", "0.5", "--costs", "t.json"), 2, "--latency"),
        (("plan", "--data", "x.npy", "--latency", "0.5", "--no-timing"), 2, "--costs"),
        (("plan", "--data", "x.npy", "--latency", "0.5", "--costs", "none.json", "--no-timing"), 1, "toast-onnx costs"),
        (("plan", "--data", "none", "--macs", "0.5"), 1, "none"),
        (("sensitivity", "--data", "x.npy", "--parts", "mlp"), 2, "fc1+fc2"),
        (("sensitivity", "--data", "x.npy", "--ratios", "0.5,1.2"), 2, "fractions"),
        (("sensitivity", "--data", "x.npy", "--blocks", "7"), 1, "blocks 0 to 1"),
        (("costs", "--parts", "x"), 2, "fc1"),
    ],
)
def test_wrong_use(arguments: tuple[str, ...], status: int, message: str, files: Path) -> None:
    result = run(arguments[0], "m.onnx", *arguments[1:])
    assert result.exit_code == status, result.output
    assert message in result.stderr


def test_impossible_budgets_say_the_least(files: Path) -> None:
    result = run("plan", "m.onnx", "--data", "x.npy", *QUICK, "--points", "0.5", "--macs", "0.02")
    assert "ask for at least 0." in error(result)
    assert not (files / "m.ratios.yaml").exists()


MODEL_ONLY = [("costs", "-o"), ("build", "--format", "ort", "-o")]
WITH_DATA = [
    ("plan", "--data", "x.npy", "--labels", "labels.npy", "--macs", "0.7", "-o"),
    ("sensitivity", "--data", "x.npy", "--labels", "labels.npy", "-o"),
    ("sensitivity", "--data", "x.npy", "--labels", "labels.npy", "--plot"),
    ("calibrate", "--data", "x.npy", "--preprocess", "labels.npy", "-o"),
    ("analyze", "--data", "x.npy", "--preprocess", "labels.npy", "--plot"),
]
READ = [(a, "m.onnx") for a in MODEL_ONLY] + [(a, v) for a in WITH_DATA for v in ("m.onnx", "x.npy", "labels.npy")]


@pytest.mark.parametrize(("arguments", "victim"), READ)
def test_no_input_is_overwritten(arguments: tuple[str, ...], victim: str, files: Path) -> None:
    before = (files / victim).read_bytes()
    assert f"the output {victim} is the input" in error(run(arguments[0], "m.onnx", *arguments[1:], victim))
    assert (files / victim).read_bytes() == before


def test_a_plan_is_not_written_over_the_files_it_reads(files: Path) -> None:
    common = ("plan", "m.onnx", "--data", "x.npy", "--latency", "0.7")
    for option in ("--sensitivity", "--costs"):
        assert f"{option} and -o would both be t.json" in error(run(*common, option, "t.json", "-o", "t.json"))
    (files / "s.yaml").write_text("version: 1\n")
    assert "is the input file s.yaml" in error(run(*common, "--settings", "s.yaml", "-o", "s.yaml"))


def test_weights_beside_the_model_are_not_overwritten(files: Path) -> None:
    proto = onnx.load(files / "m.onnx")
    onnx.save(proto, files / "m.onnx", save_as_external_data=True, location="w.bin")
    assert "is the input file w.bin" in error(run("costs", "m.onnx", "-o", "w.bin"))


def test_points_and_alignments_that_leave_no_choice(files: Path) -> None:
    common = ("plan", "m.onnx", "--data", "x.npy", "--threads", "1", "--macs", "0.7")
    assert "no part was measured" in error(run(*common, "--points", "0.0001"))
    coarse = ("--align-heads", "4096", "--align-width", "4096")
    assert "alignment leaves no width" in error(run(*common, *coarse, "--no-heads"))
    assert "alignment leaves no width" in error(run("costs", "m.onnx", *coarse, "--parts", "qk,vo,fc2"))
