"""`--ray`, of every command whose work can be divided among processes and machines."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from toast_onnx_calibration.executing import Executor

workers_option = click.option(
    "--ray",
    metavar="auto|local|ADDRESS",
    help="Divide the work among Ray's workers: of the cluster here, of one started now, or of one elsewhere. A worker "
    "uses --threads, 1 by default. Needs the extra `ray`.",
)


#: Of `costs`: two models that are timed on one machine at the same time disturb each other.
machines_option = click.option(
    "--ray",
    metavar="auto|ADDRESS",
    help="Divide the variants among the machines of a Ray cluster, which have to be of one kind; one machine times one "
    "model after another, with --ray or without. Needs the extra `ray`.",
)


@contextmanager
def open_executor(address: str | None) -> Iterator[Executor]:
    """Who does the work: this process, or Ray's workers.

    Args:
        address: what `--ray` says.

    Raises:
        BackendError: Ray is not installed, or there is none at that address.
    """
    if address is None:
        from toast_onnx_calibration.executing import Here

        yield Here()
        return
    from toast_onnx_calibration.ray_workers import ray_executor

    with ray_executor(address) as executor:
        yield executor
