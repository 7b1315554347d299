"""Which commands a deployment is made of: one step, one `toast-onnx` command with its inputs and outputs."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Literal

from toast_onnx.deploy.config import Deployment
from toast_onnx.engines.triton import repository_files
from toast_onnx.planning.ratios import load_ratios
from toast_onnx.planning.settings import Section

#: What a step may ask of the machine.
Need = Literal["builder", "gpu", "trtexec"]
_RUNTIME = ("onnx", "onnxruntime-gpu", "onnxruntime")
_TENSORRT = ("tensorrt", "tensorrt_rtx")


@dataclass(frozen=True)
class Step:
    """One command.

    Attributes:
        name: what the record calls it.
        arguments: what follows `toast-onnx`; paths are relative to the deployment file's folder.
        inputs: files and folders it reads; of a `module:function` its code counts; names of anything else
            (recipes, presets) count as text.
        outputs: files it writes.
        packages: distributions whose version decides the result.
        needs: what the machine must have.
        keep: keys of its JSON that go into the record; all where empty.
    """

    name: str
    arguments: tuple[str, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...] = ()
    packages: tuple[str, ...] = _RUNTIME
    needs: Need | None = None
    keep: tuple[str, ...] = ()


@dataclass(frozen=True)
class Files:
    """Names of everything a deployment reads and writes, relative to its folder.

    Attributes:
        dense: the model as it came.
        pruned: the pruned model in float32; the dense one where nothing is pruned.
        ships: what the engine is built from: `pruned`, or its quantized or 16-bit copy.
        baseline: the dense model in the precision of what ships.
        engine: the engine, or ONNX Runtime's optimized model.
        dense_engine: the same of the dense model.
    """

    dense: str
    pruned: str
    ships: str
    baseline: str
    engine: str
    dense_engine: str


def output_folder(config: Deployment, source: Path) -> str:
    """Folder of the outputs, relative to the deployment file's."""
    return config.output or source.stem


def name_files(config: Deployment, folder: str) -> Files:
    """Names of a deployment's files; everything written lies in `folder`."""
    stem = PurePosixPath(config.model).stem
    out = PurePosixPath(folder)
    short = f"{stem}.pruned" if config.prune is not None else stem
    pruned = str(out / f"{short}.onnx") if config.prune is not None else config.model
    converts = config.precision in ("fp16", "bf16")
    quantized = None if config.quantize is None else f"{short}.{config.quantize.to}"
    ships = str(out / f"{short}.{config.precision}.onnx") if converts else pruned
    ending = config.build.format if config.build is not None else "engine"
    return Files(
        dense=config.model,
        pruned=pruned,
        ships=ships if quantized is None else str(out / f"{quantized}.onnx"),
        baseline=str(out / f"{stem}.{config.precision}.onnx") if converts else config.model,
        engine=str(out / f"{quantized or f'{short}.{config.precision}'}.{ending}"),
        dense_engine=str(out / f"{stem}.{config.precision}.{ending}"),
    )


def plan_steps(config: Deployment, source: Path) -> list[Step]:
    """The steps a deployment file asks for, in the order they run.

    Args:
        config: the settings.
        source: the deployment file.

    Raises:
        ConfigError: the ratios file has an error.
    """
    files = name_files(config, output_folder(config, source))
    recipe = config.preprocess or _recipe_beside(config.model, source.parent)
    steps = _prune(config, files, recipe, source.parent) + _quantize(config, files, recipe)
    steps += _convert(config, files) + _build(config, files)
    return steps + _measure(config, files, recipe) + _bench(config, files) + _check(config, files, recipe)


def _recipe_beside(model: str, folder: Path) -> str | None:
    """The preprocessing that lies beside the dense model; commands look beside the model they are given."""
    beside = PurePosixPath(model).parent / "preprocessor_config.json"
    return str(beside) if os.path.isfile(folder / beside) else None


def _options(section: Section, *names: str) -> list[str]:
    """Keys of a section as command-line options, those with a value."""
    words: list[str] = []
    for name in names:
        value, option = getattr(section, name), f"--{name.replace('_', '-')}"
        if value is True:
            words.append(option)
        elif value is not None and value is not False:
            words += [option, f"{value:g}" if isinstance(value, float) else str(value)]
    return words


def _preprocess(recipe: str | None) -> list[str]:
    return [] if recipe is None else ["--preprocess", recipe]


def _some(values: Iterable[str | None]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(v for v in values if v is not None))


def _prune(config: Deployment, files: Files, recipe: str | None, folder: Path) -> list[Step]:
    prune = config.prune
    if prune is None:
        return []
    report = str(PurePosixPath(files.pruned).with_suffix(".json"))
    words = ["prune", files.dense, "-o", files.pruned, "--report", report, "--json"]
    goal = config.plan
    if prune.ratios is not None:
        words[2:2] = ["--ratios", prune.ratios]
    if goal is not None:
        words[2:2] = _options(goal, "macs", "params", "latency", "max_drop", "max_error", "labels", "sensitivity")
    ratios = None if prune.ratios is None else folder / prune.ratios
    inside = load_ratios(ratios).calibration.data if ratios is not None and os.path.isfile(ratios) else None
    given = ("data", "statistics", "samples", "views", "solve_on", "seed", "skip_unprunable", "target")
    words += ["--overwrite", *_options(prune, *given)]
    words += _preprocess(recipe) if prune.data is not None or inside is not None else []
    more = () if goal is None else (goal.labels, goal.sensitivity)
    inputs = _some((files.dense, prune.ratios, prune.data, inside, prune.statistics, recipe, *more))
    keep = ("dense", "pruned", "inputs", "twin", "statistics", "agreement")
    planned = () if goal is None else (str(PurePosixPath(files.pruned).with_suffix(".ratios.yaml")),)
    on_gpu = prune.solve_on == "cuda"
    needs: Need | None = "gpu" if on_gpu else None
    packages = (*_RUNTIME, "torch") if on_gpu else _RUNTIME
    return [Step("prune", tuple(words), inputs, (files.pruned, report, *planned), packages, needs, keep)]


def _quantize(config: Deployment, files: Files, recipe: str | None) -> list[Step]:
    quantize = config.quantize
    if quantize is None:
        return []
    words = ["quantize", files.pruned, "-o", files.ships, "--overwrite"]
    words += _options(quantize, "data", "to", "method", "samples", "seed", "ends") + _preprocess(recipe)
    if files.pruned != files.dense:
        words += ["--dense", files.dense]
    inputs = _some((files.pruned, files.dense, quantize.data, recipe))
    return [Step("quantize", (*words, "--json"), inputs, (files.ships,))]


def _convert(config: Deployment, files: Files) -> list[Step]:
    if config.quantize is not None:
        return []
    pairs = [("convert", files.pruned, files.ships)]
    if _wants_baseline(config) and files.baseline != files.ships:
        pairs.append(("convert-dense", files.dense, files.baseline))
    options = ("--format", "onnx", "--precision", config.precision)
    return [
        Step(
            name,
            ("build", before, *options, "-o", after, "--overwrite", "--json"),
            (before,),
            (after, f"{after}.json"),
        )
        for name, before, after in pairs
        if before != after
    ]


def _wants_baseline(config: Deployment) -> bool:
    """Whether the dense model takes the same way as the pruned one, to be measured beside it."""
    if config.prune is None:
        return False
    timed = config.bench is not None and (config.bench.provider != "cpu" or "trtexec" in config.bench.runtime)
    return timed and (config.build is None or config.build.baseline)


def _build(config: Deployment, files: Files) -> list[Step]:
    build = config.build
    if build is None:
        return []
    options = ["--format", build.format, "--precision", config.precision]
    if build.format == "engine":
        options += _options(build, "backend", "batch", "workspace", "optimization_level", "timing_cache")
        options += _options(build, "hardware_compatible", "version_compatible", "uneven_heads")
        if build.compute_capability:
            options += ["--compute-capability", ",".join(build.compute_capability)]
    engine = build.format == "engine"
    beside = _wants_baseline(config) and engine
    # The dense one first: the pruned one's fused attentions are held against its own.
    known = ["--baseline", files.dense_engine] if beside else []
    also = _options(build, "triton", "polygraphy")
    jobs: list[tuple[str, str, str, list[str]]] = [("build", files.ships, files.engine, [*known, *also])]
    if beside:
        jobs.insert(0, ("build-dense", files.baseline, files.dense_engine, []))
    served = () if build.triton is None else repository_files(Path(build.triton), Path(files.engine))
    made = {"build": (*map(str, served), *_some((build.polygraphy,)))}
    return [
        Step(
            name,
            ("build", model, *options, *more, "-o", target, "--overwrite", "--json"),
            _some((model, f"{files.dense_engine}.json" if "--baseline" in more else None)),
            (target, f"{target}.json", *made.get(name, ())),
            packages=_TENSORRT if engine else _RUNTIME,
            needs="builder" if engine else None,
        )
        for name, model, target, more in jobs
    ]


def _in_onnxruntime(config: Deployment, files: Files) -> str:
    """The model that ships as far as ONNX Runtime's CPU provider runs it: it has few bfloat16 kernels."""
    return files.pruned if config.precision == "bf16" else files.ships


def _measure(config: Deployment, files: Files, recipe: str | None) -> list[Step]:
    steps = []
    model = _in_onnxruntime(config, files)
    if config.compare is not None:
        words = ["compare", files.dense, model, *_options(config.compare, "data", "samples", "seed")]
        words += [*_preprocess(recipe), "--rounds", "0", "--json"]
        steps.append(Step("compare", tuple(words), _some((files.dense, model, config.compare.data, recipe))))
    if config.eval is not None:
        for name, path in {"eval-dense": files.dense, "eval": model}.items():
            if name == "eval" or path != model:
                words = ["eval", path, *_options(config.eval, "data", "labels", "metric", "samples", "seed")]
                words += [*_preprocess(recipe), "--json"]
                inputs = _some((path, config.eval.data, config.eval.labels, config.eval.metric, recipe))
                steps.append(Step(name, tuple(words), inputs))
    return steps


def _timed_in_onnxruntime(config: Deployment, files: Files) -> tuple[str | None, str]:
    """The dense model and the pruned one in one precision: float32 on the CPU, that of what ships elsewhere.

    The dense one is None where no step makes it in that precision.
    """
    float32 = config.bench is not None and config.bench.provider == "cpu"
    optimized = config.build is not None and config.build.format == "ort"
    if float32:
        same = optimized and config.precision == "fp32"  # the optimized model is float32 too
        return files.dense, files.engine if same else files.pruned
    made = files.baseline in (files.dense, files.ships) or _wants_baseline(config)
    return files.baseline if made else None, files.engine if optimized else files.ships


def _bench(config: Deployment, files: Files) -> list[Step]:
    bench = config.bench
    if bench is None:
        return []
    sizes = ["--batch", ",".join(map(str, bench.batch))]
    steps = []
    if "onnxruntime" in bench.runtime:
        models = _some(_timed_in_onnxruntime(config, files))
        words = ["bench", *models, *sizes, *_options(bench, "rounds", "threads", "provider"), "--json"]
        needs: Need | None = None if bench.provider == "cpu" else "gpu"
        steps.append(Step("bench-onnxruntime", tuple(words), models, needs=needs))
    if "trtexec" in bench.runtime:
        models = _some((files.dense_engine if _wants_baseline(config) else None, files.engine))
        words = ["bench", *models, "--runtime", "trtexec", *sizes, *_options(bench, "rounds", "duration", "blocks")]
        steps.append(Step("bench-trtexec", (*words, "--json"), models, packages=(), needs="trtexec"))
    return steps


def _check(config: Deployment, files: Files, recipe: str | None) -> list[Step]:
    check = config.check
    if check is None:
        return []
    # Against float32: the tolerances are those of the precision, and the CPU runs it whatever ships.
    words = ["check-engine", files.engine, files.pruned, *_options(check, "data", "samples", "batch", "tolerance")]
    words += [*(_preprocess(recipe) if check.data is not None else []), "--json"]
    inputs = _some((files.engine, files.pruned, check.data, recipe if check.data is not None else None))
    return [Step("check", tuple(words), inputs, packages=_TENSORRT, needs="gpu")]
