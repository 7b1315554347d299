"""The keys of a deployment file, their defaults and what may stand there.

A section that is there asks for its step; `check: {}` checks with the defaults. Paths are relative to the file's
folder.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from decimal import Decimal
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, BeforeValidator, Field, ValidationError, model_validator

from toast_onnx import hub
from toast_onnx.errors import ConfigError
from toast_onnx.planning.settings import Section, explain, invalid, names_code
from toast_onnx.planning.strict_yaml import read_document
from toast_onnx.providers import PROVIDERS

Text = Annotated[str, Field(min_length=1)]
#: The sections that ask for steps.
STEPS = ("prune", "quantize", "build", "compare", "eval", "bench", "check")
Count = Annotated[int, Field(ge=1)]


def _number(value: object) -> object:
    """A decimal of the file as a float."""
    return float(value) if isinstance(value, (int, Decimal)) and not isinstance(value, bool) else value


def _several(value: object) -> object:
    """One entry stands for a list of one."""
    return tuple(value) if isinstance(value, (list, tuple)) else (value,)


def _capabilities(value: object) -> object:
    """`8.9` is written as a number as often as it is quoted."""
    entries = value if isinstance(value, list) else [value]
    return tuple(str(entry) if isinstance(entry, (int, Decimal)) else entry for entry in entries)


def _as_text(value: object) -> object:
    """One batch size is a number, a range is text."""
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else value


def _provider(value: str) -> str:
    """One of the providers that every command knows."""
    if value not in PROVIDERS:
        raise invalid(f"is {value!r}. Allowed: {', '.join(PROVIDERS)}")
    return value


Number = Annotated[float, BeforeValidator(_number), Field(gt=0)]


class Plan(Section):
    """Finds ratios for one goal, in place of `prune.ratios`; as the options of `toast-onnx prune` of these names."""

    macs: Number | None = None
    params: Number | None = None
    latency: Number | None = None
    max_drop: Number | None = None
    max_error: Number | None = None
    labels: Text | None = None
    sensitivity: Text | None = None

    @model_validator(mode="after")
    def _one_goal(self) -> Self:
        goals = ("macs", "params", "latency", "max_drop", "max_error")
        if sum(getattr(self, name) is not None for name in goals) != 1:
            raise invalid(f"has not exactly one goal; give one of {', '.join(goals)}")
        return self


class Prune(Section):
    """Removes dimensions and channels.

    Attributes:
        ratios: A ratios file or a preset; not with a `plan` section.
        data: Samples to measure activations on; as in `prune --data`.
        statistics: Measurements that `calibrate` wrote, instead of `data`.
        samples: How many samples to draw.
        views: Views of each in which the model sees other classes; as `prune --views`.
        solve_on: `cuda` works selection and new weights out on a GPU, through PyTorch.
        seed: Of drawn samples and made-up tokens.
        skip_unprunable: Leave parts alone that cannot be pruned.
        target: `tensorrt` keeps every attention at one head size.
    """

    ratios: Text | None = None
    data: Text | None = None
    statistics: Text | None = None
    samples: Count | None = None
    views: Annotated[int, Field(ge=0)] | None = None
    solve_on: Literal["cpu", "cuda"] | None = None
    seed: Annotated[int, Field(ge=0)] | None = None
    skip_unprunable: bool = False
    target: Literal["any", "tensorrt"] | None = None


class Quantize(Section):
    """Puts the linear layers of what was pruned into 8 bits; see `toast-onnx quantize` for the keys."""

    data: Text
    to: Literal["int8", "fp8"] = "int8"
    method: Literal["percentile", "entropy", "minmax"] | None = None
    samples: Count | None = None
    seed: Annotated[int, Field(ge=0)] | None = None
    ends: bool = False


class Build(Section):
    """Builds an engine, or ONNX Runtime's optimized model; see `toast-onnx build` for the options.

    Attributes:
        baseline: Build the dense model too, to compare with.
        triton: Folder of a Triton model repository that gets the engine.
        polygraphy: File of a script that compares the engine with its model by Polygraphy.
    """

    format: Literal["engine", "ort"] = "engine"
    backend: Literal["auto", "tensorrt", "tensorrt-rtx"] = "auto"
    batch: Annotated[Text, BeforeValidator(_as_text)] | None = None
    compute_capability: Annotated[tuple[Text, ...], BeforeValidator(_capabilities)] = ()
    workspace: Text | None = None
    optimization_level: Annotated[int, Field(ge=0, le=5)] | None = None
    timing_cache: Text | None = None
    hardware_compatible: bool = False
    version_compatible: bool = False
    uneven_heads: Literal["auto", "pad", "write-out"] | None = None
    baseline: bool = True
    triton: Text | None = None
    polygraphy: Text | None = None


class Compare(Section):
    """Holds the model that ships against the dense one, in ONNX Runtime: agreement and drift. No GPU is needed."""

    data: Text
    samples: Count | None = None
    seed: Annotated[int, Field(ge=0)] | None = None


class Eval(Section):
    """Measures accuracy of the dense model and of the one that ships, on labelled data, in ONNX Runtime."""

    data: Text
    labels: Text | None = None
    metric: Text | None = None
    samples: Count | None = None
    seed: Annotated[int, Field(ge=0)] | None = None


class Bench(Section):
    """Times the dense model against the pruned one.

    Attributes:
        runtime: `onnxruntime`, `trtexec` (needs a GPU) or a list of both.
        batch: Batch sizes.
        provider: ONNX Runtime's execution provider. On the CPU the float32 models are timed, elsewhere those that ship.
        blocks: Layer times by transformer block (trtexec).
    """

    runtime: Annotated[tuple[Literal["onnxruntime", "trtexec"], ...], BeforeValidator(_several)] = ("onnxruntime",)
    batch: Annotated[tuple[Count, ...], BeforeValidator(_several), Field(min_length=1)] = (1,)
    rounds: Count | None = None
    threads: Count | None = None
    provider: Annotated[str, AfterValidator(_provider)] = "cpu"
    duration: Number | None = None
    blocks: bool = False


class Check(Section):
    """Holds the engine's outputs against ONNX Runtime's (needs a GPU); random inputs where there is no `data`."""

    data: Text | None = None
    samples: Count | None = None
    batch: Count | None = None
    tolerance: Number | None = None


class Deployment(Section):
    """One deployment file.

    Attributes:
        model: The dense ONNX file; of `hf:ORG/NAME[:FILE.onnx]` loading makes the file in the hub's cache.
        output: Folder of everything that is written; by default the file's name without its ending.
        precision: Of what ships; `fp16` and `bf16` add a step that converts the graph.
        preprocess: The recipe of every step that reads images. By default a `preprocessor_config.json` beside the
            model.
    """

    version: Literal[1] = 1
    model: Text = ""
    output: Text | None = None
    precision: Literal["fp32", "tf32", "fp16", "bf16"] = "fp32"
    preprocess: Text | None = None
    plan: Plan | None = None
    prune: Prune | None = None
    quantize: Quantize | None = None
    build: Build | None = None
    compare: Compare | None = None
    eval: Eval | None = None
    bench: Bench | None = None
    check: Check | None = None

    @model_validator(mode="after")
    def _formats_fit(self) -> Self:
        engine = self.build is not None and self.build.format == "engine"
        if self.check is not None and not engine:
            raise invalid("has the key check, which needs an engine; add `build: {}`, or use compare")
        if self.bench is not None and "trtexec" in self.bench.runtime and not engine:
            raise invalid("has bench.runtime: trtexec, which needs an engine; add `build: {}`, or use onnxruntime")
        if self.build is not None and self.build.format == "ort" and self.precision not in ("fp32", "fp16"):
            raise invalid(f"has precision: {self.precision} with build.format: ort, which takes fp32 or fp16")
        if self.build is not None and not engine and (self.build.triton or self.build.polygraphy):
            raise invalid("has triton or polygraphy with format: ort; they go with an engine", suffix="build")
        if self.quantize is not None and self.precision in ("fp16", "bf16"):
            raise invalid(f"has precision: {self.precision} with quantize, which works on float32; leave precision out")
        return self

    @model_validator(mode="after")
    def _says_what_goes(self) -> Self:
        if self.prune is not None and self.prune.data is not None and self.prune.statistics is not None:
            raise invalid("has prune.data and prune.statistics; keep one")
        if self.prune is not None and self.prune.ratios is None and self.plan is None:
            raise invalid("has no ratios; add the key, or a section plan", suffix="prune")
        if self.plan is not None and (self.prune is None or self.prune.ratios is not None or self.prune.data is None):
            raise invalid("goes with a section prune that has data and no ratios", suffix="plan")
        for name in ("model", "output"):
            if (getattr(self, name) or "").startswith("-"):
                raise invalid("starts with -, like an option; write ./ in front of it", suffix=f"{name}")
        if all(getattr(self, name) is None for name in STEPS):
            raise invalid(f"asks for no step; add one of {', '.join(STEPS)}")
        return self


def _code_named(config: Deployment) -> str | None:
    """The first key whose value is Python code, None where there is none."""
    if config.eval is not None and config.eval.metric is not None:  # never anything else
        return "eval.metric"
    for name in ("prune", "quantize", "compare", "eval", "check"):
        data = getattr(getattr(config, name), "data", None)
        if data is not None and names_code(data):
            return f"{name}.data"
    return None


def load_deployment(path: str | os.PathLike[str], *, allow_code: bool = False) -> Deployment:
    """Reads a deployment file; a model that it names on the hub is fetched.

    Args:
        path: The file.
        allow_code: Take `module:function` for data and metrics.

    Raises:
        ConfigError: In one line, the file, the key at fault, its value and what is allowed.
        ToastError: Its other children say why a name on the hub leads to no model.
    """
    source, document = Path(path), read_document(path)
    if not isinstance(document, Mapping):
        raise ConfigError(f"{source} holds no keys; a deployment file starts with `version: 1` and `model: FILE`")
    for key, line in (("version", "version: 1"), ("model", "model: model.onnx")):
        if key not in document:
            raise ConfigError(f"{source} has no {key}; add the line `{line}`")
    try:
        config = Deployment.model_validate(dict(document))
    except ValidationError as e:
        raise ConfigError(f"{source}: {explain(e, document)}") from e
    named = _code_named(config)
    if named is not None and not allow_code:
        raise ConfigError(
            f"{source}: {named} is Python code, which this would run; give --allow-code where you trust the file"
        )
    name = hub.parse(config.model)
    return config if name is None else config.model_copy(update={"model": str(hub.fetch(name))})
