"""Real runs of every command with secrets in the environment and pickles in the folders: no file, log or process
argument holds a secret, no process that runs other people's code sees one, and no pickle is opened."""

import json
import os
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from distill.distill_run import KEYS as DISTILL
from distill.distill_run import write_rows
from distill.test_pipeline import Server
from guarded_run import LOADED, OPENED, PICKLES, plant
from published_chat import INTERNVIT_6B, save_chat
from random_vlm import picture, save_random_vlm

from r1v_rl.tiny.parts import resolve_part

SECRETS = {
    name: f"canary{number}-{name.lower()}-0123456789abcdef0123456789abcdef"
    for number, name in enumerate(
        ("VLLM_API_KEY", "OPENAI_API_KEY", "JUDGE_API_KEY", "WRITER_TOKEN", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN",
         "WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY", "DATABASE_PASSWORD")
    )
}  # fmt: skip
REWARD = """
import json, os

def seen(completions, log_extra, **_):
    log_extra("environment", [json.dumps(dict(os.environ))] * len(completions))
    return [len(text[0]["content"]) % 7 / 7 for text in completions]
"""
TRAINING = {
    "dataset_name": "scenes", "dataset_size": 8, "per_device_train_batch_size": 4, "learning_rate": 1e-3, "bf16": False,
    "use_cpu": True, "gradient_checkpointing": False, "logging_steps": 1, "save_strategy": "steps", "save_steps": 1,
    "report_to": "none", "trainable": ["projector"], "seed": 1,
}  # fmt: skip
GRPO = {
    **TRAINING, "dataset_kwargs": {"num_images": 1}, "num_generations": 2, "max_completion_length": 6,
    "answer_kind": "text", "reward_funcs": ["accuracy"], "save_rollouts": False,
}  # fmt: skip
SFT = {**TRAINING, "dataset_kwargs": {"chains": "brief", "num_images": 1}, "max_length": 512}
SERVED = {"use_vllm": True, "vllm_mode": "server", "vllm_kv_cache_memory_bytes": 2**27, "vllm_server_timeout": 500.0}
EVALUATE = {
    "eval_dataset_name": "scenes", "eval_dataset_size": 2, "eval_dataset_kwargs": {"num_images": 1}, "use_vllm": False,
    "max_completion_length": 4, "answer_kind": "text", "blank_images": False,
}  # fmt: skip


def words(command: str, keys: dict, *more: str) -> list[str]:
    pairs = [(f"--{key}", value if isinstance(value, str) else json.dumps(value)) for key, value in keys.items()]
    return [command, *(word for pair in pairs for word in pair), *more]


def steps_of(out: Path, model: str, url: str) -> list[tuple[dict, int | None]]:
    """What runs, and the exit code that it must have."""
    judged = {"judge_model": "judge", "judge_base_url": url, "judge_api_key_env": "JUDGE_API_KEY"}
    grpo, sft = {**GRPO, "model_name_or_path": model}, {**SFT, "model_name_or_path": model}
    live = {
        **grpo, **judged, **SERVED, "output_dir": f"{out}/live", "max_steps": 1, "save_rollouts": True,
        "reward_funcs": ["judge", f"{out}/reward.py:seen"], "report_to": ["wandb"], "log_completions": True,
    }  # fmt: skip
    rounds = {
        **sft, **judged, "dataset_size": 4, "output_dir": f"{out}/rounds", "taus": [1], "learning_rates": [1e-3],
        "use_vllm": False, "max_completion_length": 6, "answer_kind": "text", "max_steps": 1,
        "num_resamples": 1,
    }  # fmt: skip
    del rounds["learning_rate"]
    distilled = {
        **DISTILL, **judged, "dataset_name": f"{out}/rows.jsonl", "output_dir": f"{out}/distilled",
        "model_name_or_path": model, "generator_base_url": url, "generator_api_key_env": "WRITER_TOKEN",
    }  # fmt: skip
    parts = {"vision_encoder": f"{out}/encoder", "language_model": f"{out}/llm"}
    tested = {**EVALUATE, "model_name_or_path": model, "output_dir": f"{out}/evaluated"}
    asked = {"model_name_or_path": model, "image": f"{out}/one.png", "question": "How many?", "device_map": "cpu",
             "max_completion_length": 4}  # fmt: skip
    run = [(words("grpo", {**grpo, "output_dir": f"{out}/grpo", "max_steps": 2}), 0),
           (words("sft", {**sft, "output_dir": f"{out}/sft", "max_steps": 2}), 0),
           ({"plant": f"{out}/grpo/checkpoint-2"}, None), ({"plant": f"{out}/sft/checkpoint-2"}, None)]  # fmt: skip
    for command, keys in (("grpo", grpo), ("sft", sft)):
        again = {**keys, "output_dir": f"{out}/{command}", "max_steps": 2, "resume_from_checkpoint": True}
        run += [(words(command, {**again, "resume_from_checkpoint": f"{out}/{command}/checkpoint-2"}), 2)]
        run += [(words(command, again), 0)]
    run += [
        (words("evaluate", tested), 0), (words("chat", asked), 0),
        (words("compose", {**parts, "output_dir": f"{out}/composed"}), 0),
        (words("convert", {"model_name_or_path": f"{out}/published", "output_dir": f"{out}/converted"}), 0),
        (["plan", "grpo", *words("", {**grpo, "config": f"{out}/grpo.yaml"})[1:]], 0),
        (["check", "grpo", *words("", {**grpo, "config": f"{out}/grpo.yaml"})[1:]], 0),
        (words("judge", {"input": f"{out}/answers.jsonl", "prompt_opens_think": False}), 0),
        (words("evaluate", {**tested, "model_name_or_path": f"{out}/only_pickles"}), 2),
        (words("sft", {**sft, "model_name_or_path": f"{out}/only_pickles", "output_dir": f"{out}/none"}), 2),
        (words("distill", distilled), 0), (words("iterate", rounds), 0), (words("grpo", live), 0),
        (["run", f"{out}/chain.yaml", "--no-check"], 0),
        (words("grpo", {**grpo, "output_dir": f"{out}/none", "hub_token": SECRETS["HF_TOKEN"]}), 2),
    ]  # fmt: skip
    return [(step if isinstance(step, dict) else {"run": step}, code) for step, code in run]


class Watch(threading.Thread):
    """What the kernel shows of a process and all below it, for as long as it runs: command lines and environments."""

    def __init__(self, pid: int):
        super().__init__(daemon=True)
        self.pid = pid
        self.seen: dict[tuple[int, bytes], bytes] = {}
        """Environment of each process, by its pid and its command line."""

    def run(self) -> None:
        while Path(f"/proc/{self.pid}/cmdline").exists():
            self.look(self.pid)
            time.sleep(0.1)

    def look(self, pid: int) -> None:
        folder = Path(f"/proc/{pid}")
        with suppress(OSError):
            command, environment = ((folder / name).read_bytes() for name in ("cmdline", "environ"))
            if command and (folder / "cmdline").read_bytes() == command:  # else it was becoming another program
                self.seen[pid, command] = environment
        for children in folder.glob("task/*/children"):
            with suppress(OSError):
                for child in children.read_text().split():
                    self.look(int(child))

    def environments_of(self, word: bytes) -> list[bytes]:
        return [environment for (_, command), environment in self.seen.items() if word in command]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """(folder of all that was written, exit codes wanted and found, watch, judge's server)."""
    out = tmp_path_factory.mktemp("runs")
    model = save_random_vlm(out / "model")
    only = save_random_vlm(out / "only_pickles")
    (only / "model.safetensors").unlink()
    for part, name in (("encoder", "tiny/vision_encoder"), ("llm", "tiny/reasoning_llm")):
        (out / part).mkdir()
        for file in Path(resolve_part(name)).iterdir():
            (out / part / file.name).write_bytes(file.read_bytes())
    save_chat(out / "published", "v1", INTERNVIT_6B)
    for folder in (model, only, out / "encoder", out / "llm", out / "published"):
        plant(folder)
    picture(0).save(out / "one.png")
    write_rows(out / "rows.jsonl", 4)
    (out / "reward.py").write_text(REWARD)
    (out / "answers.jsonl").write_text(json.dumps({"gold": "2x + 2", "completion": r"\boxed{2(x + 1)}"}) + "\n")
    (out / "grpo.yaml").write_text("# r1v-rl grpo --config grpo.yaml\n")
    (out / "sft.yaml").write_text(json.dumps({**SFT, "model_name_or_path": str(model), "max_steps": 1}))
    stage = {"name": "sft", "command": "sft", "config": "sft.yaml", "evaluate": False}
    (out / "chain.yaml").write_text(json.dumps({"output_dir": f"{out}/chain", "stages": [stage]}))
    server = Server()
    scripted = server.script
    server.script = lambda request, tries: scripted(request, tries) if "Row" in str(request) else "Score: 5"
    steps = steps_of(out, str(model), server.base_url)
    plan = tmp_path_factory.mktemp("steps") / "steps.json"
    plan.write_text(json.dumps([step for step, _ in steps]))
    environment = {**os.environ, **SECRETS, "WANDB_MODE": "offline", "HOME": str(out / "home")}
    with open(out / "log.txt", "w") as log:
        command = [sys.executable, str(Path(__file__).with_name("guarded_run.py")), str(plan)]
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
        watch = Watch(process.pid)
        watch.start()
        process.wait(timeout=1500)
    watch.join()
    server.close()
    log = (out / "log.txt").read_text()
    found = [int(line.rpartition(" ")[2]) for line in log.splitlines() if line.startswith("STEP ")]
    return out, ([code for _, code in steps if code is not None], found, log), watch, server


def test_every_command_ran(runs):
    out, (wanted, found, log), _, server = runs
    assert found == wanted, log[-6000:]
    keys = {key.removeprefix("Bearer ") for key in server.keys}
    assert keys == {SECRETS["JUDGE_API_KEY"], SECRETS["WRITER_TOKEN"]}, "the secrets were used"
    for name in ("live/wandb", "live/rollouts", "live/checkpoint-1", "live/manifest.json", "distilled/report.html"):
        assert (out / name).exists(), name


def test_no_file_and_no_log_holds_a_secret(runs):
    out = runs[0]
    files = [path for path in out.rglob("*") if path.is_file() and not path.is_symlink()]
    assert len(files) > 100 and any(path.suffix == ".wandb" for path in files)
    hits = []
    for path in files:
        content = path.read_bytes()
        if path.suffix == ".parquet":  # its columns are compressed
            content += str(pq.read_table(path).to_pylist()).encode()
        hits += [f"{name} in {path.relative_to(out)}" for name, value in SECRETS.items() if value.encode() in content]
    assert not hits


def test_no_process_argument_holds_a_secret(runs):
    commands = [command for _, command in runs[2].seen]
    started = ("vllm.entrypoints", "plugin_process", "grader_process", "-m\0r1v_rl\0sft", "guarded_run")
    assert [word for word in started if not any(word.encode() in line for line in commands)] == []
    assert not [line for line in commands for value in SECRETS.values() if value.encode() in line]


def test_processes_that_run_other_peoples_code_or_text_see_no_secret(runs):
    for word in (b"plugin_process", b"grader_process"):
        environments = runs[2].environments_of(word)
        assert environments and not [value for value in SECRETS.values() for e in environments if value.encode() in e]


def test_no_pickle_is_opened(runs):
    log = runs[1][2]
    assert OPENED not in log and LOADED not in log, log[log.find("PICKLE ") :][:3000]
    assert (runs[0] / "model" / PICKLES[0]).exists()
    assert log.count("must hold its weights as safetensors; pickles") == 2
    assert log.count("optimizer.pt is not in the manifest") >= 2, "the checkpoints with pickles were named"
