"""Safetensors of a model folder, one file or many: read tensor by tensor, written shard by shard."""

import json
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from r1v_rl.durable import replace_file
from r1v_rl.errors import UserError

_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"


def load_weights(model_class: Any, name: str | Path, **settings: Any) -> Any:
    """`model_class.from_pretrained(name, **settings)`, from safetensors alone.

    Raises:
        UserError: If a folder has none.
    """
    check_safetensors(name)
    return model_class.from_pretrained(name, use_safetensors=True, **settings)


def check_safetensors(name: str | Path) -> None:
    """Raises UserError where a model folder has no safetensors: a pickle runs the code of whoever wrote it."""
    if Path(name).is_dir() and not any(Path(name).glob("*.safetensors")):
        raise UserError(f"{name} must hold its weights as safetensors; pickles (*.bin, *.pt) are never opened")


class WeightFiles:
    """The tensors of a folder by name, without reading them."""

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self.file_of = self._find_files()
        self.shapes: dict[str, tuple[int, ...]] = {}
        for file in self.files():
            with safe_open(self.folder / file, "pt") as opened:
                names = set(opened.keys())
                listed = {name for name, where in self.file_of.items() if where == file}
                if names != listed:
                    raise UserError(
                        f"{self.folder}/{_INDEX} must list what {file} holds; only in the file: "
                        f"{sorted(names - listed)}, only in the list: {sorted(listed - names)}"
                    )
                self.shapes |= {name: tuple(opened.get_slice(name).get_shape()) for name in names}

    def files(self) -> list[str]:
        """The files' names, in order."""
        return sorted(set(self.file_of.values()))

    def open(self) -> "OpenWeights":
        """Reads tensors until it is closed; what was read is mapped into memory, not copied, and freed then."""
        return OpenWeights(self)

    def _find_files(self) -> dict[str, str]:
        index, single = self.folder / _INDEX, self.folder / _SINGLE
        if index.exists():
            weight_map = json.loads(index.read_text())["weight_map"]
            absent = sorted({file for file in weight_map.values() if not (self.folder / file).is_file()})
            if absent:
                raise UserError(f"{self.folder} lacks {', '.join(absent)}, which {_INDEX} names: fetch it again")
            return weight_map
        if single.exists():
            with safe_open(single, "pt") as opened:
                return dict.fromkeys(opened.keys(), _SINGLE)
        raise UserError(f"{self.folder} must hold {_SINGLE} or {_INDEX}; pickles (*.bin) are never opened")


class OpenWeights:
    """`with files.open() as weights: weights[name]`: each file is opened when a tensor of it is first asked for."""

    def __init__(self, files: WeightFiles):
        self._files, self._stack = files, ExitStack()
        self._opened: dict[str, Any] = {}

    def __enter__(self) -> "OpenWeights":
        return self

    def __exit__(self, *exception: Any) -> None:
        self._opened.clear()
        self._stack.close()

    def __getitem__(self, name: str) -> Tensor:
        file = self._files.file_of[name]
        if file not in self._opened:
            self._opened[file] = self._stack.enter_context(safe_open(self._files.folder / file, "pt"))
        return self._opened[file].get_tensor(name)


class ShardWriter:
    """Writes the shards of a model and, when there are several, their index; those of an earlier model go first."""

    def __init__(self, folder: str | Path, num_shards: int):
        self.folder, self.num_shards = Path(folder), num_shards
        self._weight_map: dict[str, str] = {}
        self._total_bytes = 0
        for path in (*self.folder.glob("model*.safetensors"), self.folder / _INDEX):
            path.unlink(missing_ok=True)

    def write(self, tensors: Mapping[str, Tensor]) -> None:
        """The next shard; the tensors may be freed afterwards."""
        number = len(set(self._weight_map.values())) + 1
        file = _SINGLE if self.num_shards == 1 else f"model-{number:05d}-of-{self.num_shards:05d}.safetensors"
        save_file(dict(tensors), self.folder / file, metadata={"format": "pt"})
        self._weight_map |= dict.fromkeys(tensors, file)
        self._total_bytes += sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())

    def finish(self) -> None:
        """Writes the index."""
        if self.num_shards > 1:
            weight_map = dict(sorted(self._weight_map.items()))
            index = {"metadata": {"total_size": self._total_bytes}, "weight_map": weight_map}
            replace_file(self.folder / _INDEX, (json.dumps(index, indent=2) + "\n").encode())
