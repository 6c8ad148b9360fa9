"""What `save_state` takes comes back the same: types, order, aliases, and every bit of every number."""

import hashlib
import json
import math
import random
import struct
import sys
from collections import OrderedDict
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import get_cosine_schedule_with_warmup

from r1v_rl.errors import CheckpointError
from r1v_rl.state_files import load_state, load_tensors, save_state, save_tensors, weight_hash


def same(a, b) -> bool:
    """Whether two values agree in type and in every bit."""
    if type(a) is not type(b):
        return False
    if isinstance(a, torch.Tensor):
        equal_bytes = a.contiguous().reshape(-1).view(torch.uint8).equal(b.contiguous().reshape(-1).view(torch.uint8))
        return a.dtype == b.dtype and a.shape == b.shape and equal_bytes
    if isinstance(a, np.ndarray | np.generic):
        return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
    if isinstance(a, dict):
        return list(a) == list(b) and all(type(x) is type(y) and same(a[x], b[y]) for x, y in zip(a, b, strict=True))
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    if isinstance(a, float):
        return struct.pack(">d", a) == struct.pack(">d", b)
    if isinstance(a, Image.Image):
        return a.mode == b.mode and a.size == b.size and a.tobytes() == b.tobytes()
    return a == b


def round_trip(tmp_path, value, **kwargs):
    save_state(tmp_path / "state", value, **kwargs)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["state.json", "state.safetensors"]
    return load_state(tmp_path / "state", **kwargs)


NAN_WITH_PAYLOAD = struct.unpack(">d", bytes.fromhex("fff8000000abcdef"))[0]

VALUES = {
    "singletons": [None, True, False, 0, 1, "", b"", b"\x00\xff", (), [], {}, set(), frozenset()],
    "bool-is-not-int": [True, 1, 1.0, "1"],
    "ints": [2**62, -(2**63), 2**63, 2**64 + 1, -(10**400)],
    "floats": [0.1, -0.0, 1e-320, sys.float_info.max, 1 / 3, math.inf, -math.inf, math.nan, NAN_WITH_PAYLOAD, 1e22],
    "text": ["\x00\n\x1b[31m", "\ud800 lone", "é中🙂", "$"],
    "tuples-and-lists": [(1, [2, (3,)], ()), [(), []]],
    "keys": {0: "a", "0": "b", (1, "x"): "c", None: "d", 1.5: "e", True and 2: "f", b"k": "g"},
    "dollar-keys": {"$": "tensor", "name": "0"},
    "ordered": OrderedDict([("b", 1), ("a", {"$": 2})]),
    "order": {"z": 1, "a": 2, "m": 3},
    "dtypes": [torch.bfloat16, torch.int8],
    "numpy": [
        np.arange(6, dtype=np.uint32).reshape(2, 3).T,
        np.array([], dtype=np.float16),
        np.array(3.5),
        np.float64(0.1),
        np.int64(-1),
        np.bool_(True),
        np.array([1 + 2j]),
        np.array(["ab", "c"]),
        np.array([1, 2], dtype=">i4"),
    ],
    "tensors": [
        torch.tensor(3.0),
        torch.empty(0, 4),
        torch.arange(6).reshape(2, 3).T,
        torch.randn(3).to(torch.bfloat16),
        torch.tensor([math.nan, -0.0, math.inf]),
        torch.tensor([True, False]),
        torch.arange(4, dtype=torch.uint8)[1:3],
        torch.randn(2, dtype=torch.float64),
        torch.randn(2, dtype=torch.complex64),
    ],
    "images": [Image.new("RGB", (3, 2), (1, 2, 3)), Image.new("L", (1, 1), 7), Image.new("1", (9, 2), 1)],
}


@pytest.mark.parametrize("name", VALUES)
def test_round_trip_is_exact(tmp_path, name):
    assert same(round_trip(tmp_path, VALUES[name]), VALUES[name])


def train(model, optimizer, scheduler, steps: int) -> None:
    for _ in range(steps):
        noise = torch.randn(4, 8) + random.random() + float(np.random.rand())
        model(noise).square().mean().backward()
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()


def parts():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.GELU(), torch.nn.Linear(16, 1)).to(torch.float32)
    groups = [{"params": model[0].parameters(), "lr": 1e-2}, {"params": model[2].parameters(), "lr": 3e-3}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95))
    return model, optimizer, get_cosine_schedule_with_warmup(optimizer, 2, 20)


def test_adamw_cosine_and_random_states_continue_bit_for_bit(tmp_path):
    random.seed(1), np.random.seed(2)
    model, optimizer, scheduler = parts()
    train(model, optimizer, scheduler, 7)
    generator = np.random.default_rng(3)
    state = {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "scheduler": scheduler.state_dict(),
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "numpy_generator": generator.bit_generator.state,
        "torch": torch.get_rng_state(),
    }
    save_state(tmp_path / "state", state)
    train(model, optimizer, scheduler, 5)
    expected, expected_draw = weight_hash(model.state_dict()), generator.random()

    random.seed(9), np.random.seed(9)
    model, optimizer, scheduler = parts()
    loaded = load_state(tmp_path / "state")
    assert list(loaded["optimizer"]["state"]) == [0, 1, 2, 3]
    assert type(loaded["python"][1]) is tuple and loaded["python"] == state["python"]
    assert same(loaded["scheduler"], state["scheduler"])
    model.load_state_dict(loaded["model"])
    optimizer.load_state_dict(loaded["optimizer"])
    scheduler.load_state_dict(loaded["scheduler"])
    random.setstate(loaded["python"])
    np.random.set_state(loaded["numpy"])
    torch.set_rng_state(loaded["torch"])
    generator = np.random.default_rng()
    generator.bit_generator.state = loaded["numpy_generator"]
    train(model, optimizer, scheduler, 5)
    assert weight_hash(model.state_dict()) == expected
    assert generator.random() == expected_draw


def test_a_tensor_that_appears_twice_is_saved_once_and_comes_back_as_one(tmp_path):
    shared = torch.randn(1000)
    loaded = round_trip(tmp_path, {"a": shared, "b": [shared, shared.clone()]})
    assert loaded["a"] is loaded["b"][0] and loaded["a"] is not loaded["b"][1]
    assert (tmp_path / "state.safetensors").stat().st_size < 2 * 4000 + 400


@dataclass(slots=True)
class Sample:
    ids: list[int]
    weight: float


def test_only_listed_dataclasses_are_written_and_built(tmp_path):
    assert round_trip(tmp_path, [Sample([1], 0.5)], classes=[Sample]) == [Sample([1], 0.5)]
    with pytest.raises(CheckpointError, match=r"state\[0\] must be made of plain values.*Sample"):
        save_state(tmp_path / "other", [Sample([1], 0.5)])
    with pytest.raises(CheckpointError, match="holds dataclass Sample"):
        load_state(tmp_path / "state")


@pytest.mark.parametrize(
    "value", [object(), lambda: 0, np.array([object()]), torch.eye(2).to_sparse(), Image.new("P", (1, 1)), range(3)]
)
def test_a_value_of_another_kind_is_refused_with_its_place(tmp_path, value):
    with pytest.raises(CheckpointError, match=r"state\.a\[1\] must be made of"):
        save_state(tmp_path / "state", {"a": [0, value]})


def test_a_state_file_cannot_name_what_is_built(tmp_path):
    save_state(tmp_path / "state", [1])
    for tree in ({"$": "dtype", "name": "load"}, {"$": "object", "class": "os.system"}):
        (tmp_path / "state.json").write_text(json.dumps(tree))
        with pytest.raises(CheckpointError):
            load_state(tmp_path / "state")


def test_tied_and_strided_tensors_are_saved(tmp_path):
    weight = torch.randn(4, 3)
    save_tensors(tmp_path / "x.safetensors", {"a": weight, "tied": weight, "view": weight[1:], "strided": weight.T})
    loaded = load_tensors(tmp_path / "x.safetensors")
    assert loaded["a"].equal(weight) and loaded["tied"].equal(weight)
    assert loaded["view"].equal(weight[1:]) and loaded["strided"].equal(weight.T)


def test_weight_hash_sees_names_types_shapes_and_bits_but_not_order():
    state = {"a": torch.tensor([1.0, 2.0]), "b": torch.zeros(2, 3, dtype=torch.bfloat16), "c": torch.tensor(0.0)}
    value = weight_hash(state)
    assert value == weight_hash(dict(reversed(state.items())))
    assert value == weight_hash({**state, "b": torch.zeros(3, 2, dtype=torch.bfloat16).T})
    others = [
        {**state, "a": torch.tensor([1.0, 2.0000002])},
        {**state, "c": torch.tensor(-0.0)},
        {**state, "b": torch.zeros(3, 2, dtype=torch.bfloat16)},
        {**state, "b": torch.zeros(2, 3, dtype=torch.float16)},
        {"a": state["b"], "b": state["a"], "c": state["c"]},
        {key: state[key] for key in "ab"},
    ]
    assert len({value, *map(weight_hash, others)}) == len(others) + 1


def test_weight_hash_by_hand():
    """The recipe of the hash is part of the checkpoint format: it must not change between versions."""
    inner = hashlib.sha256(b"torch.float32 [1] " + struct.pack("<f", 1.0)).hexdigest()
    outer = hashlib.sha256(f'["a", "{inner}"]'.encode()).hexdigest()
    assert weight_hash({"a": torch.tensor([1.0])}) == outer
