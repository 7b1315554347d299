"""The real programs, trtexec and tensorrt_rtx, where a machine has one and a GPU; skipped with the reason elsewhere."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.engines import graphs
from toast_onnx.engines import cuda, trtexec
from toast_onnx.engines.backends import choose
from toast_onnx.engines.build import BuildRequest, build
from toast_onnx.engines.trtbench import measure, open_target

PROGRAMS = {name: trtexec.find_trtexec(name) for name in trtexec.PROGRAMS}


@pytest.fixture(params=list(trtexec.PROGRAMS))
def program(request: pytest.FixtureRequest) -> tuple[str, trtexec.Trtexec]:
    """A backend's name and its program."""
    path = PROGRAMS[request.param]
    if path is None:
        pytest.skip(f"{trtexec.PROGRAMS[request.param]} is not on this machine")
    return request.param, trtexec.ask(path)


def test_it_says_what_it_is_and_takes_every_flag_that_is_given_to_it(
    program: tuple[str, trtexec.Trtexec], tmp_path: Path
) -> None:
    _, found = program
    assert found.version
    settings = trtexec.BenchSettings(times=tmp_path / "t", profile=tmp_path / "p", layers=tmp_path / "l")
    words = trtexec.command(found, tmp_path / "m.engine", {"x": (1, 4, 32)}, settings)
    given = {word.partition("=")[0] for word in words[1:]}
    assert given <= found.flags


def test_its_figures_fit_together(program: tuple[str, trtexec.Trtexec], tmp_path: Path) -> None:
    name, found = program
    if cuda.gpu_name() is None:
        pytest.skip("an engine runs on an NVIDIA GPU and none is here")
    models = [graphs.save(graphs.mlp(hidden), tmp_path / f"{hidden}.onnx") for hidden in (4096, 32)]
    engines = [m.with_suffix(".engine") for m in models]
    assert choose(name).name == name
    for model, engine in zip(models, engines, strict=True):
        build(model, engine, BuildRequest(backend=name, batch=(1, 8, 32)))
    targets = [open_target(engine, [1, 32]) for engine in engines]
    settings = trtexec.BenchSettings(duration=0.5)
    results = measure(found, targets, [1, 32], settings, rounds=2, layers=True)
    assert [(r["batch"], r["rounds"]) for r in results] == [(1, 2), (1, 2), (32, 2), (32, 2)]
    for r in results:
        assert r["median_ms"] > 0
        # Queries follow one another, so the rate is at most what the GPU time allows, with some slack for its spread.
        assert r["images_per_second"] <= 1.2 * r["batch"] * 1000 / r["median_ms"]
        assert sum(r["blocks"].values()) > 0
    assert results[0]["speedup"] == 1.0
