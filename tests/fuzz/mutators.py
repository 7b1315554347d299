"""What is done to a good file to make a bad one: its bytes, or the values of what it says."""

from __future__ import annotations

import copy
import io
import json
import random
import zipfile
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
from google.protobuf.message import Message

Mutator = Callable[[bytes, random.Random], bytes]

_VALUES: list[Any] = [
    *(None, True, False, 0, -1, 1, 2**31, 2**63, 10**30, 0.5, -0.5, 1e300, 1e-320, "", "x", "é" * 400, "a:b", "1e9"),
    *([], {}, [None] * 3, [0, 0], [[]], {"x": 1}, "2026-01-01", "../x", "/dev/zero", "\0"),
]
_TEXT = [b"NaN", b"Infinity", b"9" * 5000, b"[" * 3000, b"{", b"}", b'"', b"\xff", b"\0", b"\t", b": ", b"- ", b"&a *a"]


def flip(data: bytes, rng: random.Random) -> bytes:
    """Some bytes become others."""
    out = bytearray(data)
    for _ in range(rng.choice([1, 1, 2, 8])):
        if out:
            out[rng.randrange(len(out))] = rng.randrange(256)
    return bytes(out)


def cut(data: bytes, rng: random.Random) -> bytes:
    """The end, or a part of the middle, is missing."""
    a, b = sorted(rng.randrange(len(data) + 1) for _ in range(2))
    return data[:a] if rng.random() < 0.5 else data[:a] + data[b:]


def insert(data: bytes, rng: random.Random) -> bytes:
    """Something stands there that does not belong there."""
    at = rng.randrange(len(data) + 1)
    return data[:at] + rng.choice(_TEXT) + data[at:]


def document(data: bytes, rng: random.Random) -> bytes:
    """A value of a JSON document (which is YAML, too) becomes another one, at any depth."""
    whole = json.loads(data)
    for _ in range(rng.choice([1, 1, 2])):
        places = list(_places(whole))
        holder, key = rng.choice(places)
        holder[key] = copy.deepcopy(rng.choice(_VALUES))
    return json.dumps(whole).encode()


def _places(value: Any) -> list[tuple[Any, Any]]:
    keys = list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else []
    return [place for key in keys for place in [(value, key), *_places(value[key])]]


def graph(data: bytes, rng: random.Random) -> bytes:
    """A field of an ONNX graph is emptied, doubled or given another value."""
    proto = onnx.load_from_string(data)
    for _ in range(rng.choice([1, 1, 1, 3])):
        _disturb(proto, rng)
    return proto.SerializeToString()


def references(data: bytes, rng: random.Random) -> bytes:
    """Where a weight lies outside, its location, offset or length says something else."""
    proto = onnx.load_from_string(data)
    entries = [entry for tensor in proto.graph.initializer for entry in tensor.external_data]
    for entry in rng.sample(entries, rng.choice([1, 1, 2])):
        numbers = ["-1", "0.5", "0x10", "9" * 5000, "", "x", "1e3", "4096", "4095", str(2**63), " 8", "8"]
        places = ["../w.bin", "/dev/zero", "/etc/passwd", "w.bin/", ".", "", "W.BIN", "a" * 300, "w.bin", "x.onnx"]
        entry.value = rng.choice(places if entry.key == "location" else numbers)
        if rng.random() < 0.1:
            entry.key = rng.choice(["location", "offset", "length", "checksum", "x"])
    return proto.SerializeToString()


def _disturb(message: Message, rng: random.Random) -> None:
    fields = message.ListFields()
    if not fields:
        return
    kind, value = rng.choice(fields)
    repeated = not isinstance(value, (Message, str, bytes, int, float))
    inner = [value] if isinstance(value, Message) else list(value) if repeated else []
    if inner and isinstance(inner[0], Message) and rng.random() < 0.85:
        _disturb(rng.choice(inner), rng)
    elif repeated and rng.random() < 0.5:
        at = rng.randrange(len(inner))
        if isinstance(inner[0], Message):
            value.append(inner[at]) if rng.random() < 0.3 else value.pop(at)
        elif isinstance(inner[0], str):
            value[at] = rng.choice(["", "x", inner[0], inner[-1] + "x"])
        elif isinstance(inner[0], int):
            value[at] = rng.choice([0, 1, -1, 7, inner[at] + 1, 2**31 - 1])
    elif isinstance(value, str):
        setattr(
            message, kind.name, rng.choice(["", "x", value[::-1], value + "x", "Softmax", "Identity", "com.microsoft"])
        )
    elif isinstance(value, int):
        setattr(message, kind.name, rng.choice([0, 1, value + 1, 9, 16]))
    elif isinstance(value, bytes) and len(value) > 8:
        setattr(message, kind.name, rng.choice([value[:-4], value[:4], flip(value, rng)]))
    else:
        message.ClearField(kind.name)


def arrays(data: bytes, rng: random.Random) -> bytes:
    """An array of a .npz file gets other values, another shape or type."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    name = rng.choice(sorted(members))
    if name.endswith(".json"):
        members[name] = document(members[name], rng)
    else:
        stream = io.BytesIO()
        np.save(stream, _other(np.load(io.BytesIO(members[name])), rng), allow_pickle=False)
        members[name] = rng.choice([stream.getvalue(), stream.getvalue(), flip(members[name], rng)])
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for member, content in members.items():
            archive.writestr(member, content)
    return out.getvalue()


def _other(a: np.ndarray, rng: random.Random) -> np.ndarray:
    choices: list[Callable[[], np.ndarray]] = [
        lambda: a * 0,
        lambda: -a,
        lambda: a.reshape(-1),
        lambda: a[..., :-1] if a.ndim else a.reshape(1),
        lambda: a.astype(rng.choice(["f2", "i8", "c16", ">f8", "U3"])),
        lambda: np.full_like(a, rng.choice([np.nan, np.inf, 1e30])) if a.dtype.kind == "f" else a[:0],
        lambda: np.zeros((0, *a.shape), a.dtype),
    ]
    return rng.choice(choices)()


BYTES: tuple[Mutator, ...] = (flip, cut, insert)
