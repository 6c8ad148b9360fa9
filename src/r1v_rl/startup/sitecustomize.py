"""Run by Python when a process starts whose PYTHONPATH names this folder: see `runtime.children_prepared`."""

import r1v_rl  # noqa: F401
