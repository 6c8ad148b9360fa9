"""The command line as a user meets it: exit codes, messages, and `check` on every bad input there is."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image
from random_vlm import save_random_vlm

from r1v_rl import cli
from r1v_rl.errors import DataError

REWARDS = """
import math
def broken_length(completions, **kwargs): return [1.0]
def broken_type(completions, **kwargs): return ["high"] * len(completions)
def infinite(completions, **kwargs): return [math.inf] * len(completions)
def not_a_number(completions, **kwargs): return [math.nan] * len(completions)
def raising(completions, **kwargs): raise KeyError("colour")
def fine(completions, **kwargs): return [0.5] * len(completions)
"""


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "r1v_rl", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, env=os.environ | environment)


@pytest.fixture(scope="module")
def vlm(tmp_path_factory):
    return str(save_random_vlm(tmp_path_factory.mktemp("vlm")))


@pytest.fixture
def place(tmp_path, vlm):
    """A folder with a sound dataset, rewards, and a recipe that passes the check."""
    (tmp_path / "images").mkdir()
    for name in ("red", "blue"):
        Image.new("RGB", (32, 32), name).save(tmp_path / "images" / f"{name}.png")
    write_rows(tmp_path, sound_rows())
    (tmp_path / "my_rewards.py").write_text(REWARDS)
    (tmp_path / "unimportable.py").write_text("import no_such_module\ndef reward(**kwargs): return []\n")
    recipe = {
        "model_name_or_path": vlm,
        "dataset_name": str(tmp_path / "train.jsonl"),
        "output_dir": str(tmp_path / "out"),
        "use_cpu": True,
        "bf16": False,
        "per_device_train_batch_size": 8,
        "num_generations": 4,
        "max_completion_length": 32,
        "reward_funcs": ["accuracy", "format"],
    }
    (tmp_path / "recipe.yaml").write_text("# r1v-rl grpo --config recipe.yaml\n" + json.dumps(recipe))
    return tmp_path


def sound_rows() -> list[dict]:
    return [
        {"id": "one", "problem": "<image>sum", "answer": "3", "images": ["images/red.png"]},
        {"id": "two", "problem": "<image><image>sum", "answer": "7", "images": ["images/red.png", "images/blue.png"]},
        {"id": "none", "problem": "count", "answer": "1/2", "images": []},
    ]


def write_rows(folder, rows) -> None:
    (folder / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))


def call(folder, *overrides: str, command: str = "check") -> int:
    return cli.main([command, "--config", str(folder / "recipe.yaml"), *overrides])


# --- the command line itself ----------------------------------------------------------------------------------------


def test_help_is_quick_and_names_every_command():
    started = time.perf_counter()
    done = run("--help")
    assert done.returncode == 0
    assert all(name in done.stdout for name in cli.COMMANDS)
    assert time.perf_counter() - started < 1.0  # 0.1 s on a quiet machine


def test_help_needs_none_of_the_heavy_packages():
    code = "import sys; from r1v_rl.cli import main; main(['--help']); print('torch' in sys.modules, file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stderr.strip() == "False"


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_command_that_is_listed_exists(name):
    assert callable(cli._load(name))


def test_version():
    assert run("--version").stdout.startswith("r1v-rl 0.")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "usage: r1v-rl COMMAND"),
        (["chek"], "r1v-rl chek: error: there is no such command; there are .* Did you mean `check`?"),
        (["check", "--config", "no.yaml"], "r1v-rl check: error: --config must name a YAML file, received no.yaml"),
    ],
)
def test_a_users_mistake_is_one_message_and_exit_code_2(arguments, message):
    done = run(*arguments)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert all(part in done.stderr for part in message.split(" .* "))


def test_exit_codes(monkeypatch, capsys):
    def raising(error):
        def command(arguments):
            raise error

        return command

    monkeypatch.setattr(cli, "_load", lambda name: raising(DataError("row x: no image")))
    assert cli.main(["grpo"]) == 2
    assert capsys.readouterr().err == "r1v-rl grpo: error: row x: no image\n"
    monkeypatch.setattr(cli, "_load", lambda name: raising(KeyboardInterrupt()))
    assert cli.main(["grpo"]) == 130
    monkeypatch.setattr(cli, "_load", lambda name: raising(ValueError("a fault of ours")))
    with pytest.raises(ValueError, match="a fault of ours"):
        cli.main(["grpo"])
    monkeypatch.setattr(cli, "_load", lambda name: lambda arguments: None)
    assert cli.main(["grpo"]) == 0


def test_ctrl_c_ends_with_130(place):
    command = [sys.executable, "-m", "r1v_rl", "check", "--config", str(place / "recipe.yaml")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert any(line.startswith("checking ") for line in process.stdout)  # it is under way
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=60) == 130
    process.communicate()


# --- check ----------------------------------------------------------------------------------------------------------


def test_a_sound_recipe_passes(place, capsys):
    assert call(place) == 0
    out = capsys.readouterr().out
    assert "3 rows, 2 with images, 2 images in one at most" in out
    assert "2 prompts x 4 completions a rollout, 1 rollouts an epoch" in out
    assert "accuracy 1.00 on gold answers, 0.00 on empty ones" in out
    assert "format 1.00 on gold answers, 0.00 on empty ones" in out
    assert not (place / "out").exists()  # a check leaves nothing behind


def refused(place, capsys, *overrides: str, command: str = "check") -> str:
    assert call(place, *overrides, command=command) == 2
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err
    return captured.err


BAD_ROWS = [
    (
        {"images": ["images/gone.png"]},
        r"row one: image .*gone.png does not exist; relative paths start at `dataset_root`",
    ),
    ({"images": ["images/torn.png"]}, r"row one: image .*torn.png is damaged .* replace the file or drop the row"),
    ({"images": ["images/page.png"]}, r"row one: image .*page.png is not an image of a known format"),
    ({"images": []}, r"row one: 1 `<image>` mark.* 0 image.*"),
    ({"problem": "sum"}, r"row one: 0 `<image>` mark.* 1 image.*images_without_marks: prepend"),
    ({"problem": "<image><image>sum"}, r"row one: 2 `<image>` mark.* 1 image"),
    ({"answer": ""}, r"row one: the answer is empty; fill one of the columns"),
    ({"problem": " ", "images": []}, r"row one: the prompt is empty"),
    ({"id": "two"}, r"row two: rows 0 and 1 share this id"),
    (
        {"problem": "<image>" + "sum " * 2000},
        r"row one: its prompt has \d+ tokens, 1 image.* included.* the context of 1024",
    ),
    ({"problem": "<image>{IMAGE_TOKEN}"}, r"row one: the chat template writes 2 image placeholder.*for 1 image"),
]


@pytest.mark.parametrize("command", ["check", "grpo"])
@pytest.mark.parametrize(("change", "message"), BAD_ROWS)
def test_a_bad_row_is_refused_before_training(place, capsys, vlm, change, message, command):
    torn = (place / "images" / "red.png").read_bytes()[:-8]
    (place / "images" / "torn.png").write_bytes(torn)
    (place / "images" / "page.png").write_text("<html>not found</html>")
    image_token = json.loads(Path(vlm, "tokenizer_config.json").read_text())["context_image_token"]
    rows = sound_rows()
    rows[0] |= {
        key: value.replace("{IMAGE_TOKEN}", image_token) if key == "problem" else value for key, value in change.items()
    }
    write_rows(place, rows)
    assert_matches(message, refused(place, capsys, command=command))
    assert not (place / "out").exists()


@pytest.mark.parametrize("command", ["check", "grpo"])
def test_a_gold_answer_that_cannot_be_read_is_refused(place, capsys, command):
    write_rows(place, [row | {"answer": "\\frac{"} for row in sound_rows()])
    assert_matches(r"row one: its own gold answer .* is rewarded with", refused(place, capsys, command=command))


@pytest.mark.parametrize("command", ["check", "grpo"])
@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["--num_generation", "4"], r"`num_generation` is not a recipe key. Did you mean `num_generations`\?"),
        (["--num_generations", "four"], r"`num_generations` must be a whole number or null, received 'four'"),
        (["--num_generations", "3"], r"generation_batch_size \(8\) must be divisible by num_generations \(3\)"),
        (["--per_device_train_batch_size", "64"], r"a generation takes 16 prompts .* the dataset has 3 rows"),
        (["--loss_type", "gspo"], r"`loss_type` must be one of dapo"),
        (["--trainable", "head"], r"`trainable` must name parts of"),
        (["--reward_weights", "1"], r"`reward_weights` has 1 values for 2 `reward_funcs`"),
        (["--dataset_name", "nowhere.jsonl"], r"dataset nowhere.jsonl does not exist"),
        (["--max_completion_length", "1020"], r"`max_completion_length` is 1020: together above the context of 1024"),
        (["--reward_funcs", "acuracy"], r"reward_funcs: 'acuracy' must be one of accuracy, cosine, format"),
    ],
)
def test_a_bad_key_is_refused_before_training(place, capsys, overrides, message, command):
    assert_matches(message, refused(place, capsys, *overrides, command=command))


@pytest.mark.parametrize("command", ["check", "grpo"])
@pytest.mark.parametrize(
    ("reward", "message"),
    [
        ("unimportable.py:reward", r"unimportable.py.*no_such_module"),
        ("my_rewards.py:missing", r"missing"),
        ("gone.py:reward", r"gone.py"),
        ("my_rewards.py:broken_length", r"broken_length"),
        ("my_rewards.py:broken_type", r"broken_type"),
        ("my_rewards.py:infinite", r"infinite.*inf"),
        ("my_rewards.py:not_a_number", r"not_a_number.*nan"),
        ("my_rewards.py:raising", r"raising.*colour"),
    ],
)
def test_a_bad_reward_is_refused_before_training(place, capsys, reward, message, command):
    assert_matches(message, refused(place, capsys, "--reward_funcs", str(place / reward), command=command))
    assert not (place / "out" / "config.yaml").exists(), "the run had begun"


@pytest.mark.parametrize("command", ["check", "grpo"])
def test_a_model_that_is_nowhere_is_refused(place, capsys, command):
    text = refused(place, capsys, "--model_name_or_path", "nowhere", command=command)
    assert_matches(r"`model_name_or_path` must be a model folder with its processor.*nowhere cannot be read", text)


def test_a_users_own_reward_is_tried(place, capsys):
    assert call(place, "--reward_funcs", "accuracy", f"{place}/my_rewards.py:fine") == 0
    assert "fine 0.50 on gold answers, 0.50 on empty ones" in capsys.readouterr().out


def test_every_fault_is_reported_at_once(place, capsys):
    write_rows(place, [row | {"answer": ""} for row in sound_rows()])
    text = refused(place, capsys, "--model_name_or_path", "nowhere")
    assert_matches(r"(?s)2 fault\(s\).*data: .*3 row\(s\) cannot be used.*model: `model_name_or_path`", text)


def assert_matches(pattern: str, text: str) -> None:
    assert re.search(pattern, text), text
