"""Fine-tuning: an ONNX graph as a torch module, its training by distillation, and the weights back into the same graph.

    from pathlib import Path

    from toast_onnx.finetune import to_onnx, to_torch
    from toast_onnx.model import load_model, save_model

    model = load_model("model.pruned.onnx")
    module = to_torch(model)
    ...  # any training loop
    save_model(to_onnx(module, model), Path("model.finetuned.onnx"))

PyTorch is needed (`pip install 'toast-onnx[torch]'`) and imported only when something is called.
"""

from toast_onnx.finetune.convert import to_onnx, to_torch

__all__ = ["to_onnx", "to_torch"]
