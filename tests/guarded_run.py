"""Runs commands of r1v-rl one after another in this process, under an audit hook that names every pickle it opens.

`python guarded_run.py STEPS.json`: a list of `{"run": [word, ...]}`, and of `{"plant": folder}`, which puts pickles
there. Each exit code is printed.
"""

import json
import pickle
import sys
import traceback
from pathlib import Path
from typing import Any

PICKLES = (
    "pytorch_model.bin", "adapter_model.bin", "training_args.bin", "optimizer.pt", "scheduler.pt", "scaler.pt",
    "rng_state.pth", "rng_state_0.pth", "model.pkl", "state/optimizer.pt", "state/rank-0.pt",
)  # fmt: skip
OPENED, LOADED = "PICKLE OPENED", "PICKLE LOADED"


class _Marker:
    """Loading it says so."""

    def __reduce__(self):
        return (print, (LOADED,))


def plant(folder: Path) -> None:
    """Every pickle that a library might look for, in a folder of weights."""
    for name in PICKLES:
        if (folder / name).parent.is_dir():
            (folder / name).write_bytes(pickle.dumps(_Marker()))


def hook(event: str, arguments: tuple[Any, ...]) -> None:
    """Says which planted file is opened for reading, by whom, and which planted pickle is loaded."""
    if event == "open" and isinstance(arguments[0], str | bytes) and "w" not in str(arguments[1]):
        name = arguments[0].decode() if isinstance(arguments[0], bytes) else arguments[0]
        if name.endswith(PICKLES):
            print(OPENED, name, "".join(traceback.format_stack()[-6:-1]), flush=True)
    if event == "pickle.find_class" and arguments[1] == "print":
        print(LOADED, "".join(traceback.format_stack()[-6:-1]), flush=True)


def main(steps: list[dict]) -> None:
    import r1v_rl  # noqa: F401  (process settings, before torch)
    from r1v_rl import cli

    sys.addaudithook(hook)
    for number, step in enumerate(steps):
        if "plant" in step:
            plant(Path(step["plant"]))
            continue
        try:
            code: Any = cli.main(step["run"])
        except Exception:
            sys.excepthook(*sys.exc_info())  # what Python does with a fault
            code = 1
        print(f"STEP {number} {step['run'][0]} exit code {code}", flush=True)


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()))
