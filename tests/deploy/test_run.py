"""The order of steps, and which of them run again. Commands are played here; tests/cli runs the real ones."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest
import yaml

from tests.engines import graphs
from toast_onnx.deploy.code import code_files
from toast_onnx.deploy.config import load_deployment
from toast_onnx.deploy.run import Finished, deploy
from toast_onnx.deploy.steps import plan_steps
from toast_onnx.engines import cuda
from toast_onnx.errors import BackendError, ConfigError

EXAMPLES = Path(__file__).parents[2] / "examples"
WHOLE = {
    "version": 1,
    "model": "m.onnx",
    "output": "out",
    "precision": "fp16",
    "prune": {"ratios": "ratios.yaml", "data": "samples"},
    "build": {"batch": "1:8:32"},
    "compare": {"data": "samples"},
    "bench": {"runtime": ["onnxruntime", "trtexec"], "batch": [1, 8]},
    "check": {},
}
ORDER = ["prune", "convert", "convert-dense", "build-dense", "build", "compare", "bench-onnxruntime"]
GPU_STEPS = ["bench-trtexec", "check"]


class Player:
    """Plays the commands: writes each output as a function of its inputs' bytes, counts, and fails where told to."""

    def __init__(self) -> None:
        self.ran: list[str] = []
        self.fails: set[str] = set()
        self.kills: set[str] = set()

    def __call__(self, arguments: Sequence[str], folder: Path) -> Finished:
        words = list(arguments)
        name = words[0]
        target = words[words.index("-o") + 1] if "-o" in words else ""
        if name == "build":
            name = ("convert" if "onnx" in words else "build") + ("" if ".pruned." in target else "-dense")
        if name == "bench":
            name = f"bench-{'trtexec' if 'trtexec' in words else 'onnxruntime'}"
        name = "check" if name == "check-engine" else name
        if name in self.kills:
            raise KeyboardInterrupt
        self.ran.append(name)
        if name in self.fails:
            return Finished(1, "", "the disk is full; free space")
        if target:
            # A valid ONNX file that differs wherever an input or the command differs.
            read = [folder / w for w in words if (folder / w).is_file() and w != target and not w.endswith(".json")]
            seed = sum(sum(p.read_bytes()) for p in read) + sum(map(ord, " ".join(words)))
            graphs.save(graphs.mlp(hidden=8, seed=seed % 1000), folder / target)
            report = words[words.index("--report") + 1] if "--report" in words else f"{target}.json"
            (folder / report).write_text('{"backend": "tensorrt-rtx"}')
        return Finished(0, json.dumps({"step": name}))


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(cuda, "gpu_name", lambda: None)
    monkeypatch.setattr("toast_onnx.engines.backends.choose", lambda name: type("Rtx", (), {"name": "tensorrt-rtx"}))
    graphs.save(graphs.mlp(), tmp_path / "m.onnx")
    shutil.copy(EXAMPLES / "ratios.yaml", tmp_path)
    (tmp_path / "samples").mkdir()
    (tmp_path / "samples" / "0.png").write_bytes(b"picture")
    return write(tmp_path / "d.yaml", WHOLE)


def write(path: Path, document: dict[str, object]) -> Path:
    path.write_text(yaml.safe_dump(document))
    return path


def go(source: Path, player: Player, redo: Sequence[str] = ()) -> tuple[list[str], dict[str, str]]:
    """Steps that ran, and the status of all."""
    player.ran.clear()
    document = deploy(load_deployment(source, allow_code=True), source, player, redo=redo)
    on_disk = json.loads((source.parent / "out" / "deploy.json").read_text())
    assert on_disk == document
    return list(player.ran), {name: entry["status"] for name, entry in document["steps"].items()}


def test_steps_run_in_order_and_those_that_need_a_gpu_wait(source: Path) -> None:
    ran, statuses = go(source, Player())
    assert ran == ORDER
    assert statuses == dict.fromkeys(ORDER, "done") | dict.fromkeys(GPU_STEPS, "waiting")
    script = (source.parent / "out" / "elsewhere.sh").read_text()
    assert [line.split()[1] for line in script.splitlines() if line.startswith("toast-onnx")] == [
        "bench",
        "check-engine",
    ]
    assert 'cd "$(dirname "$0")"/..\n' in script


def test_nothing_runs_twice(source: Path) -> None:
    player = Player()
    go(source, player)
    assert go(source, player)[0] == []


def test_what_another_machine_can_do_is_done_there(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    player = Player()
    go(source, player)
    monkeypatch.setattr(cuda, "gpu_name", lambda: "a GPU")
    monkeypatch.setattr("toast_onnx.engines.trtexec.find_trtexec", lambda backend: "/bin/trtexec")
    ran, statuses = go(source, player)
    assert ran == GPU_STEPS
    assert set(statuses.values()) == {"done"}
    assert not (source.parent / "out" / "elsewhere.sh").exists()


@pytest.mark.parametrize("killed", ORDER)
def test_a_killed_run_goes_on_where_it_was(source: Path, killed: str) -> None:
    player = Player()
    player.kills = {killed}
    with pytest.raises(KeyboardInterrupt):
        go(source, player)
    player.kills = set()
    assert go(source, player)[0] == ORDER[ORDER.index(killed) :]


def test_only_what_depends_on_a_change_runs_again(source: Path) -> None:
    player, folder = Player(), source.parent
    go(source, player)
    write(source, WHOLE | {"bench": {**WHOLE["bench"], "rounds": 7}})  # type: ignore[dict-item]
    assert go(source, player)[0] == ["bench-onnxruntime"]
    write(source, WHOLE | {"bench": {**WHOLE["bench"], "rounds": 7}, "build": {"batch": 4}})  # type: ignore[dict-item]
    assert go(source, player)[0] == ["build-dense", "build"]
    (folder / "samples" / "1.png").write_bytes(b"another")
    assert go(source, player)[0] == ["prune", "compare"]  # the player writes the same pruned model again
    (folder / "ratios.yaml").write_text("version: 1\nffn: {fc2: 0.9}\n")
    assert go(source, player)[0] == [name for name in ORDER if "dense" not in name]
    graphs.save(graphs.mlp(seed=5), folder / "m.onnx")
    assert go(source, player)[0] == ORDER


def test_data_that_only_the_ratios_file_names_counts(source: Path) -> None:
    player, folder = Player(), source.parent
    (folder / "ratios.yaml").write_text("version: 1\nffn: {fc2: 0.5}\ncalibration: {data: samples}\n")
    write(source, {"version": 1, "model": "m.onnx", "output": "out", "prune": {"ratios": "ratios.yaml"}})
    assert go(source, player)[0] == ["prune"]
    (folder / "samples" / "0.png").write_bytes(b"changed")
    assert go(source, player)[0] == ["prune"]


@pytest.mark.parametrize("file", ["metric.py", "metric/__init__.py", "metric/inner.py"])
@pytest.mark.parametrize(
    ("section", "key", "name"),
    [("eval", "metric", "eval"), ("eval", "data", "eval"), ("compare", "data", "compare"), ("prune", "data", "prune")],
)
def test_python_code_that_a_step_calls_counts(source: Path, file: str, section: str, key: str, name: str) -> None:
    player, code = Player(), source.parent / file
    code.parent.mkdir(exist_ok=True)
    code.write_text("def measure(outputs): return {'right': 1.0}\n")
    document = {key: WHOLE[key] for key in ("version", "model", "output", "prune")}
    document |= {"compare": {"data": "samples"}, "eval": {"data": "samples"}}
    spec = "metric.inner:measure" if code.name == "inner.py" else "metric:measure"
    document[section] = {**document[section], key: spec}  # type: ignore[dict-item]
    write(source, document)
    go(source, player)
    (code.parent / "__pycache__").mkdir()
    (code.parent / "__pycache__" / "metric.pyc").write_bytes(b"compiled")
    assert go(source, player)[0] == []
    elsewhere = shutil.copytree(source.parent, source.parent.parent / f"{source.parent.name}-elsewhere")
    assert go(elsewhere / source.name, player)[0] == []
    code.write_text("def measure(outputs): return {'right': 0.5}\n")
    ran = go(source, player)[0]
    assert set(ran) == {name}


@pytest.mark.parametrize("name", ["nowhere_at_all:f", "m.onnx", "C:\\samples", "imagenet", "a:b:c", ":f"])
def test_what_names_no_module_has_no_code(name: str, tmp_path: Path) -> None:
    assert code_files(name, tmp_path) == []


def test_code_in_the_folder_comes_before_installed_code(tmp_path: Path) -> None:
    (installed,) = code_files("json.decoder:JSONDecoder", tmp_path)[1:2]
    assert installed.parent == Path(json.__file__).parent
    (tmp_path / "json.py").write_text("")
    assert code_files("json:loads", tmp_path) == [tmp_path / "json.py"]


def test_an_output_that_was_touched_or_lost_is_made_again(source: Path) -> None:
    player, out = Player(), source.parent / "out"
    go(source, player)
    (out / "m.pruned.fp16.engine").unlink()
    assert go(source, player)[0] == ["build"]
    (out / "m.pruned.onnx").write_bytes(b"broken")
    assert go(source, player)[0] == ["prune"]


def test_asked_for_again_is_run_again(source: Path) -> None:
    player = Player()
    go(source, player)
    assert go(source, player, redo=["compare"])[0] == ["compare"]
    with pytest.raises(ConfigError, match="no step 'bench' here; steps: prune"):
        go(source, player, redo=["bench"])


def test_a_failed_step_ends_the_run_and_is_tried_again(source: Path) -> None:
    player = Player()
    go(source, player)
    player.fails = {"convert"}
    (source.parent / "ratios.yaml").write_text("version: 1\nffn: {fc2: 0.9}\n")
    ran, statuses = go(source, player)
    assert ran == ["prune", "convert"]
    assert statuses["convert"] == "failed"
    # What was measured on the old pruned model is off the record, what does not depend on it stays.
    assert set(statuses) == {"prune", "convert", "convert-dense", "build-dense"}
    player.fails = set()
    assert go(source, player)[0] == [name for name in ORDER[1:] if "dense" not in name]


def test_without_a_backend_the_engine_waits_and_what_reads_it_too(
    source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none(name: str) -> None:
        raise BackendError("no TensorRT is installed; install one")

    monkeypatch.setattr("toast_onnx.engines.backends.choose", none)
    ran, statuses = go(source, Player())
    assert ran == [name for name in ORDER if not name.startswith("build")]
    assert statuses["build"] == statuses["check"] == statuses["bench-trtexec"] == "waiting"
    entry = json.loads((source.parent / "out" / "deploy.json").read_text())["steps"]["check"]
    assert entry["reason"] == "out/m.pruned.fp16.engine has to be made first"


def test_float32_needs_no_conversion_and_no_pruning_no_baseline(source: Path) -> None:
    write(source, {"version": 1, "model": "m.onnx", "build": {}, "bench": {"runtime": "trtexec"}})
    steps = plan_steps(load_deployment(source, allow_code=True), source)
    assert [s.name for s in steps] == ["build", "bench-trtexec"]
    assert steps[0].outputs == ("d/m.fp32.engine", "d/m.fp32.engine.json")


@pytest.mark.parametrize(
    ("settings", "timed"),
    [
        ({"precision": "fp16", "build": {"format": "ort"}}, ["m.onnx", "out/m.pruned.onnx"]),
        ({"precision": "fp32", "build": {"format": "ort"}}, ["m.onnx", "out/m.pruned.fp32.ort"]),
        ({"precision": "fp16", "build": {"format": "ort"}, "prune": None}, ["m.onnx"]),
        ({"precision": "bf16"}, ["m.onnx", "out/m.pruned.onnx"]),
        ({"precision": "fp16", "provider": "cuda"}, ["out/m.fp16.onnx", "out/m.pruned.fp16.onnx"]),
        (
            {"precision": "fp16", "provider": "cuda", "build": {"format": "ort"}},
            ["out/m.fp16.onnx", "out/m.pruned.fp16.ort"],
        ),
        ({"precision": "fp16", "provider": "cuda", "build": {"baseline": False}}, ["out/m.pruned.fp16.onnx"]),
        ({"precision": "fp32", "provider": "cuda", "build": {"baseline": False}}, ["m.onnx", "out/m.pruned.onnx"]),
    ],
)
def test_models_that_are_timed_together_have_one_precision(
    source: Path, settings: dict[str, object], timed: list[str]
) -> None:
    document = {"version": 1, "model": "m.onnx", "output": "out", "prune": {"ratios": "ratios.yaml"}, **settings}
    document["bench"] = {"provider": document.pop("provider", "cpu")}
    write(source, {key: value for key, value in document.items() if value is not None})
    steps = plan_steps(load_deployment(source, allow_code=True), source)
    assert list(steps[-1].inputs) == timed
    made = {name for step in steps for name in step.outputs} | {"m.onnx"}
    assert made.issuperset(timed)


def test_the_preprocessing_beside_the_dense_model_is_handed_on(source: Path) -> None:
    (source.parent / "preprocessor_config.json").write_text("{}")
    steps = {s.name: s for s in plan_steps(load_deployment(source, allow_code=True), source)}
    assert "preprocessor_config.json" in steps["prune"].arguments
    assert "preprocessor_config.json" in steps["compare"].inputs


@pytest.mark.parametrize("content", ["{", "[]", '{"format": "other"}'])
def test_a_record_that_is_none_is_not_overwritten(source: Path, content: str) -> None:
    (source.parent / "out").mkdir()
    (source.parent / "out" / "deploy.json").write_text(content)
    with pytest.raises(ConfigError, match=r"deploy\.json"):
        deploy(load_deployment(source, allow_code=True), source, Player())


def test_a_missing_model_is_told_before_anything_runs(source: Path) -> None:
    (source.parent / "m.onnx").unlink()
    with pytest.raises(ConfigError, match=r"m\.onnx does not exist; paths are relative"):
        go(source, Player())


def test_a_quantized_model_is_what_ships(source: Path) -> None:
    document = {**WHOLE, "precision": "fp32", "quantize": {"data": "samples", "samples": 32}}
    steps = {s.name: s for s in plan_steps(load_deployment(write(source, document)), source)}
    small = "out/m.pruned.int8.onnx"
    assert list(steps)[:2] == ["prune", "quantize"]
    assert steps["quantize"].outputs == (small,)
    assert steps["quantize"].arguments[:2] == ("quantize", "out/m.pruned.onnx")
    assert "--dense" in steps["quantize"].arguments
    assert steps["build"].inputs[0] == small
    assert steps["build"].outputs[0] == "out/m.pruned.int8.engine"
    assert steps["compare"].arguments[:3] == ("compare", "m.onnx", small)
    assert "convert" not in steps


def test_half_precision_and_quantization_exclude_each_other(source: Path) -> None:
    with pytest.raises(ConfigError, match="has precision: fp16 with quantize"):
        load_deployment(write(source, {**WHOLE, "quantize": {"data": "samples"}}))


def test_other_programs_files_are_outputs_of_the_build(source: Path) -> None:
    source.write_text("version: 1\nmodel: m.onnx\nbuild: {triton: serve, polygraphy: check.py}\n")
    (step,) = plan_steps(load_deployment(source), source)
    assert step.arguments[:2] == ("build", "m.onnx")
    assert " ".join(step.arguments).count("--triton serve --polygraphy check.py") == 1
    assert step.outputs[2:] == ("serve/m.fp32/config.pbtxt", "serve/m.fp32/1/model.plan", "check.py")
    source.write_text("version: 1\nmodel: m.onnx\nbuild: {format: ort, triton: serve}\n")
    with pytest.raises(ConfigError, match="they go with an engine"):
        load_deployment(source)
