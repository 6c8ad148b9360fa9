"""Run by Python when a process starts whose PYTHONPATH names this folder: see `runtime.children_prepared`."""

import os

from r1v_rl.runtime import DIE_WITH_PARENT, die_with_parent

if _starter := os.environ.get(DIE_WITH_PARENT):
    die_with_parent(int(_starter))
