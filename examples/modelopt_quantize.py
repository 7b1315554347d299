"""Prunes, then quantizes with NVIDIA ModelOpt: int8 with QuantizeLinear and DequantizeLinear, as TensorRT wants it.

    pip install 'nvidia-modelopt[onnx]' setuptools torch
    python examples/modelopt_quantize.py --out quantized

Needs no GPU. Tried with nvidia-modelopt 0.47, whose `onnx` extra asks for onnx 1.21 and ONNX Runtime 1.24; toast-onnx
runs on those, too, so one environment serves both.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

import numpy as np
from modelopt.onnx.quantization import quantize

HERE = Path(__file__).resolve().parent


def main() -> None:
    """Writes OUT/digits_vit.pruned.onnx and OUT/digits_vit.int8.onnx."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("quantized"), help="folder for the models")
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    pruned, data = out / "digits_vit.pruned.onnx", HERE / "digits_calibration.npz"
    prune = ["prune", str(HERE / "digits_vit.onnx"), "--ratios", str(HERE / "ratios.yaml"), "-o", str(pruned)]
    prune += ["--data", str(data), "--preprocess", "none"]
    subprocess.run([sys.executable, "-m", "toast_onnx_cli.main", *prune], check=True)
    with np.load(data) as file:
        pixels = file["images"][:, None].astype(np.float32) / 255
    quantize(
        str(pruned),
        quantize_mode="int8",
        calibration_data={"pixels": pixels},
        calibration_method="max",
        calibration_eps=["cpu"],
        op_types_to_quantize=["MatMul", "Gemm"],
        high_precision_dtype="fp32",  # what is not quantized; `toast-onnx build` leaves a quantized graph's types alone
        output_path=str(out / "digits_vit.int8.onnx"),
    )


if __name__ == "__main__":
    main()
