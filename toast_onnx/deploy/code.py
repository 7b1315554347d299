"""The Python files behind a `module:function`, so that a step runs again when its code was changed."""

from __future__ import annotations

import re
import sys
from importlib.machinery import PathFinder
from pathlib import Path

_FUNCTION = re.compile(r"([A-Za-z_]\w*)(\.\w+)*:[A-Za-z_][\w.]*")


def code_files(name: str, folder: Path) -> list[Path]:
    """The file of a module, or all `.py` files of the package it belongs to; nothing is imported.

    The commands of a deployment run in its folder, which Python then searches first.

    Args:
        name: `module:function` or `package.module:function`; anything else has no code.
        folder: the deployment file's folder.

    Returns:
        The files in a fixed order; none where there is no such module.
    """
    found = _FUNCTION.fullmatch(name)
    if found is None:
        return []
    spec = PathFinder.find_spec(found[1], [str(folder.resolve()), *filter(None, sys.path)])
    if spec is None:
        return []
    if spec.submodule_search_locations is not None:
        return sorted(p for root in spec.submodule_search_locations for p in Path(root).rglob("*.py") if p.is_file())
    return [Path(spec.origin)] if spec.origin is not None else []
