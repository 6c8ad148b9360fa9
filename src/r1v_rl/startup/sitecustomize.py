"""Run by Python at the start of a process whose PYTHONPATH names this folder: see `r1v_rl.runtime.children_prepared`."""

import r1v_rl  # noqa: F401
