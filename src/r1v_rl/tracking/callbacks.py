"""The callbacks that every trainer of ours carries: `metrics.jsonl`, the console, wandb."""

import json
from pathlib import Path

from tqdm.auto import tqdm
from transformers import PrinterCallback, ProgressCallback, Trainer, TrainerCallback, TrainingArguments

from r1v_rl.durable import replace_file
from r1v_rl.tracking.metrics import METRICS_FILE, json_value, progress_line, read_metrics


def tracking_callbacks(args: TrainingArguments) -> list[TrainerCallback]:
    """Callbacks for a trainer about to be built; takes wandb out of `args.report_to`, where ours stands in for it."""
    callbacks: list[TrainerCallback] = [MetricsFile()]
    if not args.disable_tqdm:
        callbacks.append(ConsoleProgress())
    if "wandb" in args.report_to:
        from r1v_rl.tracking.wandb_run import WandbRun

        args.report_to = [name for name in args.report_to if name != "wandb"]
        callbacks.append(WandbRun())
    return callbacks


def drop_default_console(trainer: Trainer) -> None:
    """Remove the console callbacks that `Trainer` adds by itself: ours write instead, or nobody does."""
    for callback in list(trainer.callback_handler.callbacks):
        if type(callback) in (ProgressCallback, PrinterCallback):
            trainer.remove_callback(callback)


class MetricsFile(TrainerCallback):
    """Appends `{"step": ..., "epoch": ..., <every logged value>}` to `output_dir/metrics.jsonl`, NaN as null.

    A run that resumes at step s drops the lines beyond s, which it is about to write again, and a torn last line; a
    fresh run drops what an earlier run left in the same folder.
    """

    def __init__(self) -> None:
        self._bytes_of_earlier_runs = 0

    def on_init_end(self, args, state, control, **kwargs):
        path = Path(args.output_dir, METRICS_FILE)
        self._bytes_of_earlier_runs = path.stat().st_size if path.exists() else 0

    def on_train_begin(self, args, state, control, **kwargs):
        path = Path(args.output_dir, METRICS_FILE)
        if not state.is_world_process_zero or not path.exists():
            return
        if state.global_step == 0:
            kept = path.read_bytes()[self._bytes_of_earlier_runs :]
        else:
            lines = (json.dumps(line) for line in read_metrics(path.parent) if line["step"] <= state.global_step)
            kept = "".join(line + "\n" for line in lines).encode()
        replace_file(path, kept)
        self._bytes_of_earlier_runs = 0

    def on_log(self, args, state, control, logs=None, **kwargs):
        if state.is_world_process_zero and logs:
            line = {"step": state.global_step, "epoch": state.epoch, **logs}
            Path(args.output_dir).mkdir(parents=True, exist_ok=True)
            with open(Path(args.output_dir, METRICS_FILE), "a", encoding="utf-8") as file:
                file.write(json.dumps({key: json_value(value) for key, value in line.items()}) + "\n")


class ConsoleProgress(ProgressCallback):
    """A progress bar on a terminal, and one line a log step everywhere."""

    def on_train_begin(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            self.training_bar = tqdm(
                total=state.max_steps, initial=state.global_step, dynamic_ncols=True, disable=None, unit="step"
            )
        self.current_step = state.global_step

    def on_log(self, args, state, control, logs=None, **kwargs):
        if state.is_world_process_zero and logs:
            tqdm.write(progress_line(state.global_step, state.max_steps, logs))
