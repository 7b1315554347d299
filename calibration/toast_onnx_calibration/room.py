"""Room on the disk for working files, counted before the work begins."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Collection, Sequence
from math import prod
from pathlib import Path

import onnx.helper

from toast_onnx.errors import ConfigError
from toast_onnx.matching.span import masks_beside, span_of
from toast_onnx.matching.study import Study
from toast_onnx.model import stored_bytes
from toast_onnx_calibration.chain import Link
from toast_onnx_calibration.sources import count_samples

#: Bytes of files that only save time: they may lie in memory, where that is what temporary files are.
SPARE = 1 << 30


def drawn(data: str | Path, samples: int | None) -> int | None:
    """How many samples will be read of data where so many are asked for, None for all; None where nobody knows."""
    count = count_samples(data)
    return samples if count is None else min(count, samples or count)


def check_room(needed: int) -> None:
    """Make sure that working files fit on the disk.

    Args:
        needed: bytes.

    Raises:
        ConfigError: they do not.
    """
    place = tempfile.gettempdir()
    free = shutil.disk_usage(place).free
    if needed > free:
        raise ConfigError(
            f"working files need {needed / 1e9:.1f} GB in {place}, where {free / 1e9:.1f} GB are free: free space, set "
            "TMPDIR to another folder, or take fewer --samples"
        )


def spare(needed: int, folder: Path) -> bool:
    """Whether files that only save time may lie in a folder: they are small, and most of what is free stays so."""
    return needed <= min(SPARE, shutil.disk_usage(folder).free // 4)


def refining_bytes(study: Study, blocks: Collection[int], samples: int) -> int:
    """Bytes of the working files of the correction of blocks: samples, and activations of two models, old and new.

    Args:
        study: the model.
        blocks: that are corrected.
        samples: that are run.
    """
    spans = (span_of(study.view, study.counted, study.match.blocks[index]) for index in blocks)
    stream = max((sample_bytes(study, {span.start, span.end}) for span in spans if span is not None), default=0)
    return samples * (_input_bytes(study) + 2 * stream + _mask_bytes(study)) + 3 * stored_bytes(study.view.model.path)


def spool_bytes(study: Study, links: Sequence[Link], samples: int) -> int:
    """Bytes of the activations that the passes of a calibration leave for one another, at their most.

    Args:
        study: the model.
        links: the passes.
        samples: that are measured.
    """
    return samples * max((sample_bytes(study, {*link.takes, *link.leaves}) for link in links), default=0)


def trial_bytes(study: Study, samples: int, fronts: Collection[str], output: str) -> int:
    """Bytes of the working files of trials: samples, activations in front of a block, answers, graphs.

    Args:
        study: the model.
        samples: that are run.
        fronts: activations in front of each block; two of them are on the disk at a time.
        output: where damage is measured.
    """
    front = max((sample_bytes(study, {name}) for name in fronts), default=0)
    each = _input_bytes(study) + 2 * front + sample_bytes(study, {output}) + _mask_bytes(study)
    return samples * each + 3 * stored_bytes(study.view.model.path)


def _input_bytes(study: Study) -> int:
    graph = study.view.model.proto.graph
    return sample_bytes(study, {i.name for i in graph.input} - set(study.view.initializers))


def _mask_bytes(study: Study) -> int:
    return sample_bytes(study, set(masks_beside(study.view, study.counted, study.match.blocks).values()))


def sample_bytes(study: Study, tensors: Collection[str]) -> int:
    """Bytes of some tensors for one sample; those of unknown shape count nothing."""
    found = 0
    for name in tensors:
        shape = study.counted.shape(name)
        if shape is not None:
            kind = study.counted.elem_type(name) or onnx.TensorProto.FLOAT
            found += prod(shape) * onnx.helper.tensor_dtype_to_np_dtype(kind).itemsize
    batch = max((study.counted_shapes[n][0] for n in study.counted_shapes if study.counted_shapes[n]), default=1)
    return found // max(batch, 1)
