"""Run by Python when a process starts whose PYTHONPATH names this folder: see `runtime.children_prepared`."""

import os
import sys

from r1v_rl.runtime import DIE_WITH_PARENT, die_with_parent

_starter = os.environ.get(DIE_WITH_PARENT)
# Python's own tracker of shared memory ends by itself when the last of its users has, and has to clean up after them
if _starter and not any("multiprocessing.resource_tracker" in word for word in sys.orig_argv):
    die_with_parent(int(_starter))
