"""Latency tables measured with made-up clocks, ONNX Runtime, and the trtexec stand-in (no TensorRT in it)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from tests import zoo
from tests.engines import standin
from tests.pruning import look
from toast_onnx.errors import BackendError, MatchError
from toast_onnx.matching.study import Study
from toast_onnx.model import file_hash, load_model
from toast_onnx.planning.schema import Align
from toast_onnx.planning.width_costs import dense_widths
from toast_onnx_calibration.costs import Runtime, measure_costs, onnxruntime_runtime, trtexec_runtime

Exported = Callable[[zoo.Case], Path]


@pytest.fixture(scope="module")
def vit(exported: Exported) -> Study:
    return look(exported(zoo.Case("timm-vit")))


def test_every_variant_is_timed_against_the_dense_model_of_its_turn(vit: Study) -> None:
    dense = dense_widths(vit.match.blocks[0])
    drift = iter(range(1, 100))

    def timer(models: Sequence[Path]) -> list[float]:
        """One ms a hidden unit and head dimension of all blocks, on a machine that slows down all the time."""
        speed = next(drift)
        return [speed * sum(w["fc2"] + w["qk"] for b in look(m).match.blocks if (w := dense_widths(b))) for m in models]

    done: list[int] = []
    steps = Align(head_dim=dense["qk"] // 2, width=dense["fc2"] // 4)
    table = measure_costs(
        vit, Runtime(timer, {"program": "made up"}, 3), ("qk", "fc2"), steps, progress=lambda d, *_: done.append(d)
    )
    assert table.model_sha256 == file_hash(vit.view.model.path)
    assert table.batch == 3
    each = table.dense_milliseconds / (len(vit.match.blocks) * (dense["fc2"] + dense["qk"]))
    for part, count in (("qk", 1), ("fc2", 3)):
        widths = table.widths(1, part)  # type: ignore[arg-type]
        assert len(widths) == count + 1
        for kept in widths:
            assert table.saved(1, part, kept) == pytest.approx(each * (dense[part] - kept))  # type: ignore[arg-type, index]
    assert done[-1] == 4


def test_onnxruntime(vit: Study) -> None:
    runtime = onnxruntime_runtime(threads=1, rounds=3)
    dense = dense_widths(vit.match.blocks[0])
    table = measure_costs(vit, runtime, ("fc2",), Align(width=dense["fc2"] // 2))
    assert table.runtime["program"] == "onnxruntime"
    assert table.dense_milliseconds > 0
    assert set(table.widths(0, "fc2")) == {dense["fc2"] // 2, dense["fc2"]}


def test_trtexec_builds_every_variant(vit: Study, tmp_path: Path) -> None:
    program = standin.write(tmp_path, 11)
    runtime = trtexec_runtime(2, str(program), rounds=1, duration=0.1)
    dense = dense_widths(vit.match.blocks[0])
    table = measure_costs(vit, runtime, ("vo",), Align(head_dim=dense["vo"] // 2))
    assert (table.runtime["program"], table.runtime["version"]) == ("trtexec", "11.1.0")
    assert table.dense_milliseconds == pytest.approx(1.0, rel=0.02)  # the stand-in's clock
    assert len([c for c in standin.calls(program) if any(w.startswith("--onnx") for w in c)]) == 2


def test_without_trtexec(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("toast_onnx.engines.trtexec.find_trtexec", lambda *_: None)
    with pytest.raises(BackendError, match="trtexec was not found"):
        trtexec_runtime()


def test_nothing_to_time(vit: Study) -> None:
    with pytest.raises(MatchError, match="toast-onnx inspect"):
        measure_costs(vit, Runtime(lambda _: [], {}, 1), ())
    assert load_model(vit.view.model.path)


def test_an_alignment_that_leaves_no_width_is_named(vit: Study) -> None:
    width = dense_widths(vit.match.blocks[0])["qk"]
    with pytest.raises(MatchError, match=rf"alignment leaves no width.*qk is {width} wide in steps of {width}\)"):
        measure_costs(vit, Runtime(lambda _: [], {}, 1), ("qk",), Align(head_dim=width))
