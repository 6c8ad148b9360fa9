"""Sets the process up before any test module imports torch or transformers: pytest loads this file first."""

import r1v_rl  # noqa: F401
