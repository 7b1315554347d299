"""Workers of Ray (extra `ray`): each opens a job once and does tasks of it; Ray does a lost worker's task again."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from toast_onnx import __version__
from toast_onnx.errors import BackendError, ModelError, one_line
from toast_onnx.files import sha256_of
from toast_onnx.model import scratch_folder
from toast_onnx.providers import known_provider
from toast_onnx_calibration.executing import Alone, Job, Order, Pool, Report, Rules

#: How often a task whose worker was lost is done again, before it is given up.
RETRIES = 3
#: Seconds between two looks at how far the workers are.
INTERVAL = 0.5


@contextmanager
def ray_executor(address: str) -> Iterator[RayExecutor]:
    """Workers of a Ray cluster.

    Args:
        address: `local` starts Ray here and stops it at the end, `auto` takes the one that runs here, and anything else
            is the address of one. Inside another such context it is that one's.

    Raises:
        BackendError: Ray is not installed, or there is none at that address.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
    except ImportError as error:
        raise BackendError("--ray needs Ray: pip install 'toast-onnx[ray]'") from error
    if ray.is_initialized():
        yield RayExecutor(ray)
        return
    quiet = {"log_to_driver": False, "logging_level": "ERROR"}
    try:
        if address == "local":
            ray.init(address="local", include_dashboard=False, **quiet)
        else:
            ray.init(address=address, **quiet)
    except Exception as error:  # of many kinds
        raise BackendError(
            f"Ray cannot be reached at '{address}': {one_line(error)}; `--ray local` starts one here"
        ) from error
    try:
        yield RayExecutor(ray)
    finally:
        ray.shutdown()


class RayExecutor:
    """Opens pools of Ray's workers."""

    def __init__(self, ray: Any) -> None:
        self._ray = ray

    @contextmanager
    def open(self, job: Job) -> Iterator[Pool]:
        """Workers for a job: as many as the CPUs hold, one a GPU where something runs on one, or one a machine.

        Raises:
            BackendError: the cluster has no such GPU.
        """
        ray, order = self._ray, job.order()
        have = ray.cluster_resources()
        provider = known_provider(order.provider).nvidia
        on_gpu = provider or order.solver != "cpu"
        machines = [n["Resources"] for n in ray.nodes() if n["Alive"] and n["Resources"].get("CPU", 0) >= 1]
        cpus = order.threads or int(min((machine["CPU"] for machine in machines), default=1))
        if order.threads == 0:
            workers = sum(machine.get("GPU", 0) >= on_gpu for machine in machines)
        else:
            workers = int(have.get("GPU", 0)) if on_gpu else int(have.get("CPU", 0)) // cpus
        if workers < 1:
            whom = f"--provider {order.provider}" if provider else f"--solve-on {order.solver}"
            wanted = f"a GPU for {whom}" if on_gpu else f"{cpus} CPUs in one place"
            raise BackendError(f"the Ray cluster has not {wanted}; leave --ray out, or add a machine to it")
        if workers == 1 and len(ray.nodes()) == 1:
            yield Alone(job)
            return
        sent = [ray.put(order)], _send(ray, order)
        resources = {"num_cpus": cpus, "num_gpus": 1 if on_gpu else 0, "scheduling_strategy": "SPREAD"}
        kind = ray.remote(max_restarts=-1, max_task_retries=RETRIES, **resources)(_Worker)
        tally = ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1)(_Tally).remote()
        actors = [kind.remote(Rules.present(), tally) for _ in range(workers)]
        try:
            yield _RayPool(ray, actors, tally, sent)
        finally:
            for actor in (*actors, tally):
                ray.kill(actor)


class _RayPool:
    """Actors that do the tasks of one job."""

    def __init__(self, ray: Any, actors: Sequence[Any], tally: Any, sent: tuple[Any, ...]) -> None:
        self._ray, self._actors, self._tally, self._sent = ray, actors, tally, sent
        self._rounds = 0

    @property
    def workers(self) -> int:
        """How many actors there are."""
        return len(self._actors)

    def do(self, tasks: Sequence[Any], report: Report | None = None) -> Iterator[tuple[int, Any]]:
        """Number and result of every task, as they come."""
        from ray.exceptions import RayActorError, RayTaskError
        from ray.util import ActorPool

        pool, self._rounds = ActorPool(self._actors), self._rounds + 1
        for number, task in enumerate(tasks):
            pool.submit(lambda actor, value: actor.do.remote(*value), (self._sent, self._rounds, number, task))
        while pool.has_next():
            try:
                yield pool.get_next_unordered(timeout=INTERVAL)
            except TimeoutError:
                pass
            except RayTaskError as error:
                raise error.cause from None
            except RayActorError as error:
                raise BackendError(
                    f"a piece of work lost its worker {RETRIES + 1} times, for want of memory perhaps: give workers "
                    "more of it, or --threads, which makes them fewer"
                ) from error
            if report is not None:
                report(self._ray.get(self._tally.total.remote(self._rounds)))


class _Tally:
    """How far the workers are; what a lost worker had done of a task does not count twice."""

    def __init__(self) -> None:
        self._done: dict[int, dict[int, int]] = {}

    def tell(self, number: int, task: int, done: int) -> None:
        self._done.setdefault(number, {})[task] = done

    def total(self, number: int) -> int:
        return sum(self._done.get(number, {}).values())


class _Worker:
    """One process that opens a job with its first task and keeps it open."""

    def __init__(self, rules: Rules, tally: Any) -> None:
        self._rules, self._tally = rules, tally
        self._stack = ExitStack()
        self._job: Job | None = None

    def do(self, sent: tuple[Any, ...], number: int, at: int, task: Any) -> tuple[int, Any]:
        """Number and result of a task; what was sent with it opens the job the first time."""
        if self._job is None:
            if self._rules.version != __version__:
                raise BackendError(
                    f"a worker has toast-onnx {__version__}, but {self._rules.version} sends it work; install the same"
                )
            self._rules.keep()
            folder = self._stack.enter_context(scratch_folder("toast-worker-"))
            import ray

            (reference,), files = sent
            order: Order = ray.get(reference)
            self._job = self._stack.enter_context(order.open(_place(files, order, folder, ray.get), folder))
        return at, self._job.do(task, _reporter(lambda done: self._tally.tell.remote(number, at, done)))


def _reporter(tell: Callable[[int], Any]) -> Report:
    """Tells how much is done, not too often, and always what was told last."""
    last = float("-inf")

    def report(done: int) -> None:
        nonlocal last
        if time.monotonic() - last >= INTERVAL:
            last = time.monotonic()
            tell(done)

    return report


def _send(ray: Any, order: Order) -> dict[Path, Any]:
    """File -> its hash and, where there are other machines, its bytes in the object store."""
    alone = len(ray.nodes()) == 1
    files = [file for group in order.files for file in group]
    return {f: (sha256_of([f]), None if alone else ray.put(f.read_bytes())) for f in files}


def _place(
    files: Mapping[Path, tuple[str, Any]], order: Order, folder: Path, get: Callable[[Any], bytes]
) -> Callable[[Path], Path]:
    """Where files lie here: in their own place, a shared folder perhaps, else in copies of what was sent.

    Raises:
        ModelError: they are not here, and were not sent.
    """
    found: dict[Path, Path] = {}
    for number, group in enumerate(order.files):
        if all(file.is_file() and sha256_of([file]) == files[file][0] for file in group):
            found[group[0]] = group[0]
            continue
        for file in group:
            copy = folder / f"sent-{number}" / file.relative_to(group[0].parent)
            copy.parent.mkdir(parents=True, exist_ok=True)
            if files[file][1] is None:
                raise ModelError(f"{file} changed while it was worked with; start again")
            copy.write_bytes(get(files[file][1]))
        found[group[0]] = folder / f"sent-{number}" / group[0].name
    return lambda path: found[path]
