"""trtexec: finding it, asking what it is, and writing the exact command for its version.

trtexec 11 turned three defaults round: CUDA graphs and spin waiting are on, and data transfers are left out, unless
--noCudaGraph, --noSpinWait or --includeDataTransfers say otherwise. trtexec 10 has the opposite defaults and flags. A
command written here always states the behaviour wanted, so both versions measure the same thing.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from toast_onnx.engines.profiles import Shape, ShapeRange
from toast_onnx.errors import BackendError, ConfigError

#: Where NVIDIA's packages and containers put it when it is not on PATH.
_USUAL_PLACES = ("/usr/src/tensorrt/bin/trtexec", "/opt/tensorrt/bin/trtexec")
#: The program that runs a backend's engines; each loads only its own.
PROGRAMS = {"tensorrt": "trtexec", "tensorrt-rtx": "tensorrt_rtx"}
PERCENTILES = (50, 90, 95, 99)


@dataclass(frozen=True)
class Trtexec:
    """One trtexec, or TensorRT-RTX's `tensorrt_rtx`.

    Attributes:
        path: the program, as it is to be started.
        version: such as (10, 16, 1); empty where its banner could not be read.
        flags: the options its help lists.
    """

    path: str
    version: tuple[int, ...] = ()
    flags: frozenset[str] = frozenset()

    @property
    def is_new(self) -> bool:
        """Whether it has the defaults of trtexec 11. `tensorrt_rtx` counts versions from 1, so its flags decide."""
        if self.version and self.version[0] >= 10:
            return self.version[0] >= 11
        return "--noCudaGraph" in self.flags

    def describe(self) -> str:
        """Name and version, for people."""
        return f"{Path(self.path).name} {'.'.join(map(str, self.version)) or '(version unknown)'}"


@dataclass(frozen=True)
class BenchSettings:
    """How trtexec measures.

    Attributes:
        warm_up_ms: milliseconds before measuring starts.
        duration: seconds to measure for, at least.
        cuda_graph: launch the network as one CUDA graph.
        transfers: copy inputs and outputs between host and device in every query.
        spin_wait: poll for the end of a query instead of sleeping.
        times: file for the time of every query.
        profile: file for the time of every layer; measured in a run of its own.
        layers: file for what each layer is made of.
    """

    warm_up_ms: int = 200
    duration: float = 3.0
    cuda_graph: bool = True
    transfers: bool = False
    spin_wait: bool = True
    times: Path | None = None
    profile: Path | None = None
    layers: Path | None = None


def find_trtexec(backend: str = "tensorrt", given: str | None = None) -> str | None:
    """Path of the program that runs a backend's engines, or None.

    It is the one given, else TRTEXEC in the environment, else the backend's program on PATH, else trtexec in the places
    where NVIDIA's packages put it.

    Raises:
        BackendError: the one given, or TRTEXEC, is not a program.
    """
    wanted = given or os.environ.get("TRTEXEC")
    if wanted:
        found = shutil.which(wanted)
        if found is None:
            raise BackendError(f"{wanted} is not a program; give the path of trtexec with --trtexec")
        return found
    candidates = (PROGRAMS[backend], *(_USUAL_PLACES if backend == "tensorrt" else ()))
    return next((path for candidate in candidates if (path := shutil.which(candidate)) is not None), None)


def ask(path: str, timeout: float = 60.0) -> Trtexec:
    """Start a trtexec with --help and read its version and its flags.

    Raises:
        BackendError: it cannot be started, or it is older than 10.
    """
    try:
        answer = subprocess.run([path, "--help"], capture_output=True, text=True, timeout=timeout, check=False)
    except (OSError, subprocess.TimeoutExpired) as e:
        raise BackendError(f"{path} cannot be asked for its version: {e}; give another one with --trtexec") from e
    text = answer.stdout + answer.stderr
    flags = frozenset(re.findall(r"--[A-Za-z]\w*", text))
    version = parse_version(text)
    if not version and not flags:
        raise BackendError(f"{path} does not answer --help as trtexec does; give another one with --trtexec")
    if 2 <= (version or (0,))[0] < 10:
        raise BackendError(f"{path} is TensorRT {'.'.join(map(str, version))}; bench knows trtexec 10 and 11")
    return Trtexec(path, version, flags)


def parse_version(text: str) -> tuple[int, ...]:
    """The version in trtexec's banner, `&&&& RUNNING TensorRT.trtexec [TensorRT v101601] ...`; empty without one.

    The number is major * 10000 + minor * 100 + patch; before TensorRT 10 it was major * 1000 + minor * 100 + patch.
    """
    banner = re.search(r"\[TensorRT[\w .-]*? v(\d+)\]", text)
    if banner is None:
        return ()
    number = int(banner.group(1))
    unit = 1000 if 5000 <= number < 10000 else 10000
    return number // unit, number % unit // 100, number % 100


def assumed(version: str, backend: str = "tensorrt") -> Trtexec:
    """The backend's program on another machine, taken to be of a given version.

    Raises:
        ConfigError: the version does not start with 10 or 11.
    """
    major = version.partition(".")[0]
    if major not in ("10", "11"):
        raise ConfigError(f"trtexec version '{version}' is unknown; use 10 or 11")
    return Trtexec(PROGRAMS[backend], tuple(int(p) for p in version.split(".") if p.isdecimal()))


def command(
    program: Trtexec,
    model: Path,
    shapes: Mapping[str, Shape],
    settings: BenchSettings,
    profile: Mapping[str, ShapeRange] | None = None,
) -> list[str]:
    """The command that measures an engine, or an ONNX file that is built first.

    Args:
        program: whose flags to use.
        model: an engine, or a file that ends in `.onnx`.
        shapes: shape of every dynamic input in this run; empty where all are fixed.
        settings: how to measure.
        profile: shape ranges to build an ONNX file with; `shapes` alone where None.

    Returns:
        Program and arguments.
    """
    is_onnx = model.suffix == ".onnx"
    words = [program.path, f"--onnx={model}" if is_onnx else f"--loadEngine={model}"]
    if shapes:
        if is_onnx:
            ranges = profile or {name: ShapeRange(s, s, s) for name, s in shapes.items()}
            words += [
                f"--{kind}Shapes={spell_shapes({name: getattr(r, kind) for name, r in ranges.items()})}"
                for kind in ("min", "opt", "max")
            ]
        words.append(f"--shapes={spell_shapes(shapes)}")
    if is_onnx and not program.is_new:
        words.append("--stronglyTyped")  # 11 always takes precision from the graph's types, 10 has to be told
    words += [f"--warmUp={settings.warm_up_ms}", f"--duration={settings.duration:g}"]
    words.append(f"--percentile={','.join(map(str, PERCENTILES))}")
    words += _mode_flags(program, settings)
    if settings.times is not None:
        words.append(f"--exportTimes={settings.times}")
    if settings.profile is not None:
        words.append(f"--exportProfile={settings.profile}")
        if not program.is_new:
            words.append("--separateProfileRun")  # 11 always profiles in a run of its own
    if settings.layers is not None:
        words += [f"--exportLayerInfo={settings.layers}", "--profilingVerbosity=detailed"]
    return words


def _mode_flags(program: Trtexec, settings: BenchSettings) -> list[str]:
    """CUDA graph, transfers and waiting, each in the version's own terms."""
    if program.is_new:
        flags = {
            "--noCudaGraph": not settings.cuda_graph,
            "--includeDataTransfers": settings.transfers,
            "--noSpinWait": not settings.spin_wait,
        }
    else:
        flags = {
            "--useCudaGraph": settings.cuda_graph,
            "--noDataTransfers": not settings.transfers,
            "--useSpinWait": settings.spin_wait,
        }
    return [flag for flag, wanted in flags.items() if wanted]


def spell_shapes(shapes: Mapping[str, Shape]) -> str:
    """Shapes as trtexec reads them: `x:1x3x224x224,y:1x10`."""
    return ",".join(f"{name}:{'x'.join(map(str, shape))}" for name, shape in shapes.items())


def script(commands: list[list[str]], heading: str) -> str:
    """A shell script that runs commands one after another and stops at the first failure."""
    lines = ["#!/bin/sh", f"# {heading}", "set -e", *(shlex.join(words) for words in commands)]
    return "\n".join(lines) + "\n"


def run(words: list[str], timeout: float | None = None) -> str:
    """Run trtexec and return all it printed.

    Raises:
        BackendError: it failed; the message carries its last error line.
    """
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=timeout, check=False)
    except (OSError, subprocess.TimeoutExpired) as e:
        raise BackendError(f"{words[0]} did not run: {e}") from e
    text = done.stdout + done.stderr
    if done.returncode != 0:
        errors = [line for line in text.splitlines() if "[E]" in line]
        said = errors[-1].partition("[E]")[2].strip() if errors else f"exit status {done.returncode}"
        raise BackendError(f"{Path(words[0]).name} failed: {said}; its command was: {shlex.join(words)}")
    return text
