"""Weights as safetensors files that servers read: in memory where they are on this machine, else on a shared disk."""

import os
import shutil
import tempfile
from collections.abc import Collection, Iterable
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from r1v_rl.errors import UserError

_BUCKET_BYTES = 2**30
_PREFIX = "r1v-rl-weights"
_MEMORY = Path("/dev/shm")


class WeightFolder:
    """A folder of its own below `root`, for files that last as long as the run.

    Args:
        root: None is main memory (`/dev/shm`), or the temporary folder where there is none.
    """

    def __init__(self, root: str | None):
        place = Path(root) if root else _MEMORY if _MEMORY.is_dir() else Path(tempfile.gettempdir())
        place.mkdir(parents=True, exist_ok=True)
        _sweep(place)
        self.path = Path(tempfile.mkdtemp(prefix=f"{_PREFIX}-{os.getpid()}-", dir=place))

    def write(self, weights: Iterable[tuple[str, Tensor]], name: str) -> list[str]:
        """The files, each of about a gigabyte, that these weights are in now; no more than one is in memory.

        Raises:
            UserError: If there is no room.
        """
        files: list[str] = []
        bucket: dict[str, Tensor] = {}
        size = 0
        for key, tensor in weights:
            bucket[key] = tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)  # tied ones too
            size += tensor.numel() * tensor.element_size()
            if size >= _BUCKET_BYTES:
                files.append(self._save(bucket, size, name, len(files)))
                bucket, size = {}, 0
        return [*files, self._save(bucket, size, name, len(files))] if bucket else files

    def keep(self, files: Collection[str]) -> None:
        """Remove all others."""
        for path in self.path.iterdir():
            if str(path) not in files:
                path.unlink()

    def remove(self) -> None:
        """Everything; may be called again."""
        shutil.rmtree(self.path, ignore_errors=True)

    def _save(self, bucket: dict[str, Tensor], size: int, name: str, number: int) -> str:
        if size > (free := shutil.disk_usage(self.path).free):
            raise UserError(
                f"weights go to the rollout servers through {self.path.parent}, which has {free / 1e9:.1f} GB left for "
                f"{size / 1e9:.1f} GB more: set `weight_sync_dir` to a folder that has room and that the servers see"
            )
        path = str(self.path / f"{name}-{number}.safetensors")
        save_file(bucket, path)
        return path


def _sweep(place: Path) -> None:
    """Remove what runs left that were killed."""
    for folder in place.glob(f"{_PREFIX}-*"):
        pid = folder.name.removeprefix(f"{_PREFIX}-").split("-")[0]
        if pid.isdigit() and not Path("/proc", pid).exists():
            shutil.rmtree(folder, ignore_errors=True)
