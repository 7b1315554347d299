"""Samples with views: in order, divided in whole, and measured like any samples; fitted without them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from tests import zoo
from tests.calibration.test_statistics import measure
from tests.pruning import look
from toast_onnx.errors import ConfigError, DataError
from toast_onnx.finetune.views import Views
from toast_onnx.matching.study import Study
from toast_onnx_calibration import views
from toast_onnx_calibration.calibrating import CalibrationOptions, calibrate, open_measured
from toast_onnx_calibration.sensitivity_stream import read_samples
from toast_onnx_calibration.sequential import SequentialStatistics
from toast_onnx_calibration.sessions import ModelInput, graph_inputs
from toast_onnx_calibration.sources import Source, open_source
from toast_onnx_calibration.statistics import CalibratedStatistics
from toast_onnx_calibration.store import merge_statistics
from toast_onnx_calibration.views import ViewedSource
from toast_onnx_cli.main import main

Exported = Callable[[zoo.Case], Path]
COUNT, VIEWS = 6, 3
OPTIONS = CalibrationOptions(threads=1, batch=8, views=VIEWS)


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("samples") / "images.npy"
    np.save(path, np.random.default_rng(5).standard_normal((COUNT, 3, 64, 64)).astype(np.float32))
    return path


@pytest.fixture(scope="module")
def vit(exported: Exported) -> Study:
    return look(exported(zoo.Case("timm-vit")))


def opened(vit: Study, samples: Path) -> Source:
    return open_measured(vit, samples, graph_inputs(vit.source), OPTIONS)[0]


def rows(source: Source) -> tuple[np.ndarray, list[str]]:
    """All that a source gives out, and the names."""
    chunks = list(source)
    return np.concatenate([next(iter(c.arrays.values())) for c in chunks]), [row for c in chunks for row in c.rows]


def test_each_sample_is_followed_by_its_views(vit: Study, samples: Path) -> None:
    source = opened(vit, samples)
    found, names = rows(source)
    images = np.load(samples)
    assert source.count == len(found) == COUNT * (1 + VIEWS)
    np.testing.assert_array_equal(found[:: 1 + VIEWS], images)
    maker = Views([vit.view.model], [vit.view.model.proto.graph.output[0].name])
    name = vit.view.model.proto.graph.input[0].name
    for k in range(COUNT):
        expected = maker.of({name: images[k : k + 1]}, k, VIEWS, None)[name]
        np.testing.assert_array_equal(found[k * (1 + VIEWS) + 1 : (k + 1) * (1 + VIEWS)], expected)
    assert names[:5] == ["0", "0 (view 1)", "0 (view 2)", "0 (view 3)", "1"]
    assert source.description.endswith(f"images.npy, {VIEWS} views of each")


def test_how_views_are_made_tells_statistics_apart(vit: Study, samples: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = opened(vit, samples)
    found = {source.fingerprint}
    for name, value in (("STEPS", 4), ("STEP", 0.1)):
        with monkeypatch.context() as patch:
            patch.setattr(views, name, value)
            found.add(source.fingerprint)
    assert len(found) == 3


def test_parts_are_those_of_the_whole(vit: Study, samples: Path) -> None:
    source = opened(vit, samples)
    whole, names = rows(source)
    parts = [rows(source.part(*span)) for span in ((0, 8), (8, 20), (20, 24))]
    np.testing.assert_array_equal(np.concatenate([p[0] for p in parts]), whole)
    assert [n for p in parts for n in p[1]] == names
    assert len({source.fingerprint, *(source.part(*span).fingerprint for span in ((0, 8), (8, 16)))}) == 3
    with pytest.raises(ConfigError, match="cannot be divided"):
        source.part(0, 6)


@pytest.mark.parametrize("batch", ["dynamic", "static"])
def test_shards_cut_no_sample_from_its_views(exported: Exported, samples: Path, tmp_path: Path, batch: str) -> None:
    study = look(exported(zoo.Case("timm-vit", batch=batch)))
    inner = {"batch": 2, "threads": 1, "views": 2}
    calibrate(study, samples, tmp_path / "whole.npz", options=CalibrationOptions(**inner))
    for shard in ((1, 2), (2, 2)):
        options = CalibrationOptions(**inner, shard=shard)
        calibrate(study, samples, tmp_path / f"{shard[0]}.npz", options=options)
    merge_statistics([tmp_path / "1.npz", tmp_path / "2.npz"], tmp_path / "merged.npz")
    whole, merged = (CalibratedStatistics(study, tmp_path / f"{name}.npz") for name in ("whole", "merged"))
    for index in range(len(study.match.blocks)):
        np.testing.assert_allclose(
            merged.hidden(index).covariance, whole.hidden(index).covariance, rtol=1e-5, atol=1e-7
        )


def test_statistics_are_those_of_samples_and_views(vit: Study, samples: Path, tmp_path: Path) -> None:
    name = vit.view.model.proto.graph.input[0].name
    together = measure(vit, {name: rows(opened(vit, samples))[0]}, tmp_path / "a.npz")
    found = measure(vit, {name: np.load(samples)}, tmp_path / "b.npz", views=VIEWS)
    assert found.file.header.samples == COUNT * (1 + VIEWS)
    for index in range(len(vit.match.blocks)):
        for mine, theirs in ((s.hidden(index), t.hidden(index)) for s, t in [(found, together)]):
            np.testing.assert_allclose(mine.covariance, theirs.covariance, rtol=1e-9, atol=1e-12)
            np.testing.assert_allclose(mine.mean, theirs.mean, rtol=1e-9, atol=1e-12)


def test_trials_and_refits_read_the_samples_alone(vit: Study, samples: Path, tmp_path: Path) -> None:
    assert len(read_samples(vit, samples, OPTIONS, tmp_path).rows) == COUNT


def test_models_without_classes_or_pixels_are_refused(vit: Study, exported: Exported, samples: Path) -> None:
    backbone = look(exported(zoo.Case("hf-dinov2")))
    with pytest.raises(ConfigError, match="no output that holds classes"):
        open_measured(backbone, samples, graph_inputs(backbone.source), OPTIONS)
    inner = open_source(samples, graph_inputs(vit.source), None)
    with pytest.raises(ConfigError, match="reads whole numbers"):
        ViewedSource(inner, vit, [ModelInput("ids", ("batch", 8), np.dtype(np.int64))], 1, 0)


def test_samples_that_do_not_fit_are_told_as_ever(vit: Study, tmp_path: Path) -> None:
    for array, why in (
        (np.ones((2, 3, 48, 40), np.float32), "have shape"),
        (np.ones((2, 3, 64, 64), complex), "takes"),
    ):
        np.save(tmp_path / "x.npy", array)
        with pytest.raises(DataError, match=why):
            rows(opened(vit, tmp_path / "x.npy"))


def test_sequential_statistics_go_without_views(vit: Study, samples: Path, tmp_path: Path) -> None:
    wanted = {0: frozenset({"hidden"})}
    found = SequentialStatistics(vit, samples, wanted, OPTIONS, tmp_path)
    assert found.behind(0, {}).file.header.samples == COUNT
    assert "not of views" in found.notes[0]


def test_a_ratios_file_asks_for_views(exported: Exported, samples: Path, tmp_path: Path) -> None:
    ratios, report = tmp_path / "r.yaml", tmp_path / "p.json"
    ratios.write_text("version: 1\nattention: {qk: 0.5}\nffn: {fc2: 0.5}\ncalibration: {views: 2}\n")
    words = ["prune", str(exported(zoo.Case("timm-vit"))), "--ratios", str(ratios), "-o", str(tmp_path / "p.onnx")]
    done = CliRunner().invoke(main, [*words, "--data", str(samples), "--threads", "1"])
    assert done.exit_code == 0, done.output
    assert "18 samples" in done.output
    assert "2 views of each" in done.output
    told: dict[str, Any] = json.loads(report.read_text())
    assert told["statistics"]["samples"] == 18
    done = CliRunner().invoke(main, [*words, "--overwrite", "--views", "1"])
    assert done.exit_code == 2
    assert "--views is about samples" in done.output
    words += ["--overwrite", "--statistics", str(tmp_path / "s.npz"), "--threads", "1"]
    measured = ["calibrate", words[1], "--data", str(samples), "-o", str(tmp_path / "s.npz"), "--threads", "1"]
    assert CliRunner().invoke(main, measured).exit_code == 0
    assert "views are not made" in CliRunner().invoke(main, words).output


def test_a_source_that_cannot_be_counted_has_views(vit: Study, samples: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(samples.parent))
    (samples.parent / "yielding_views.py").write_text(
        f"import numpy as np\ndef rows():\n    yield np.load({str(samples)!r})[:2]\n"
    )
    inner = open_source("yielding_views:rows", graph_inputs(vit.source), None)
    source = ViewedSource(inner, vit, graph_inputs(vit.source), 1, 0)
    assert source.count is None
    assert [len(rows(source)[1]) for _ in range(2)] == [4, 4]
