"""Hypothesis strategies: damaged files of a kind, and documents of any form at all."""

from __future__ import annotations

import json
from typing import Any

from hypothesis import strategies as st

from tests.fuzz.targets import Target

_LEAVES = st.one_of(
    *(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=20)),
    st.sampled_from([10**400, "../x", "/dev/zero", "auto", "all", "2026-01-01", "1e9", "module:function"]),
)


def damaged_files(target: Target) -> st.SearchStrategy[bytes]:
    """The good file of a kind, damaged in one of the ways that its kind allows."""
    return st.builds(
        lambda damage, random: damage(target.good, random),
        st.sampled_from(target.damage),
        st.randoms(note_method_calls=False),
    )


def documents(target: Target) -> st.SearchStrategy[bytes]:
    """JSON, which is YAML, too: any values under the keys that a kind's good file has, and under others."""
    names = st.sampled_from(sorted(_keys(json.loads(target.good)))) | st.text(max_size=5)
    anything = st.recursive(
        _LEAVES, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(names, inner, max_size=4), max_leaves=12
    )
    return st.dictionaries(names, anything, max_size=6).map(lambda document: json.dumps(document).encode())


def _keys(value: Any) -> set[str]:
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return set(value if isinstance(value, dict) else ()).union(*map(_keys, inner))
