"""wandb never stops a run, uploads no secret, keeps its run id, and shows every image."""

import json
import logging
import socket
import subprocess
import sys
import time

import pytest
import wandb
from PIL import Image
from transformers import TrainerControl, TrainerState, TrainingArguments

from r1v_rl import checkpoints
from r1v_rl.tracking import wandb_run
from r1v_rl.tracking.callbacks import tracking_callbacks
from r1v_rl.tracking.completions import CompletionRecord, completions_table
from r1v_rl.tracking.redaction import printable, redact
from r1v_rl.tracking.wandb_run import WandbRun, run_id, wandb_mode

KEY = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch, tmp_path):
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL", "WANDB_PROJECT", "NETRC"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("WANDB_SILENT", "true")
    yield
    if wandb.run is not None:
        wandb.finish()
    wandb.teardown()


def event(output_dir, step=0, **kwargs):
    args = TrainingArguments(output_dir=str(output_dir), use_cpu=True, report_to=[], **kwargs)
    return args, TrainerState(global_step=step, is_world_process_zero=True), TrainerControl()


def test_mode_follows_the_key(monkeypatch, tmp_path):
    assert wandb_mode() == "offline"
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / ".netrc").write_text(f"machine api.wandb.ai login user password {KEY}\n")
    assert wandb_mode() == "online"
    (tmp_path / "home" / ".netrc").write_text(f"machine example.org login user password {KEY}\n")
    assert wandb_mode() == "offline"
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    assert wandb_mode() == "online"
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert wandb_mode() == "disabled"


def test_without_a_key_it_records_offline_under_trls_names_and_keeps_its_id(tmp_path):
    ids = []
    for step in (0, 4):
        run = WandbRun()
        args, state, control = event(tmp_path, step)
        run.on_train_begin(args, state, control)
        assert wandb.run.settings._offline
        run.on_log(args, state, control, logs={"reward": 0.5, "rewards/accuracy/mean": 0.25, "eval_accuracy": 0.1})
        ids.append(wandb.run.id)
        assert dict(wandb.run.summary)["train/reward"] == 0.5
        assert dict(wandb.run.summary)["train/rewards/accuracy/mean"] == 0.25
        assert dict(wandb.run.summary)["eval/accuracy"] == 0.1
        run.on_train_end(args, state, control)
        run.finish()
    assert ids[0] == ids[1] == run_id(tmp_path, resumed=True)
    assert run_id(tmp_path, resumed=False) != ids[0]
    assert len(list((tmp_path / "wandb").glob("offline-run-*"))) >= 1


def test_no_secret_reaches_a_file(monkeypatch, tmp_path):
    canaries = {name: f"canary-{name.lower()}-5f3a" for name in ("HF_TOKEN", "OPENAI_API_KEY", "MY_PASSWORD")}
    for name, value in canaries.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "argv", [*sys.argv, "--hub_token", canaries["HF_TOKEN"]])
    output_dir = tmp_path / "out"
    run = WandbRun()
    args, state, control = event(output_dir, hub_token=canaries["HF_TOKEN"], run_name=f"x {canaries['MY_PASSWORD']}")
    args.judge_url = f"https://user:{canaries['OPENAI_API_KEY']}@host/v1"
    monkeypatch.setattr(type(args), "to_dict", lambda self: {"judge_url": self.judge_url, "num_memory_tokens": 7})
    run.on_train_begin(args, state, control)
    print(canaries["HF_TOKEN"])
    run.on_log(args, state, control, logs={"note": canaries["OPENAI_API_KEY"], "reward": 1.0})
    assert wandb.run.config["num_memory_tokens"] == 7
    assert wandb.run.config["judge_url"] == "https://<redacted>@host/v1"
    run.finish()
    files = [path for path in output_dir.rglob("*") if path.is_file()]
    assert any(path.suffix == ".wandb" for path in files)
    hits = [(path, name) for path in files for name, value in canaries.items() if value.encode() in path.read_bytes()]
    assert hits == []


BARE_RUN = """
import json, sys, wandb
run = wandb.init(project="x", mode="offline", dir=sys.argv[1], settings=wandb.Settings(**json.loads(sys.argv[2])))
print("canary-printed")
run.finish()
"""


def test_command_line_git_remote_and_console_are_not_collected(tmp_path):
    """The same program with wandb's own settings is the control: there they are found."""
    (tmp_path / "run.py").write_text(BARE_RUN)
    git = ["git", "-C", str(tmp_path)]
    subprocess.run([*git, "init", "-q"], check=True)
    subprocess.run([*git, "remote", "add", "origin", "https://user:canary-remote@host/x.git"], check=True)
    found = {}
    for name, settings in (("ours", wandb_run._SETTINGS), ("control", {})):
        (tmp_path / name).mkdir()
        command = [sys.executable, "run.py", str(tmp_path / name), json.dumps(settings), "--token", "canary-argument"]
        subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
        (stored,) = (tmp_path / name).rglob("*.wandb")
        found[name] = {
            word for word in (b"argument", b"printed", b"remote") if b"canary-" + word in stored.read_bytes()
        }
    assert found["ours"] == set()
    assert found["control"] >= {b"argument", b"printed"}


class Broken:
    """Stands where the module does; what is named raises."""

    def __init__(self, *broken):
        self._broken = broken

    def __getattr__(self, name):
        if name in self._broken:

            def fail(*args, **kwargs):
                raise RuntimeError(f"planted in {name}")

            return fail
        return getattr(wandb, name)


@pytest.mark.parametrize("broken", ["init", "define_metric", "log", "Settings"])
def test_a_failure_is_one_warning_and_training_goes_on(tmp_path, caplog, broken):
    run = WandbRun()
    run._wandb = Broken(broken)
    args, state, control = event(tmp_path)
    with caplog.at_level(logging.WARNING, logger="r1v_rl"):
        run.on_train_begin(args, state, control)
        for _ in range(3):
            run.on_log(args, state, control, logs={"reward": 0.5})
            run.log_completions(1, [record()])
        run.on_save(args, state, control)
        run.on_predict(args, state, control, metrics={"a": 1})
        run.on_train_end(args, state, control)
        run.finish()
    warnings = [r.getMessage() for r in caplog.records if "wandb is left out" in r.getMessage()]
    assert len(warnings) == 1 and f"planted in {broken}" in warnings[0]


def test_a_missing_wandb_is_one_warning(monkeypatch, tmp_path, caplog):
    monkeypatch.setitem(sys.modules, "wandb", None)
    run = WandbRun()
    args, state, control = event(tmp_path)
    run.on_train_begin(args, state, control)
    run.on_log(args, state, control, logs={"reward": 0.5})
    assert [r.getMessage()[:16] for r in caplog.records] == ["wandb is left ou"]


@pytest.mark.parametrize("behaviour", ["refuses", "accepts-and-never-answers"])
def test_a_server_that_does_not_answer_sends_the_run_offline(monkeypatch, tmp_path, caplog, behaviour):
    server = socket.create_server(("127.0.0.1", 0))
    port = server.getsockname()[1]
    if behaviour == "refuses":
        server.close()
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{port}")
    monkeypatch.setitem(wandb_run._SETTINGS, "init_timeout", 2.0)
    run = WandbRun()
    args, state, control = event(tmp_path)
    began = time.monotonic()
    run.on_train_begin(args, state, control)
    run.on_log(args, state, control, logs={"reward": 0.5})
    assert time.monotonic() - began < 20
    assert wandb.run.settings._offline and dict(wandb.run.summary)["train/reward"] == 0.5
    assert len([r for r in caplog.records if "wandb does not answer" in r.getMessage()]) == 1
    assert KEY not in caplog.text
    run.finish()
    server.close()


def test_ours_stands_in_for_transformers_callback(tmp_path):
    args = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to=["wandb", "tensorboard"])
    callbacks = tracking_callbacks(args)
    assert args.report_to == ["tensorboard"]
    assert [type(c).__name__ for c in callbacks] == ["MetricsFile", "ConsoleProgress", "WandbRun"]


def record(images=()):
    return CompletionRecord(
        "r1", "p", "c", [1], [-0.5], {"accuracy": 1.0, "judge": None}, 1.0, 0.5, 3, False, images=images
    )


def test_the_table_shows_every_image_under_trls_names(tmp_path):
    pictures = [Image.new("RGB", (4, 4), (i, 0, 0)) for i in range(3)]
    records = [record(pictures), record(pictures[:1]), record(), record()]
    table = completions_table(wandb, 7, records, max_rows=3)
    assert {"step", "prompt", "completion", "accuracy", "judge", "advantage", "image"} <= set(table.columns)
    images = [row[table.columns.index("image")] for row in table.data]
    assert [len(cell) for cell in images] == [3, 1, 0]
    assert all(isinstance(image, wandb.Image) for cell in images for image in cell)
    assert images[0][1].image.getpixel((0, 0)) == (1, 0, 0)

    run = WandbRun()
    args, state, control = event(tmp_path)
    run.on_train_begin(args, state, control)
    run.log_completions(7, records, max_rows=3)
    assert run._wandb is not None, "logging the table failed"
    run.finish()
    staged = [path for path in tmp_path.rglob("artifacts/staging/*") if path.is_file()]
    logged = json.loads(next(data for path in staged if (data := path.read_bytes()).startswith(b'{"_type": "table"')))
    cells = [row[logged["columns"].index("image")] for row in logged["data"]]
    files = [[image["sha256"] for image in cell] for cell in cells]
    assert [len(cell) for cell in files] == [3, 1, 0] and len(set(files[0])) == 3 and files[1][0] == files[0][0]
    assert set(files[0]) <= set(map(checkpoints.file_sha256, staged)), "each picture lies ready to be sent"


def test_redaction_by_value(monkeypatch):
    monkeypatch.setenv("SOME_TOKEN", "tok-12345678")
    monkeypatch.setenv("SHORT_KEY", "a")
    value = {"x tok-12345678": ["tok-12345678!", ("https://u:p@h/x", 3)], "num_memory_tokens": 8, "mail": "a@b.org"}
    assert redact(value) == {
        "x <SOME_TOKEN>": ["<SOME_TOKEN>!", ["https://<redacted>@h/x", 3]],
        "num_memory_tokens": 8,
        "mail": "a@b.org",
    }


def test_printable_shows_what_would_steer_a_terminal():
    assert printable("é 中\n\x1b]0;x\x07\r\u202e\ud800") == "é 中\n\\x1b]0;x\\x07\\r\\u202e\\ud800"
