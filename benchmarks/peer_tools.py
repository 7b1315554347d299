"""What each tool of `peers.py` does to make one smaller model. Every call has a process of its own:

    python benchmarks/peer_tools.py fit|prepare|make NAME TASK.json VALUE
    python benchmarks/peer_tools.py graphs TOOL LIST.json

`fit` finds the ratio at which a tool leaves a share of the multiply-accumulates, `prepare` measures what several rows
start from, `make` writes the model. An answer is one line of JSON, the last one printed.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from decimal import Decimal
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

import yaml

from benchmarks.deit import CALIBRATION, export, load_deit, uniform_ratios
from benchmarks.installed import toast_onnx

#: onnxsim keeps every activation of a calibration run in memory.
ONNXSIM_IMAGES = 32
#: Gradients of so many images make Torch-Pruning's Taylor term.
TAYLOR_IMAGES = 64


@dataclass(frozen=True)
class Task:
    """Paths of one run.

    Attributes:
        dense: the model as its exporter wrote it.
        modern: the same by the dynamo exporter at opset 20, where there is a module to export; empty otherwise.
        weights: of the PyTorch module; empty where there is none.
        images: folder of unlabelled images.
        samples: how many of them a tool may read.
        folder: for what the rows of a model share.
        out: the model to write.
    """

    dense: str
    modern: str
    weights: str
    images: str
    samples: int
    folder: str
    out: str = ""

    def write(self, path: Path) -> Path:
        """As a file that the process reads."""
        path.write_text(json.dumps(asdict(self)))
        return path


@dataclass(frozen=True)
class Peer:
    """A row.

    Attributes:
        make: (task, value) -> None; writes `task.out`.
        share: (task, ratio) -> share of the MACs left, cheaply; None where `make` takes the share itself.
        prepare: task -> None; measured once for all rows that name the same function.
        package: what has to be installed.
        module: whether the PyTorch module is needed, so that an ONNX file alone is not enough.
        merges: whether `task.out` is a list of merged tokens by block, to be run in PyTorch.
    """

    make: Callable[[Task, float], None]
    share: Callable[[Task, float], float] | None = None
    prepare: Callable[[Task], None] | None = None
    package: str | None = None
    module: bool = False
    merges: bool = False


def fit(share: Callable[[Task, float], float], task: Task, wanted: float) -> float:
    """The ratio at which `wanted` of the multiply-accumulates are left, to a 128th, by halving."""
    low, high = 0.0, 0.96
    if share(task, high) > wanted:
        raise SystemExit(f"cannot leave {wanted:g} of the MACs")
    for _ in range(7):
        middle = (low + high) / 2
        low, high = (middle, high) if share(task, middle) > wanted else (low, middle)
    return high


def macs(path: str | Path) -> int:
    """Multiply-accumulates of a file."""
    from toast_onnx.matching.study import study
    from toast_onnx.model import load_model
    from toast_onnx.planning.macs import graph_macs

    look = study(load_model(Path(path)))
    return graph_macs(look.view, look.counted)


# -- this project's command, and published forms written with it ------------------------------------------------------


def uniform_share(task: Task, ratio: float, *, heads: bool = True) -> float:
    """Share of the MACs left with the same ratio everywhere; without `heads` in the feed-forward networks alone."""
    from toast_onnx.matching.study import study
    from toast_onnx.model import load_model
    from toast_onnx.planning.macs import graph_macs
    from toast_onnx.planning.width_costs import dense_widths, width_cost

    look = study(load_model(Path(task.dense)))
    gone = 0.0
    for block in look.match.blocks:
        dense, cost = dense_widths(block), width_cost(look.view, look.counted, block, "macs")
        parts = dense.keys() & ({"qk", "vo", "fc2"} if heads else {"fc2"})
        gone += cost.at(dense) - cost.at(dense | {part: max(1, round(dense[part] * (1 - ratio))) for part in parts})
    return 1 - gone / graph_macs(look.view, look.counted)


def ffn_share(task: Task, ratio: float) -> float:
    """The same where only feed-forward networks shrink."""
    return uniform_share(task, ratio, heads=False)


def data(task: Task) -> tuple[str, ...]:
    """The command's options that say what it reads."""
    read = ("--data", task.images, "--preprocess", str(recipe(task)), "--samples", str(task.samples), "--threads", "1")
    return (*read, "--quiet")


def recipe(task: Task) -> Path:
    """How images are read."""
    path = Path(task.folder) / "calibration.yaml"
    path.write_text(yaml.safe_dump(CALIBRATION))
    return path


def pruned(task: Task, document: dict[str, Any], *options: str) -> None:
    """`prune --ratios`."""
    path = Path(task.out).with_suffix(".yaml")
    path.write_text(yaml.safe_dump(document))
    toast_onnx("prune", task.dense, "--ratios", path, "-o", task.out, "--no-images", "--overwrite", *options)


def calibrated(task: Task) -> None:
    """Statistics of the dense model, once for all published forms."""
    from toast_onnx.matching.study import study
    from toast_onnx.model import load_model
    from toast_onnx_calibration.calibrating import CalibrationOptions, calibrate
    from toast_onnx_calibration.needs import everything

    look = study(load_model(Path(task.dense)))
    reading = CalibrationOptions(preprocess=str(recipe(task)), samples=task.samples, threads=1)
    parts = everything(look, {"qk", "context", "hidden", "fc2"})
    calibrate(look, task.images, statistics(task), parts, reading)


def statistics(task: Task) -> Path:
    """Where they lie."""
    return Path(task.folder) / "statistics.npz"


def published(attention: dict[str, str], ffn: dict[str, str], kind: str, heads: bool, task: Task, ratio: float) -> None:
    """A published form: scores and compensation from statistics of the dense model, nothing block after block."""
    document = uniform_ratios({"select": "index"} | attention, ffn, {"kind": kind}, ratio, heads=heads)
    pruned(task, document, "--statistics", str(statistics(task)), "--quiet")


def uniform(kind: str, task: Task, ratio: float) -> None:
    """This project's defaults, the same ratio everywhere; `kind` empty reads no images."""
    document = uniform_ratios({}, {}, {"kind": kind or "ridge"}, ratio, heads=True)
    pruned(task, document, *(data(task) if kind else ("--quiet",)))


def token_share(task: Task, ratio: float) -> float:
    """Share of the MACs left with an eighth of `ratio` of the tokens merged in every block."""
    from toast_onnx.matching.study import study
    from toast_onnx.model import load_model, save_model
    from toast_onnx.planning.macs import graph_macs
    from toast_onnx.tokens.points import study_tokens
    from toast_onnx.tokens.rewrite import write_merging
    from toast_onnx.tokens.schedule import removed_counts

    look = study(load_model(Path(task.dense)))
    tokens, draft = study_tokens(look), Path(task.out).with_suffix(".draft.onnx")
    model, _ = write_merging(look, tokens, removed_counts(tokens, Decimal(str(ratio / 8))), "auto", True)
    save_model(model, draft)
    left = macs(draft) / graph_macs(look.view, look.counted)
    draft.unlink()
    return left


def merged_alike(task: Task, ratio: float) -> None:
    """The same share of tokens merged in every block; nothing is measured."""
    pruned(task, {"version": 1, "tokens": {"merge": ratio / 8}}, "--quiet")


def measured(task: Task) -> None:
    """What plans start from, once for all of a model's plans."""
    plan_at(task, 0.7, Path(task.folder) / "measured.yaml", "tokens,qk,vo,fc2")


def planned(kind: str, parts: str, task: Task, share: float) -> None:
    """`plan` for a share of the MACs, then `prune`; without parts the widths alone."""
    found = Path(task.out).with_suffix(".plan.yaml")
    plan_at(task, share, found, parts)
    pruned(task, yaml.safe_load(found.read_text()), "--compensation", kind, *data(task))


def plan_at(task: Task, share: float, found: Path, parts: str) -> None:
    """Ratios that leave a share of the MACs, from measurements that are kept."""
    results = Path(task.folder) / "sensitivity.json"
    known = ("--sensitivity", str(results), "--parts", parts)
    toast_onnx("plan", task.dense, "--macs", f"{share:g}", "-o", found, "--overwrite", *known, *data(task))


# -- onnxsim -----------------------------------------------------------------------------------------------------------

#: What it calls them -> functions of `onnxsim`. Their wanda forms match the same nodes.
ONNXSIM = {"heads": "apply_attention_head_pruning", "structured": "apply_structured_pruning"}


def onnxsim_share(task: Task, ratio: float) -> float:
    """Share of the MACs left by its structured pruning, on the opset-20 export, whose GELU it matches."""
    import onnx
    import onnxsim

    source, draft = onnxsim_source(task), Path(task.out).with_suffix(".draft.onnx")
    onnx.save(onnxsim.apply_structured_pruning(onnx.load(source), sparsity=ratio), draft)
    left = macs(draft) / macs(source)
    draft.unlink()
    return left


def onnxsim_source(task: Task) -> str:
    """The export it is given."""
    return task.modern or task.dense


def onnxsim_pruned(scored: bool, refitted: bool, task: Task, ratio: float) -> None:
    """Channels of the feed-forward networks, by weights or by wanda, then its ridge recovery where asked for."""
    import onnx
    import onnxsim

    model = onnx.load(onnxsim_source(task))
    batches = calibration_batches(task, min(ONNXSIM_IMAGES, task.samples)) if scored or refitted else None
    if scored:
        small = onnxsim.apply_structured_wanda_pruning(model, calibration_data=batches, sparsity=ratio)
    else:
        small = onnxsim.apply_structured_pruning(model, sparsity=ratio)
    if refitted:
        small = onnxsim.apply_pruning_finetune(model, small, calibration_data=batches)
    onnx.save(small, task.out)


def calibration_batches(task: Task, count: int) -> list[dict[str, np.ndarray]]:
    """Calibration images as the model takes them, by input name."""
    from toast_onnx_calibration.recipes import parse_recipe
    from toast_onnx_calibration.sessions import ModelInput, make_session
    from toast_onnx_calibration.sources import open_source

    name = make_session(Path(task.dense), threads=1).get_inputs()[0].name
    inputs = [ModelInput(name, ("batch", 3, 224, 224), np.dtype(np.float32))]
    reading = parse_recipe(CALIBRATION, "calibration")
    return [dict(chunk.arrays) for chunk in open_source(task.images, inputs, reading, samples=count)]


def graphs(tool: str, listed: Path) -> None:
    """A tool on many exports, each as (graph, out); a line says what each gave: empty, or why it failed.

    Args:
        tool: `toast-onnx`, or `onnxsim` or `onnxsim, simplified` with `: ` and what it calls it.
        listed: JSON of the pairs.
    """
    name, _, function = tool.partition(": ")
    for graph, out in json.loads(listed.read_text()):
        try:
            if name == "toast-onnx":
                ours_on(graph, out)
            else:
                onnxsim_on(function, name.endswith("simplified"), graph, out)
            why = ""
        except (Exception, SystemExit) as e:  # tools raise whatever they like
            why = f"{type(e).__name__}: {e}".splitlines()[0]
        print(json.dumps(why), flush=True)


def onnxsim_on(function: str, simplified: bool, graph: str, out: str) -> None:
    """One of its functions at one half on any graph, as it is or simplified by it first."""
    import onnx
    import onnxsim

    model = onnx.load(graph)
    if simplified:
        model = onnxsim.simplify(model)[0]
        onnx.save(model, f"{out}.given.onnx")
    onnx.save(getattr(onnxsim, ONNXSIM[function])(model, sparsity=0.5), out)


def ours_on(graph: str, out: str) -> None:
    """Half of queries and keys, of values and of hidden units, from the weights alone."""
    halves = {"version": 1, "attention": {"qk": 0.5, "vo": 0.5}, "ffn": {"fc2": 0.5}}
    path = Path(out).with_suffix(".yaml")
    path.write_text(yaml.safe_dump(halves))
    toast_onnx("prune", graph, "--ratios", path, "-o", out, "--skip-unprunable", "--overwrite", "--quiet")


# -- PyTorch modules ---------------------------------------------------------------------------------------------------


def module_macs(model: Any, removed: list[int]) -> int:
    """Multiply-accumulates of a timm Vision Transformer for 224 x 224, `removed` tokens merged in each block."""
    tokens = 1 + model.patch_embed.num_patches
    total = model.patch_embed.proj.weight.numel() * (tokens - 1) + model.head.weight.numel()
    for block, gone in zip(model.blocks, removed, strict=True):
        qkv, proj = block.attn.qkv.weight, block.attn.proj.weight
        total += tokens * (qkv.numel() + proj.numel()) + 2 * tokens * tokens * proj.shape[1]
        tokens -= gone
        total += tokens * (block.mlp.fc1.weight.numel() + block.mlp.fc2.weight.numel())
    return int(total)


def magnitude_share(task: Task, ratio: float) -> float:
    """Share of the MACs left by Torch-Pruning; its widths depend on the ratio alone."""
    dense, small = load_deit(Path(task.weights)), torch_pruned(task, ratio, taylor=False)
    none = [0] * len(dense.blocks)
    return module_macs(small, none) / module_macs(dense, none)


def torch_pruned(task: Task, ratio: float, *, taylor: bool) -> Any:
    """The module after one step of Torch-Pruning: group magnitude, or its Taylor term without labels.

    The Taylor term wants gradients of a loss; at the dense weights a distance from the dense answer has none, so the
    model's own most likely class stands in for the label.
    """
    import torch
    import torch_pruning as tp

    model, example = load_deit(Path(task.weights)), torch.zeros(1, 3, 224, 224)
    for part in model.modules():
        if hasattr(part, "fused_attn"):
            part.fused_attn = False
    if taylor:
        for batch in calibration_batches(task, min(TAYLOR_IMAGES, task.samples)):
            scores = model(torch.from_numpy(next(iter(batch.values()))))
            torch.nn.functional.cross_entropy(scores, scores.detach().argmax(dim=1)).backward()
        importance = tp.importance.GroupTaylorImportance()
    else:
        importance = tp.importance.GroupMagnitudeImportance(p=2)
    tp.pruner.BasePruner(
        model,
        example,
        importance=importance,
        pruning_ratio=ratio,
        ignored_layers=[model.head],
        num_heads={part.qkv: part.num_heads for part in model.modules() if hasattr(part, "qkv")},
        prune_head_dims=True,
    ).step()
    for part in model.modules():
        if hasattr(part, "qkv"):
            part.attn_dim = part.qkv.out_features // 3
            part.head_dim = part.attn_dim // part.num_heads
    return model


def torch_made(taylor: bool, task: Task, ratio: float) -> None:
    """Torch-Pruning, then an export."""
    export(torch_pruned(task, ratio, taylor=taylor).eval(), Path(task.out))


def tome(task: Task, share: float) -> None:
    """ToMe: the same number of tokens in every block, the largest MACs within the share."""
    model = load_deit(Path(task.weights))
    blocks = len(model.blocks)
    dense = module_macs(model, [0] * blocks)
    count = next(r for r in range(196) if module_macs(model, merged(r, blocks)) <= share * dense)
    Path(task.out).write_text(json.dumps(merged(count, blocks)))


def merged(count: int, blocks: int) -> list[int]:
    """Tokens that each block merges, never more than half of the patches left."""
    left, found = 196, []
    for _ in range(blocks):
        found.append(min(count, left // 2))
        left -= found[-1]
    return found


GM = ({"score": "gm"}, {"score": "activation"})
ENERGY = {"score": "energy"}
OURS_WIDTHS = "qk,vo,fc2"
PEERS: dict[str, Peer] = {
    "the paper's scores, plain removal": Peer(partial(published, *GM, "none", True), uniform_share, calibrated),
    "VBP (variance of hidden units, bias)": Peer(
        partial(published, ENERGY, {"score": "variance"}, "bias", False), ffn_share, calibrated
    ),
    "CORP's form (index pairs, ridge)": Peer(
        partial(published, ENERGY, {"score": "variance"}, "ridge", True), uniform_share, calibrated
    ),
    "onnxsim, structured": Peer(partial(onnxsim_pruned, False, False), onnxsim_share, package="onnxsim"),
    "onnxsim, structured wanda": Peer(partial(onnxsim_pruned, True, False), onnxsim_share, package="onnxsim"),
    "onnxsim, structured wanda, ridge recovery": Peer(
        partial(onnxsim_pruned, True, True), onnxsim_share, package="onnxsim"
    ),
    "Torch-Pruning, magnitude": Peer(partial(torch_made, False), magnitude_share, package="torch_pruning", module=True),
    "Torch-Pruning, Taylor without labels": Peer(
        partial(torch_made, True), magnitude_share, package="torch_pruning", module=True
    ),
    "ToMe (PyTorch)": Peer(tome, package="timm", module=True, merges=True),
    "toast-onnx, no images": Peer(partial(uniform, ""), uniform_share),
    "toast-onnx, uniform widths": Peer(partial(uniform, "ridge"), uniform_share),
    "toast-onnx, uniform widths, `local`": Peer(partial(uniform, "local"), uniform_share, package="torch"),
    "toast-onnx, tokens, as many in every block": Peer(merged_alike, token_share),
    "toast-onnx, planned widths": Peer(partial(planned, "ridge", OURS_WIDTHS), prepare=measured),
    "toast-onnx, planned widths, `local`": Peer(
        partial(planned, "local", OURS_WIDTHS), prepare=measured, package="torch"
    ),
    "toast-onnx, planned tokens": Peer(partial(planned, "ridge", "tokens"), prepare=measured),
    "toast-onnx, planned widths and tokens": Peer(partial(planned, "ridge", f"tokens,{OURS_WIDTHS}"), prepare=measured),
}


def main() -> None:
    """One call of one row."""
    what, name, path, *values = sys.argv[1:]
    if what == "graphs":
        graphs(name, Path(path))
        return
    task, peer = Task(**json.loads(Path(path).read_text())), PEERS[name]
    if what == "prepare" and peer.prepare is not None:
        peer.prepare(task)
    elif what == "fit" and peer.share is not None:
        print(json.dumps({"value": fit(peer.share, task, float(values[0]))}))
    elif what == "make":
        peer.make(task, float(values[0]))


if __name__ == "__main__":
    main()
