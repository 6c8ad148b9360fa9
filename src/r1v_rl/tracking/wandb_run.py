"""wandb, held at arm's length: offline without a key, the same run after a resume, never the end of a training run."""

import logging
import netrc
import os
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from transformers.integrations import WandbCallback
from transformers.integrations.integration_utils import WandbLogModel

from r1v_rl.durable import replace_file
from r1v_rl.tracking.completions import CompletionRecord, completions_table
from r1v_rl.tracking.redaction import redact

logger = logging.getLogger(__name__)

_SETTINGS = {
    "init_timeout": 30.0,
    "finish_timeout": 60.0,
    # What wandb would collect by itself can hold secrets: console text, command line, git remote, source files.
    "console": "off",
    "disable_code": True,
    "disable_git": True,
    "x_disable_meta": True,
    "x_disable_machine_info": True,
    "x_save_requirements": False,
}


class WandbRun(WandbCallback):
    """transformers' wandb callback (its keys, its `WANDB_PROJECT`), in which every failure is one warning.

    Unlike its base it stays offline when no key is found, keeps the run id in `output_dir/wandb/run_id`, puts no
    secret, command line or console text into what is uploaded, and uploads no model.
    """

    def __init__(self) -> None:
        self._wandb: Any = None
        self._initialized = False
        self._log_model = WandbLogModel.FALSE
        try:
            import wandb
        except Exception as error:
            self._give_up(error)
        else:
            self._wandb = wandb

    def setup(self, args, state, model, **kwargs):
        self._initialized = True
        if self._wandb is None or not state.is_world_process_zero:
            return
        config = args.to_dict()
        model_config = getattr(model, "config", None)
        if model_config is not None and hasattr(model_config, "to_dict"):
            config = {**model_config.to_dict(), **config}
        self._start(args, config, run_id(args.output_dir, resumed=state.global_step > 0))
        self._wandb.define_metric("train/global_step")
        self._wandb.define_metric("*", step_metric="train/global_step", step_sync=True)

    def _start(self, args, config: dict[str, Any], identity: str) -> None:
        """Begin the run online where there is a key, offline where there is none or no answer."""
        arguments = {
            "project": os.getenv("WANDB_PROJECT", "r1v-rl"),
            "name": redact(args.run_name or Path(args.output_dir).name),
            "dir": args.output_dir,
            "id": identity,
            "config": redact(config),
            "settings": self._wandb.Settings(**_SETTINGS),
        }
        mode = wandb_mode()
        try:
            self._wandb.init(**arguments, mode=mode, resume="allow" if mode == "online" else None)
        except Exception as error:
            if mode != "online":
                raise
            logger.warning(
                "wandb does not answer (%s); the run is kept offline, `wandb sync %s/wandb/offline-run-*` sends it",
                redact(str(error)),
                args.output_dir,
            )
            self._wandb.teardown()  # the failed attempt still holds the id
            self._wandb.init(**arguments, mode="offline")

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self._guarded(super().on_train_begin, args, state, control, model=model, **kwargs)

    def on_log(self, args, state, control, model=None, logs=None, **kwargs):
        self._guarded(super().on_log, args, state, control, model=model, logs=redact(dict(logs or {})), **kwargs)

    def on_predict(self, args, state, control, metrics, **kwargs):
        self._guarded(super().on_predict, args, state, control, metrics, **kwargs)

    def on_save(self, args, state, control, **kwargs):
        """Nothing: checkpoints are not uploaded."""

    def on_train_end(self, args, state, control, **kwargs):
        """Nothing: the run stays open for what is measured after training; `finish` or the process's end closes it."""

    def log_completions(self, step: int, records: Sequence[CompletionRecord], max_rows: int = 16) -> None:
        """Send a `completions` table with every image of its rows."""
        if self._wandb is not None and self._wandb.run is not None:
            self._guarded(
                lambda: self._wandb.log(
                    {"completions": completions_table(self._wandb, step, records, max_rows), "train/global_step": step}
                )
            )

    def finish(self) -> None:
        """End the run; waits for an upload for a minute at most."""
        if self._wandb is not None and self._wandb.run is not None:
            self._guarded(self._wandb.finish)

    def _guarded(self, call: Callable, *args, **kwargs) -> None:
        if self._wandb is None:
            return
        try:
            call(*args, **kwargs)
        except Exception as error:
            self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        self._wandb = None
        logger.warning(
            "wandb is left out from here on (%s: %s); training goes on, every metric is in metrics.jsonl.",
            type(error).__name__,
            redact(str(error)),
        )


def wandb_mode() -> str:
    """`WANDB_MODE` where it is set, `online` where a key is found (`WANDB_API_KEY`, netrc), else `offline`."""
    if os.getenv("WANDB_MODE"):
        return os.environ["WANDB_MODE"]
    return "online" if os.getenv("WANDB_API_KEY") or _key_in_netrc() else "offline"


def run_id(output_dir: Path | str, *, resumed: bool) -> str:
    """The id of the folder's wandb run: a new one for a fresh run, the same one after a resume."""
    path = Path(output_dir, "wandb", "run_id")
    if resumed and path.exists():
        return path.read_text().strip()
    identity = uuid.uuid4().hex[:12]
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, identity.encode())
    return identity


def _key_in_netrc() -> bool:
    host = urlsplit(os.getenv("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or "api.wandb.ai"
    for path in (os.getenv("NETRC"), "~/.netrc", "~/_netrc"):
        try:
            if path and netrc.netrc(os.path.expanduser(path)).authenticators(host):
                return True
        except (OSError, netrc.NetrcParseError):
            continue
    return False
