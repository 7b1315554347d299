"""What a deployment's steps found, in a few words each."""

from __future__ import annotations

from typing import Any


def headline(name: str, entry: dict[str, Any]) -> str:
    """The figures of one step that a reader looks for first; the reason where it waits or failed.

    Args:
        name: the step.
        entry: its entry in the record that `toast_onnx.deploy.run.deploy` writes.
    """
    result = entry.get("result")
    if entry["status"] != "done":
        return str(entry["reason"])
    if not isinstance(result, dict):
        return ""
    kind = name.partition("-")[0]
    return {"prune": _prune, "convert": _size, "build": _size, "compare": _compare, "eval": _eval}.get(kind, _timing)(
        result
    )


def _prune(result: dict[str, Any]) -> str:
    macs = result["pruned"]["macs"] / result["dense"]["macs"]
    params = result["pruned"]["params"] / result["dense"]["params"]
    twin = result.get("twin")
    proof = "not checked" if twin is None else f"twin agrees to {twin['worst']:.1e} of scale"
    return f"{macs:.1%} of the MACs, {params:.1%} of the parameters; {proof}"


def _size(result: dict[str, Any]) -> str:
    return f"{result['engine']}, {result['engine_bytes'] / 1e6:.1f} MB, {result['precision']}"


def _compare(result: dict[str, Any]) -> str:
    found = []
    for output, figures in result["outputs"].items():
        agreement = f"same top-1 {figures['top1_agreement']:.1%}, " if "top1_agreement" in figures else ""
        found.append(f"{output}: {agreement}relative error {figures['relative_error']:.2e}")
    return "; ".join(found)


def _eval(result: dict[str, Any]) -> str:
    found = result["accuracy"]
    if found is not None:
        return f"top-1 {found['top1']['accuracy']:.2%} on {found['samples']} samples"
    return ", ".join(f"{key} {value:.4g}" for key, value in result["metrics"].items())


def _timing(result: dict[str, Any]) -> str:
    if "passed" in result:  # check-engine
        worst = max(output["relative"] for output in result["outputs"].values())
        return f"within {result['tolerance']:g}: largest difference {worst:.2e} of scale"
    last = result["results"][-1]
    time = f"batch {last['batch']}: {last['median_ms']:.2f} ms"
    alone = len({each["model"] for each in result["results"]}) == 1
    return time if alone else f"{time}, {last['speedup']:.2f} times the first model's speed"
