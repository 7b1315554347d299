"""The one place for reading what a user names, and for writing files whole or not at all.

A pipe blocks, a device never ends; both pass for files until they are read: only regular files are opened, and read
only where their size is what it should be.

What is written is a draft first, in a hidden folder beside its target that is locked while its process lives; the next
write of the same target removes those of dead processes. Files that belong together (a graph, its weights, its report)
are exchanged together: one renaming of the folder decides, and what is left of the exchange when a process is killed is
done by the next write. At every moment one whole set exists, the graph that bears the name finds its own weights, and a
report that bears the name is that graph's.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import shutil
import stat
import sys
import tempfile
from collections.abc import Iterable, Iterator
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from toast_onnx.errors import ModelError, ToastError

if sys.platform != "win32":  # there drafts of dead processes stay until they are deleted by hand
    import fcntl

#: Folder inside a folder of drafts for the file that belongs beside the target.
_BESIDE = "beside"
#: Ending of a graph that reads its weights under the name that only an exchange uses.
_THROUGH = ".through"


#: Files that were read since `remember_files`, and their state then; None where nobody asks.
_seen: ContextVar[dict[Path, os.stat_result] | None] = ContextVar("seen", default=None)


def remember_files() -> None:
    """Begin a new list of the files that are read, for `files_read`."""
    _seen.set({})


def files_read() -> list[dict[str, Any]]:
    """Name, SHA-256 and size in bytes of each file that was read since `remember_files` and is still there.

    Models are not among them, nor images, which the hash of their folder stands for. A file that was written again in
    between has `null` for its hash.
    """
    found = []
    for path, before in (_seen.get() or {}).items():
        with contextlib.suppress(OSError):  # a working file that is gone
            now = path.stat()
            same = (now.st_mtime_ns, now.st_size, now.st_ino) == (before.st_mtime_ns, before.st_size, before.st_ino)
            found.append({"file": path.name, "sha256": sha256_of([path]) if same else None, "bytes": before.st_size})
    return found


def sha256_of(files: Iterable[Path]) -> str:
    """SHA-256 of what stands in files, one after the other."""
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as stream:
            while chunk := stream.read(1 << 22):
                digest.update(chunk)
    return digest.hexdigest()


def check_text(name: str | os.PathLike[str], error: type[ToastError]) -> None:
    """Make sure that a name is text: runtimes take no other, and JSON cannot hold it.

    Raises:
        ToastError: of the given kind: it holds bytes that are no UTF-8.
    """
    try:
        os.fspath(name).encode()
    except UnicodeEncodeError as e:
        shown = os.fsencode(name).decode(errors="backslashreplace")
        raise error(f"the name {shown} is not text in UTF-8; choose another name") from e


def regular_file(
    path: str | os.PathLike[str], error: type[ToastError], hint: str, *, remember: bool = True
) -> os.stat_result:
    """State of a regular file; links are followed.

    Args:
        path: the file.
        error: what to raise.
        hint: what to do next, the end of the message.
        remember: whether it is one of those that `files_read` tells.

    Raises:
        ToastError: of the given kind, where it is missing, no regular file or has no possible name.
    """
    try:
        found = Path(path).stat()
    except FileNotFoundError as e:
        raise error(f"{path} does not exist; {hint}") from e
    except (OSError, ValueError) as e:  # a name with a null byte is a ValueError
        raise error(f"{path} cannot be read: {getattr(e, 'strerror', None) or e}; {hint}") from e
    if not stat.S_ISREG(found.st_mode):
        kind = "a folder" if stat.S_ISDIR(found.st_mode) else "a pipe, a device or a socket"
        raise error(f"{path} is {kind}, not a regular file; {hint}")
    seen = _seen.get()
    if remember and seen is not None:
        seen.setdefault(Path(os.path.abspath(path)), found)
    return found


def read_limited(path: str | os.PathLike[str], limit: int, error: type[ToastError], hint: str) -> bytes:
    """Bytes of a regular file of at most `limit` bytes.

    Args:
        path: the file.
        limit: largest size that is read.
        error: what to raise.
        hint: what to do next, the end of the message.

    Raises:
        ToastError: of the given kind, where it is no regular file, too large or cannot be read.
    """
    regular_file(path, error, hint)
    try:
        with Path(path).open("rb") as stream:
            data = stream.read(limit + 1)
    except OSError as e:
        raise error(f"{path} cannot be read: {e.strerror or e}; {hint}") from e
    if len(data) > limit:
        raise error(f"{path} is larger than {limit >> 10} KiB, more than such a file can need; {hint}")
    return data


@contextlib.contextmanager
def drafts(path: Path, error: type[ToastError] = ModelError) -> Iterator[Path]:
    """Give a private folder beside `path` to write drafts of outputs in; it is removed at the end.

    Args:
        path: what will be written.
        error: what to raise.

    Raises:
        ToastError: of the given kind: writing there failed (no permission, full disk), or `path` is no regular file.
    """
    check_text(path, error)
    with contextlib.ExitStack() as stack:
        try:
            if path.exists() and not path.is_file():
                raise error(f"{path} is not a regular file and cannot be replaced by one; choose another name")
            folder = stack.enter_context(_private_folder(path))
            yield folder
        except OSError as e:
            if e.errno == errno.ENOSPC:
                raise error(f"{path} was not written: the disk is full; free space or choose another place") from e
            raise error(f"{path} cannot be written: {e.strerror or e}; choose another place") from e


def check_place(path: Path) -> None:
    """Make sure that drafts for a file can be written where it goes.

    Raises:
        ModelError: they cannot.
    """
    with drafts(path):
        pass


def place(draft: Path, path: Path) -> None:
    """Give a finished draft its name."""
    with draft.open("rb") as stream:
        os.fsync(stream.fileno())
    os.replace(draft, path)


def write_bytes(path: Path, data: bytes, error: type[ToastError] = ModelError) -> None:
    """Write a file whole or not at all.

    Args:
        path: the file.
        data: its content.
        error: what to raise.

    Raises:
        ToastError: of the given kind: it cannot be written.
    """
    with drafts(path, error) as folder:
        write_synced(folder / path.name, data)
        os.replace(folder / path.name, path)


def write_synced(path: Path, data: bytes) -> None:
    """Write a draft, down to the disk."""
    with path.open("wb") as stream:
        stream.write(data)
        stream.flush()
        os.fsync(stream.fileno())


def write_beside(folder: Path, beside: Path, data: bytes) -> None:
    """Write the draft of the file that belongs to the one whose drafts lie in `folder`, for `exchange`."""
    (folder / _BESIDE).mkdir()
    write_synced(folder / _BESIDE / beside.name, data)


def through_name(folder: Path) -> tuple[str, Path]:
    """Name of the weights while they are exchanged, and where the graph that reads them under that name is drafted."""
    name = f"{folder.name}.data"
    return name, folder / f"{name}{_THROUGH}"


def exchange(folder: Path, path: Path, beside: Path | None = None) -> None:
    """Put drafts in the place of what is there, all of them or none.

    Args:
        folder: from `drafts(path)`, with a file of the same name as `path`; where its weights lie outside also
            `<name>.data`, and a graph at `through_name(folder)`; and what `write_beside` wrote.
        path: the target.
        beside: where the file beside it goes.

    Raises:
        OSError: something cannot be put in its place; the next exchange of the same target tries again.
    """
    if beside is None and not (folder / f"{path.name}.data").exists():
        os.replace(folder / path.name, path)
        return
    decided = _decided(path)
    with contextlib.ExitStack() as stack:
        ready = None
        if beside is not None and beside.parent.stat().st_dev != path.parent.stat().st_dev:
            ready = stack.enter_context(drafts(beside)) / beside.name  # there must be room for it before it is decided
            write_synced(ready, (folder / _BESIDE / beside.name).read_bytes())
        while True:
            try:
                os.rename(folder, decided)
            except OSError as e:
                if e.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                    raise
                settle(path, beside)
            else:
                break
        _install(decided, path, beside, ready)


def settle(path: Path, beside: Path | None = None) -> None:
    """Finish an exchange of `path` whose process was killed after it was decided; nothing where there is none.

    Args:
        path: the target.
        beside: where a file beside it goes, if it has that name; another goes into the target's folder.

    Raises:
        OSError: something cannot be put in its place.
    """
    decided = _decided(path)
    if decided.is_symlink() or not decided.is_dir():
        return
    try:
        lock = _lock(decided, wait=True)
    except FileNotFoundError:
        return  # another process finished it
    try:
        if decided.is_dir():
            _install(decided, path, beside)
    finally:
        if lock is not None:
            os.close(lock)


def _install(decided: Path, path: Path, beside: Path | None, ready: Path | None = None) -> None:
    """The steps of an exchange, each of which may be the last; what was done is not done again.

    Args:
        decided: the folder of drafts.
        path: the target.
        beside: where the file beside it goes.
        ready: its draft on the file system where it goes, where that is another one.
    """
    data, weights, graph = path.with_name(f"{path.name}.data"), decided / f"{path.name}.data", decided / path.name
    companion = next(iter((decided / _BESIDE).glob("*")), None)
    if companion is not None:
        if beside is None or beside.name != companion.name:
            beside = path.with_name(companion.name)
        beside.unlink(missing_ok=True)  # first, so that it never stands beside another model
    through = next(iter(decided.glob(f"*{_THROUGH}")), None)
    if through is not None and weights.exists() and data.exists():
        # The old graph reads the old weights under this name: the new graph comes first, with another name for them.
        _second_name(weights, path.with_name(through.stem))
        os.replace(through, path)
    if weights.exists():
        os.replace(weights, data)
    if graph.exists():
        os.replace(graph, path)
    for name in path.parent.glob(_working(path, "????????.data")):
        name.unlink(missing_ok=True)
    if companion is not None and beside is not None:
        try:
            os.replace(ready or companion, beside)
        except OSError as e:
            if e.errno != errno.EXDEV:
                raise
            write_bytes(beside, companion.read_bytes())  # it goes to another file system
    shutil.rmtree(decided)


def _second_name(file: Path, name: Path) -> None:
    """Let a file stand under a second name: a copy, because `onnx.load` refuses weights with several hard links."""
    if not name.exists():  # where the exchange was broken off behind this step, it does
        copy = file.with_name("copy")
        shutil.copyfile(file, copy)
        os.replace(copy, name)


def _working(path: Path, ending: str) -> str:
    """Name of a working file or folder for a target: short whatever the target's name, and the same for all runs."""
    return f".toast-{hashlib.sha256(os.fsencode(path.name)).hexdigest()[:12]}-{ending}"


def _decided(path: Path) -> Path:
    return path.with_name(_working(path, "decided"))


@contextlib.contextmanager
def _private_folder(path: Path) -> Iterator[Path]:
    """A locked folder for drafts; those of processes that were killed go."""
    for left in path.parent.glob(_working(path, "?" * 8)):
        if left.is_dir() and not left.is_symlink():
            with contextlib.suppress(OSError):  # gone, or of a process that lives
                lock = _lock(left, wait=False)
                if lock is not None:
                    shutil.rmtree(left, ignore_errors=True)
                    os.close(lock)
    folder, lock = _locked_folder(path)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        if lock is not None:
            os.close(lock)


def _locked_folder(path: Path) -> tuple[Path, int | None]:
    while True:
        folder = Path(tempfile.mkdtemp(prefix=_working(path, ""), dir=path.parent))
        try:
            lock = _lock(folder, wait=True)
        except FileNotFoundError:
            continue  # another process took it for a dead one's before it was locked
        if folder.exists():
            return folder, lock
        if lock is not None:
            os.close(lock)


def _lock(folder: Path, *, wait: bool) -> int | None:
    """A handle that holds a folder's lock until it is closed, with the process at the latest; None without locks here.

    Raises:
        FileNotFoundError: the folder is gone.
        BlockingIOError: another process has it, and this one does not wait.
    """
    if sys.platform == "win32":
        return None
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        os.close(handle)
        raise
    except OSError:  # some network file systems have none
        os.close(handle)
        return None
    return handle
