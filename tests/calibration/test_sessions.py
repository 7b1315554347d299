"""Sessions: what is asked for, or an error that says why not."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto

from tests.calibration.tiny import colour_model, two_input_model
from toast_onnx.errors import BackendError, ConfigError, ModelError
from toast_onnx.providers import PROVIDERS
from toast_onnx_calibration.sessions import make_session, model_inputs, run


def test_a_path_and_its_bytes_are_the_same_model(tmp_path: Path) -> None:
    path = colour_model(tmp_path / "m.onnx")
    pixels = np.random.default_rng(0).random((2, 3, 8, 8), np.float32)
    for model in (path, str(path), path.read_bytes()):
        session = make_session(model, threads=1)
        assert session.get_providers() == ["CPUExecutionProvider"]
        scores = run(session, {"pixels": pixels})["scores"]
        np.testing.assert_allclose(scores, pixels.astype(np.float64).mean((2, 3)), rtol=1e-5)


def test_bytes_find_their_external_data(tmp_path: Path) -> None:
    model = onnx.load(colour_model(tmp_path / "m.onnx", classes=900))
    onnx.save(model, tmp_path / "big.onnx", save_as_external_data=True, location="big.data", size_threshold=0)
    (tmp_path / "big.onnx").read_bytes()
    session = make_session((tmp_path / "big.onnx").read_bytes(), external_data=tmp_path)
    assert run(session, {"pixels": np.ones((1, 3, 8, 8), np.float32)})["scores"].shape == (1, 900)


def test_inputs(tmp_path: Path) -> None:
    ids, mask = model_inputs(make_session(two_input_model(tmp_path / "two.onnx")))
    assert (ids.name, ids.shape, ids.dtype) == ("ids", ("batch", 4), np.int64)
    assert mask.dtype == np.float32
    (half,) = model_inputs(make_session(colour_model(tmp_path / "h.onnx", 4, dtype=TensorProto.FLOAT16)))
    assert (half.shape, half.dtype) == ((4, 3, 8, 8), np.float16)


@pytest.mark.parametrize("provider", ["cuda", "tensorrt"])
def test_another_provider_never_steps_in(
    provider: str, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = colour_model(tmp_path / "m.onnx")
    try:
        used = make_session(path, provider).get_providers()
    except BackendError as error:
        used = [str(error)]
    assert PROVIDERS[provider].name in used or f"provider {provider} cannot start here" in used[0]
    assert capfd.readouterr().out == ""  # ONNX Runtime's own retry would print there
    monkeypatch.setattr(ort, "get_available_providers", lambda: ["CPUExecutionProvider"])
    with pytest.raises(BackendError, match=rf"provider {provider} is not installed .*lists cpu"):
        make_session(path, provider)


def test_unknown_provider(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="use one of cpu, cuda, tensorrt"):
        make_session(tmp_path / "m.onnx", "gpu")


@pytest.mark.parametrize("content", [b"", b"not a model", None])
def test_files_that_are_no_models(content: bytes | None, tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ModelError, match=r"m\.onnx") as caught:
        make_session(path)
    assert "\n" not in str(caught.value)


def test_a_failing_run_names_what_was_fed(tmp_path: Path) -> None:
    session = make_session(colour_model(tmp_path / "m.onnx"))
    with pytest.raises(BackendError, match=r"failed on pixels float32\[1, 3, 9, 9\]"):
        run(session, {"pixels": np.zeros((1, 3, 9, 9), np.float32)})
