"""How the arguments of a reward reach another process: JSON, with marks for what JSON lacks, in frames."""

import base64
import io
import json
import struct
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

_LENGTH = struct.Struct("!Q")
_PLAIN = (str, int, float, bool, type(None))


def to_json(value: Any) -> Any:
    """`value` as what `json.dumps` takes: plain data, sets, tuples, bytes, PIL images, arrays and tensors.

    Raises:
        TypeError: Naming the type of what cannot be handed over.
    """
    if type(value) in _PLAIN:
        return value
    if isinstance(value, list):
        return [item if type(item) in _PLAIN else to_json(item) for item in value]
    if isinstance(value, dict):
        if all(type(key) is str and not key.startswith("$") for key in value):
            return {key: to_json(item) for key, item in value.items()}
        return {"$items": [[to_json(key), to_json(item)] for key, item in value.items()]}
    if isinstance(value, tuple | set | frozenset):
        return {"$tuple" if isinstance(value, tuple) else "$set": [to_json(item) for item in value]}
    if isinstance(value, bytes):
        return {"$bytes": base64.b64encode(value).decode()}
    if isinstance(value, str | int | float):  # subclasses, such as enumerations of strings
        return value
    name = f"{type(value).__module__}.{type(value).__qualname__}"
    if name.startswith("PIL."):
        buffer = io.BytesIO()
        value.save(buffer, format="PNG")
        return {"$image": base64.b64encode(buffer.getvalue()).decode()}
    if name.startswith("numpy."):
        return {"$array": value.tolist(), "dtype": str(value.dtype)}
    if name == "torch.Tensor":
        return {"$tensor": value.tolist()}
    raise TypeError(name)


def from_json(value: Any) -> Any:
    """What `to_json` was given, a copy."""
    if isinstance(value, list):
        return [item if type(item) in _PLAIN else from_json(item) for item in value]
    if not isinstance(value, dict):
        return value
    mark = next(iter(value), "")
    if not mark.startswith("$"):
        return {key: from_json(item) for key, item in value.items()}
    return _MARKED[mark](value)


def _image(value: dict[str, Any]) -> Any:
    from PIL import Image

    return Image.open(io.BytesIO(base64.b64decode(value["$image"])))


def _array(value: dict[str, Any]) -> Any:
    import numpy

    return numpy.array(value["$array"], dtype=value["dtype"])[()]


def _tensor(value: dict[str, Any]) -> Any:
    import torch

    return torch.tensor(value["$tensor"])


_MARKED: dict[str, Callable[[dict[str, Any]], Any]] = {
    "$items": lambda value: {from_json(key): from_json(item) for key, item in value["$items"]},
    "$tuple": lambda value: tuple(from_json(value["$tuple"])),
    "$set": lambda value: set(from_json(value["$set"])),
    "$bytes": lambda value: base64.b64decode(value["$bytes"]),
    "$image": _image,
    "$array": _array,
    "$tensor": _tensor,
}


def state_to_json(state: Any) -> dict[str, Any] | None:
    """The plain fields of a trainer's state."""
    if state is None:
        return None
    return {key: value for key, value in vars(state).items() if type(value) in _PLAIN}


def state_from_json(state: dict[str, Any] | None) -> SimpleNamespace | None:
    """An object with those fields."""
    return None if state is None else SimpleNamespace(**state)


def frame(message: Any) -> bytes:
    """A message as it goes over a socket."""
    body = json.dumps(message).encode()
    return _LENGTH.pack(len(body)) + body


def unframe(received: bytes | bytearray) -> Any:
    """The message that `received` begins with; `KeyError` where it is not complete yet."""
    if len(received) < _LENGTH.size or len(received) < _LENGTH.size + _LENGTH.unpack_from(received)[0]:
        raise KeyError
    return json.loads(received[_LENGTH.size : _LENGTH.size + _LENGTH.unpack_from(received)[0]])
