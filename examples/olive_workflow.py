"""toast-onnx as a pass of Microsoft Olive: prune, then quantize, in one Olive workflow.

    pip install olive-ai requests torch
    OLIVE_DISABLE_TELEMETRY=1 python examples/olive_workflow.py --out workflow

Olive runs `ToastPrune` below like a pass of its own, on any ONNX model that a pass before it (an export, say) gives,
then its static quantization on the pruned model, with the same calibration images. Tried with olive-ai 0.13.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
from olive.data.registry import Registry
from olive.model import ONNXModelHandler
from olive.package_config import OlivePackageConfig
from olive.passes import Pass
from olive.passes.pass_config import PassConfigParam
from olive.workflows import run

HERE = Path(__file__).resolve().parent


class ToastPrune(Pass):
    """Prunes an ONNX model with the installed `toast-onnx`."""

    @classmethod
    def _default_config(cls, accelerator_spec: Any) -> dict[str, PassConfigParam]:
        text = {"type_": str, "default_value": None}
        return {
            "ratios": PassConfigParam(type_=str, required=True, description="Ratios file, or a preset."),
            "data": PassConfigParam(**text, description="Calibration samples, as for `prune --data`."),
            "preprocess": PassConfigParam(**text, description="Recipe for images."),
        }

    def _run_for_config(self, model: ONNXModelHandler, config: Any, output_model_path: str) -> ONNXModelHandler:
        out = Path(output_model_path).with_suffix("") / "model.onnx"
        out.parent.mkdir(parents=True, exist_ok=True)
        words = ["-m", "toast_onnx_cli.main", "prune", model.model_path, "--ratios", config.ratios, "-o", str(out)]
        for name in ("data", "preprocess"):
            if getattr(config, name) is not None:
                words += [f"--{name}", getattr(config, name)]
        subprocess.run([sys.executable, *words], check=True)
        return ONNXModelHandler(model_path=str(out.parent), onnx_file_name=out.name)


@Registry.register_dataset()
def digits(data_dir: str) -> list[tuple[dict[str, np.ndarray], int]]:
    """The calibration images as Olive wants them: (inputs by name, label), the label unused."""
    with np.load(data_dir) as file:
        pixels = file["images"][:, None].astype(np.float32) / 255
    return [({"pixels": image}, 0) for image in pixels]


def workflow(out: Path) -> dict[str, Any]:
    """Olive's run configuration."""
    data = str(HERE / "digits_calibration.npz")
    return {
        "input_model": {"type": "ONNXModel", "model_path": str(HERE / "digits_vit.onnx")},
        "systems": {
            "here": {
                "type": "LocalSystem",
                "accelerators": [{"device": "cpu", "execution_providers": ["CPUExecutionProvider"]}],
            }
        },
        "data_configs": [
            {
                "name": "calibration",
                "type": "DataContainer",
                "load_dataset_config": {"type": "digits", "data_dir": data},
                "pre_process_data_config": {"type": "skip_pre_process"},
                "post_process_data_config": {"type": "skip_post_process"},
                "dataloader_config": {"type": "default_dataloader", "batch_size": 32},
            }
        ],
        "passes": {
            "prune": {
                "type": "ToastPrune",
                "ratios": str(HERE / "ratios.yaml"),
                "data": data,
                "preprocess": "none",
            },
            "quantize": {
                "type": "OnnxStaticQuantization",
                "data_config": "calibration",
                "quant_format": "QDQ",
                "per_channel": True,
                "precision": "int8",
                "activation_type": "int8",
                "op_types_to_quantize": ["MatMul", "Gemm"],
                # For TensorRT: symmetric activations, no 32-bit integer biases.
                "activation_symmetric": True,
                "extra_options": {"QuantizeBias": False},
            },
        },
        "host": "here",
        "target": "here",
        "cache_dir": str(out / "cache"),
        "output_dir": str(out / "output"),
        "log_severity_level": 2,
    }


def package_config() -> dict[str, Any]:
    """Olive's own passes, and this one."""
    known: dict[str, Any] = json.loads(Path(OlivePackageConfig.get_default_config_path()).read_text(encoding="utf-8"))
    anything = {key: ["*"] for key in ("supported_providers", "supported_accelerators", "supported_precisions")}
    known["passes"]["ToastPrune"] = {"module_path": f"{Path(__file__).stem}.ToastPrune", **anything}
    return known


def main() -> None:
    """Runs the workflow and puts its model at OUT/digits_vit.int8.onnx."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("workflow"), help="folder for cache and result")
    out = parser.parse_args().out.resolve()
    result = run(workflow(out), package_config=package_config())
    best = result.get_best_candidate()
    shutil.copy(best.model_path, out / "digits_vit.int8.onnx")
    print(out / "digits_vit.int8.onnx")


if __name__ == "__main__":
    main()
