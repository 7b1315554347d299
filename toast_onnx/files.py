"""What a user names is opened only where it is a regular file, and read only where its size is what it should be.

A pipe blocks, a device never ends; both pass for files until they are read.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path

from toast_onnx.errors import ToastError


def regular_file(path: str | os.PathLike[str], error: type[ToastError], hint: str) -> os.stat_result:
    """State of a regular file; links are followed.

    Args:
        path: the file.
        error: what to raise.
        hint: what to do next, the end of the message.

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
