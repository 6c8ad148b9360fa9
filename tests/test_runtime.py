"""Process settings: each test runs in a process of its own, since they must precede torch."""

import os
import platform
import subprocess
import sys

import pytest

OPS_CANNOT_LOAD = """
import torch, pathlib
from importlib.machinery import PathFinder
compiled = next(pathlib.Path(PathFinder.find_spec("torchvision").origin).parent.glob("_C*.so"), None)
def loads():
    try:
        torch.ops.load_library(str(compiled))
        return True
    except OSError:
        return False
"""


def run(code: str, **environment: str) -> str:
    waiting = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
    env = {key: value for key, value in os.environ.items() if key not in waiting} | environment
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, env=env)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.strip()


WAITING = (
    "import r1v_rl, os, sys; print(*map(os.environ.get, ('OMP_WAIT_POLICY', 'GOMP_SPINCOUNT')), 'torch' in sys.modules)"
)


def test_import_is_light_and_says_how_threads_wait_before_torch():
    assert run(WAITING) == "PASSIVE 3000 False"


@pytest.mark.parametrize(
    ("given", "found"),
    [
        ({"OMP_WAIT_POLICY": "ACTIVE"}, "ACTIVE None"),
        ({"OMP_WAIT_POLICY": "PASSIVE"}, "PASSIVE None"),
        ({"GOMP_SPINCOUNT": "7"}, "PASSIVE 7"),
    ],
)
def test_how_threads_wait_is_kept_as_the_user_has_it(given, found):
    assert run(WAITING, **given) == f"{found} False"


GROWTH = """
import r1v_rl, ctypes, torch

class Heap(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in "a b c d e f g used free top".split()]

def used():
    return c.mallinfo2().used

c = ctypes.CDLL(None)
c.mallinfo2.restype = Heap
torch.set_num_threads(1)
weight = torch.ones(64, 64, dtype=torch.bfloat16)

def products(start):
    for rows in range(start, start + 400):
        torch.nn.functional.linear(torch.ones(rows, 64, dtype=torch.bfloat16), weight)

products(1)
before = used()
products(401)
print(used() - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="reads glibc's own figures")
def test_products_of_ever_new_sizes_do_not_fill_the_memory():
    assert int(run(GROWTH)) < 20e6


def test_schemas_are_declared_exactly_where_the_compiled_ops_cannot_load():
    code = (
        f"import r1v_rl\n{OPS_CANNOT_LOAD}\nimport r1v_rl.runtime as r, torchvision\nprint(loads(), r._library is None)"
    )
    loads, is_undeclared = run(code).split()
    assert loads == is_undeclared


def test_torchvision_imports_and_its_transforms_work():
    code = (
        "import r1v_rl, torch, torchvision\n"
        "from torchvision.transforms.v2 import functional as F\n"
        "print(tuple(F.resize(torch.zeros(3, 8, 8), [4, 4]).shape))"
    )
    assert run(code) == "(3, 4, 4)"


def test_without_our_settings_the_import_fails_here_or_the_ops_load():
    """The workaround is there for a reason: drop it when this machine's torchvision no longer needs it."""
    code = f"{OPS_CANNOT_LOAD}\nif not loads():\n    import torchvision"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 or "torchvision::nms does not exist" in done.stderr


def test_working_compiled_ops_are_left_alone(tmp_path):
    """A torchvision whose library loads: nothing is declared beside its own ops."""
    package = tmp_path / "torchvision"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "_C.so").write_bytes(b"")
    code = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n"
        "import r1v_rl.runtime as r, torch\n"
        "torch.ops.load_library = lambda path: None\n"
        "import torchvision\n"
        "print(r._library is None)"
    )
    assert run(code) == "True"


def test_a_torchvision_whose_ops_cannot_load_gets_its_schemas(tmp_path):
    package = tmp_path / "torchvision"
    package.mkdir()
    (package / "__init__.py").write_text("import torch\nprint(hasattr(torch.ops.torchvision, 'nms'))")
    (package / "_C.so").write_bytes(b"not a library")
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r})\nimport r1v_rl, torchvision"
    assert run(code) == "True"


@pytest.mark.parametrize("package", ["torchaudio", "torchcodec"])
def test_media_packages_that_cannot_load_are_hidden(package):
    code = (
        "import r1v_rl, torch\n"
        "from importlib.metadata import version, PackageNotFoundError\n"
        "try:\n"
        f"    broken = '+cpu' in version('torch') and '+cpu' not in version({package!r})\n"
        "except PackageNotFoundError:\n"
        "    broken = False\n"
        "import importlib.util, sys\n"
        f"print(broken == ({package!r} in sys.modules and sys.modules[{package!r}] is None))"
    )
    assert run(code) == "True"


def test_child_processes_are_prepared_within_the_block_and_not_after():
    code = (
        "import os, subprocess, sys\n"
        "from r1v_rl.runtime import children_prepared\n"
        "def child():\n"
        "    command = [sys.executable, '-c', 'import sys; print(\\'r1v_rl\\' in sys.modules)']\n"
        "    return subprocess.run(command, capture_output=True, text=True).stdout.strip()\n"
        "with children_prepared():\n"
        "    inside = child()\n"
        "print(inside, child())"
    )
    assert run(code) == "True False"


FAULTS = """
import r1v_rl, resource, torch
torch.set_num_threads(1)

def step():
    kept = [torch.ones(1 << 20) for _ in range(8)]

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

for _ in range(3):
    step()
before = faults()
for _ in range(20):
    step()
print(faults() - before)
"""
"""Page faults of 20 steps, each of which fills and frees 32 MB (8192 pages)."""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another allocator")
def test_freed_memory_is_kept_for_the_next_step():
    assert int(run(FAULTS)) < 8192
    assert int(run(FAULTS, MALLOC_MMAP_THRESHOLD_="131072")) > 10 * 8192, "what the user has set stays"
