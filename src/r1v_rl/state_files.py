"""Nested Python state in one JSON file and one safetensors file, exactly as it was, without pickle.

Holds what a resume needs: optimizer, schedule, the states of Python's, numpy's and torch's random generators, sampler
position, rollout buffer. A value comes back with its type: tuples as tuples, integer keys as integers,
floats bit by bit.
"""

import base64
import dataclasses
import hashlib
import json
import math
import os
import struct
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from r1v_rl.durable import fault_point, write_file
from r1v_rl.errors import CheckpointError

_TAG = "$"
_CONTAINERS = {"tuple": tuple, "set": set, "frozenset": frozenset}
_MAPPINGS = {"dict": dict, "OrderedDict": OrderedDict}
_MAX_PLAIN_INT = 1 << 63


def save_tensors(path: Path | str, tensors: Mapping[str, torch.Tensor]) -> None:
    """Write tensors to a safetensors file; those that share memory are written as equal copies."""
    stored, seen = {}, set()
    for name, tensor in tensors.items():
        tensor = tensor.detach().contiguous()
        pointer = tensor.untyped_storage().data_ptr()
        stored[name] = tensor.clone() if pointer in seen and tensor.numel() else tensor
        seen.add(pointer)
    fault_point("checkpoint_write")
    save_file(stored, str(path))
    fault_point("checkpoint_write")


def load_tensors(path: Path | str) -> dict[str, torch.Tensor]:
    """The tensors of a safetensors file, on the CPU."""
    return load_file(str(path))


def save_state(path_prefix: Path | str, state: Any, *, classes: Sequence[type] = ()) -> None:
    """Write `state` to `{path_prefix}.json` and `{path_prefix}.safetensors`.

    Takes None, bool, int, float, str, bytes, list, tuple, set, dict and OrderedDict (any of these as keys), torch
    tensors (saved once however often they appear), numpy arrays and scalars, torch dtypes, PIL images, and instances
    of the dataclasses listed in `classes`.

    Raises:
        CheckpointError: For any other type, naming where it stands.
    """
    encoder = _Encoder(classes)
    tree = encoder.encode(state, "state")
    save_tensors(f"{path_prefix}.safetensors", encoder.tensors)
    write_file(Path(f"{path_prefix}.json"), json.dumps(tree).encode())


def load_state(path_prefix: Path | str, *, classes: Sequence[type] = ()) -> Any:
    """What `save_state` was given, tensors on the CPU; only the dataclasses listed in `classes` are ever built."""
    tree = json.loads(Path(f"{path_prefix}.json").read_bytes())
    return _Decoder(load_tensors(f"{path_prefix}.safetensors"), classes).decode(tree)


def weight_hash(state_dict: Mapping[str, torch.Tensor]) -> str:
    """A sha256 over every tensor's name, dtype, shape and bytes; neither order nor device changes it."""
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        hashes = pool.map(tensor_hash, state_dict.values())
        return combined_hash(dict(zip(state_dict, hashes, strict=True)))


def combined_hash(hashes: Mapping[str, str]) -> str:
    """`weight_hash` from the `tensor_hash` of each tensor by name, for weights that are never in memory together."""
    lines = [json.dumps([name, hashes[name]]) for name in sorted(hashes)]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def tensor_hash(tensor: torch.Tensor) -> str:
    """A sha256 over a tensor's dtype, shape and bytes."""
    digest = hashlib.sha256(f"{tensor.dtype} {list(tensor.shape)} ".encode())
    digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


class _Encoder:
    """JSON values as themselves; everything else an object with the tag `$`, tensors by their number."""

    def __init__(self, classes: Sequence[type]):
        self.tensors: dict[str, torch.Tensor] = {}
        self._numbers: dict[int, str] = {}
        self._alive: list[torch.Tensor] = []  # an id stays unique only while its object lives
        self._classes = set(classes)

    def encode(self, value: Any, where: str) -> Any:
        kind = type(value)
        if value is None or kind is bool or kind is str:
            return value
        if kind is int:
            return value if abs(value) < _MAX_PLAIN_INT else {_TAG: "int", "hex": hex(value)}
        if kind is float:
            return value if math.isfinite(value) else {_TAG: "float", "hex": struct.pack(">d", value).hex()}
        if kind is bytes:
            return {_TAG: "bytes", "base64": base64.b64encode(value).decode()}
        if kind is list:
            return [self.encode(item, f"{where}[{i}]") for i, item in enumerate(value)]
        if kind.__name__ in _CONTAINERS and kind is _CONTAINERS[kind.__name__]:
            return {_TAG: kind.__name__, "items": [self.encode(item, f"{where}[{i}]") for i, item in enumerate(value)]}
        if kind is dict or kind is OrderedDict:
            return self._encode_mapping(value, where)
        return self._encode_object(value, where)

    def _encode_mapping(self, value: dict, where: str) -> dict:
        if type(value) is dict and all(type(key) is str and key != _TAG for key in value):
            return {key: self.encode(item, f"{where}.{key}") for key, item in value.items()}
        items = [
            [self.encode(key, f"{where}, key"), self.encode(item, f"{where}[{key!r}]")] for key, item in value.items()
        ]
        return {_TAG: type(value).__name__, "items": items}

    def _encode_object(self, value: Any, where: str) -> dict:
        if isinstance(value, torch.Tensor) and value.layout == torch.strided and not value.is_quantized:
            return {_TAG: "tensor", "name": self._store(value)}
        if isinstance(value, np.ndarray | np.generic) and value.dtype.kind in "biufcSUmM":
            shape, scalar = list(value.shape), isinstance(value, np.generic)
            return self._bytes(value.tobytes(), "numpy", dtype=value.dtype.str, shape=shape, scalar=scalar)
        if isinstance(value, torch.dtype):
            return {_TAG: "dtype", "name": str(value).removeprefix("torch.")}
        if isinstance(value, Image.Image) and value.mode in ("1", "L", "RGB", "RGBA"):
            return self._bytes(value.tobytes(), "image", mode=value.mode, size=list(value.size))
        if type(value) in self._classes:
            names = [field.name for field in dataclasses.fields(value)]
            values = {name: self.encode(getattr(value, name), f"{where}.{name}") for name in names}
            return {_TAG: "dataclass", "class": type(value).__qualname__, "values": values}
        raise CheckpointError(f"{where} must be made of plain values, tensors, arrays and images; found {type(value)}")

    def _bytes(self, raw: bytes, tag: str, **description: Any) -> dict:
        name = self._store(torch.from_numpy(np.frombuffer(bytearray(raw), np.uint8)))
        return {_TAG: tag, "name": name, **description}

    def _store(self, tensor: torch.Tensor) -> str:
        if id(tensor) not in self._numbers:
            name = str(len(self.tensors))
            self._numbers[id(tensor)] = name
            self._alive.append(tensor)
            self.tensors[name] = tensor
        return self._numbers[id(tensor)]


class _Decoder:
    def __init__(self, tensors: dict[str, torch.Tensor], classes: Sequence[type]):
        self._tensors = tensors
        self._classes = {kind.__qualname__: kind for kind in classes}

    def decode(self, tree: Any) -> Any:
        if isinstance(tree, list):
            return [self.decode(item) for item in tree]
        if not isinstance(tree, dict):
            return tree
        tag = tree.get(_TAG)
        if tag is None:
            return {key: self.decode(item) for key, item in tree.items()}
        if tag in _CONTAINERS:
            return _CONTAINERS[tag](self.decode(item) for item in tree["items"])
        if tag in _MAPPINGS:
            return _MAPPINGS[tag]((self.decode(key), self.decode(item)) for key, item in tree["items"])
        return self._decode_object(tag, tree)

    def _decode_object(self, tag: str, tree: dict) -> Any:
        match tag:
            case "int":
                return int(tree["hex"], 16)
            case "float":
                return struct.unpack(">d", bytes.fromhex(tree["hex"]))[0]
            case "bytes":
                return base64.b64decode(tree["base64"])
            case "tensor":
                return self._tensors[tree["name"]]
            case "dtype":
                return _dtype(tree["name"])
            case "numpy":
                array = np.frombuffer(bytearray(self._bytes(tree)), dtype=tree["dtype"]).reshape(tree["shape"])
                return array[()] if tree["scalar"] else array
            case "image":
                return Image.frombytes(tree["mode"], tuple(tree["size"]), self._bytes(tree))
            case "dataclass" if tree["class"] in self._classes:
                return self._classes[tree["class"]](**{name: self.decode(v) for name, v in tree["values"].items()})
        raise CheckpointError(f"state files hold known kinds only, this one holds {tag} {tree.get('class', '')}")

    def _bytes(self, tree: dict) -> bytes:
        return self._tensors[tree["name"]].numpy().tobytes()


def _dtype(name: str) -> torch.dtype:
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise CheckpointError(f"a torch dtype must be named, received {name}")
    return dtype
