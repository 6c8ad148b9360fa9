"""The report is one page that loads nothing, and says what the run's files say."""

import base64
import hashlib
import io
import json
import math
import re
import xml.etree.ElementTree as ET
from html.parser import HTMLParser

import numpy as np
import pytest
import yaml
from PIL import Image, ImageDraw

from r1v_rl.errors import UserError
from r1v_rl.tracking.charts import interval_chart, line_chart, nice_ticks, number
from r1v_rl.tracking.completions import CompletionRecord, RolloutStore
from r1v_rl.tracking.manifest import write_run_manifest
from r1v_rl.tracking.report import main, write_report

HOSTILE = "<script>alert(1)</script><img src=x onerror=alert(2)>\"'&\x1b[2J"


def picture(seed: int) -> Image.Image:
    """A few coloured shapes."""
    random = np.random.default_rng(seed)
    image = Image.new("RGB", (224, 224), (246, 244, 238))
    draw = ImageDraw.Draw(image)
    for _ in range(int(random.integers(3, 7))):
        x, y, size = (int(value) for value in random.integers(20, 160, 3))
        colour = tuple(int(value) for value in random.integers(0, 220, 3))
        shape = (draw.ellipse, draw.rectangle)[int(random.integers(2))]
        shape((x, y, x + size // 3 + 14, y + size // 3 + 14), fill=colour)
    return image


def leave_a_run(output_dir, num_steps=60, question="How many shapes are red?"):
    """The files of a run, in the format that the trainer writes, with a reward that rises."""
    output_dir.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(0)
    lines = [{"step": 0, "epoch": 0, "eval_accuracy": 0.31}]
    for step in range(1, num_steps + 1):
        skill = 0.3 + 0.5 * step / num_steps + float(random.normal(0, 0.04))
        lines.append(
            {
                "step": step,
                "epoch": step / 20,
                "loss": float(random.normal(0, 0.01)),
                "grad_norm": float(abs(random.normal(0.4, 0.1))),
                "learning_rate": 1e-3 * (1 - step / num_steps),
                "reward": 0.8 * skill + 0.15,
                "reward_std": 0.3 - 0.15 * skill,
                "rewards/accuracy/mean": skill,
                "rewards/accuracy/std": 0.4,
                "rewards/format/mean": min(1.0, 0.7 + step / 100),
                "frac_reward_zero_std": 0.2 * skill,
                "completions/mean_length": 40 + 30 * skill,
                "completions/clipped_ratio": 0.05,
                "kl": None if step == 1 else 1e-4 * step,
                "entropy": 1.1 - 0.8 * skill,
                "sampling/sampling_logp_difference/mean": 2e-6,
                "sampling/sampling_logp_difference/max": 8e-5,
                "clip_ratio/region_mean": 0.01,
                "step_time": 3 + float(random.normal(0, 0.2)),
                "rollout/seconds": 1.4,
            }
        )
    (output_dir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    config = {"model_name_or_path": "outputs/tiny/vlm", "dataset_name": "scenes", "num_generations": 4, "seed": 1}
    (output_dir / "config.yaml").write_text(yaml.safe_dump({**config, "reward_funcs": ["accuracy", "format"]}))
    write_run_manifest(
        output_dir,
        stage="grpo",
        parent=None,
        config=config,
        data_hash="abc",
        weight_hashes={},
        seeds={"seed": 1},
        metrics={},
    )
    shares = {"accuracy_before": (0.312, 0.272, 0.354), "accuracy_after": (0.744, 0.704, 0.78)}
    summary = {key: dict(zip(("value", "low", "high"), values, strict=True)) for key, values in shares.items()}
    summary |= {
        "blank_image_accuracy": {"value": 0.18, "low": 0.148, "high": 0.216},
        "seconds": 412.3,
        "num_heldout": 500,
    }
    (output_dir / "summary.json").write_text(json.dumps(summary))
    store = RolloutStore(output_dir)
    for step in (0, num_steps // 2, num_steps - 1):
        store.write(step, [completion(example, i, step, question) for example in range(5) for i in range(4)])
    return output_dir


def completion(example: int, index: int, step: int, question: str) -> CompletionRecord:
    right = index <= (3 if step else 0)
    answer = "4" if right else str(5 + index)
    return CompletionRecord(
        example_id=f"scenes-{example}",
        prompt=f"<|im_start|>user\n<image>{question}<|im_end|>\n<|im_start|>assistant\n<think>\n",
        completion=f"red: 3, {1 + index} more. Together {answer}.\n</think>\n\nThe answer is \\boxed{{{answer}}}",
        token_ids=[1, 2, 3],
        logprobs=[-0.1, -0.2, -0.3],
        rewards={"accuracy": float(right), "format": 1.0 if index else None},
        reward=0.8 * right + 0.2,
        advantage=0.5 if right else -0.7,
        weight_version=step,
        is_truncated=index == 3 and not step,
        answer=answer,
        gold="4",
        images=(picture(example),),
    )


class Tags(HTMLParser):
    """Every tag with its attributes, and whether each one that opens closes."""

    def __init__(self, text):
        super().__init__()
        self.found, self.open, self.text = [], [], ""
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.found.append((tag, dict(attributes)))
        if tag not in ("meta", "img", "line", "path", "circle", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.found.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        if self.open and self.open[-1] == tag:
            self.open.pop()

    def handle_data(self, data):
        self.text += data


def test_the_page_says_what_the_files_say(tmp_path):
    page = write_report(leave_a_run(tmp_path / "my run")).read_text()
    tags = Tags(page)
    assert tags.open == []
    for wanted in (
        "+43.2 points",
        "31.2% to 74.4%",
        "6 min 52 s",
        "500",
        "my run",
        "grpo · outputs/tiny/vlm · scenes",
        "seed 1",
    ):
        assert wanted in tags.text, wanted
    for title in (
        "Reward",
        "Reward parts",
        "KL to the reference",
        "Entropy",
        "Loss",
        "Seconds a step",
        "Clipped tokens",
    ):
        assert f"<h3>{title}</h3>" in page
    assert "<h3>rollout/seconds</h3>" in page and "<h3>epoch</h3>" not in page
    assert page.count('class="card sample"') == 4 and page.count(">Step 0<") == 4 and page.count(">Step 59<") == 4
    assert "not judged" in page and "cut by the limit" in page and 'class="completion down"' in page
    assert "3 of 4 completions, mean reward 0.4<" in page and "3 of 4 completions, mean reward 1<" in page
    assert "<td>reward_funcs</td><td>[&#x27;accuracy&#x27;, &#x27;format&#x27;]</td>" in page
    assert "<td>versions.torch</td>" in page


@pytest.mark.parametrize(
    ("gaps", "rise", "flagged"),
    [
        ([(0.30, 0.2), (0.31, 0.22)], 0.3, True),  # the reward rises alone
        ([(0.30, 0.2), (0.50, 0.41)], 0.3, False),  # both rise
        ([(0.00, -0.1), (-0.02, -0.1)], 0.3, True),  # blind throughout
        ([(0.30, 0.2), (0.30, 0.2)], 0.02, False),  # nothing rises
        ([(0.30, 0.2)], 0.3, False),  # measured once
        ([], 0.3, False),
    ],
)
def test_a_reward_that_rises_without_the_grounding_gap_is_flagged(tmp_path, gaps, rise, flagged):
    lines = [{"step": step, "reward": 0.2 + rise * step / 20} for step in range(1, 21)]
    lines += [
        {"step": 20 * i, "grounding/gap": gap, "grounding/gap_low": low, "grounding/gap_high": 2 * gap - low}
        for i, (gap, low) in enumerate(gaps)
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    page = write_report(tmp_path).read_text()
    assert ("The reward rises without the grounding gap" in page) == flagged
    if flagged and gaps[0][0] == 0.3:
        assert "+30.0 → +31.0 points, at least +22.0" in page


def test_the_pictures_are_in_the_page(tmp_path):
    tags = Tags(write_report(leave_a_run(tmp_path)).read_text())
    sources = [attributes["src"] for tag, attributes in tags.found if tag == "img"]
    assert len(sources) == 4
    shown = Image.open(io.BytesIO(base64.b64decode(sources[0].removeprefix("data:image/png;base64,"))))
    assert shown.tobytes() == picture(0).tobytes()


def test_the_page_loads_nothing_and_runs_nothing(tmp_path):
    page = write_report(leave_a_run(tmp_path)).read_text()
    tags = Tags(page)
    assert {tag for tag, _ in tags.found}.isdisjoint({"script", "link", "iframe", "object", "embed", "base", "form"})
    for _, attributes in tags.found:
        assert not any(name.startswith("on") or name in ("href", "srcset", "action") for name in attributes)
        assert attributes.get("src", "data:").startswith("data:")
    assert not re.search(r"https?:|//[a-z]|@import|url\(", page)
    assert "default-src 'none'" in page


def test_hostile_text_stays_text_wherever_it_stands(tmp_path):
    leave_a_run(tmp_path, num_steps=4, question=HOSTILE)
    with open(tmp_path / "metrics.jsonl", "a") as file:
        for step in (5, 6):
            values = {f"rewards/{HOSTILE}/mean": 1.0, HOSTILE: 0.5, "note": HOSTILE}
            file.write(json.dumps({"step": step, **values}) + "\n")
        file.write('{"step": 7, "rew')
    hostile = CompletionRecord(
        HOSTILE, HOSTILE, HOSTILE, [], [], {HOSTILE: 1.0}, 1.0, 1.0, 0, False, answer=HOSTILE, gold=HOSTILE
    )
    RolloutStore(tmp_path).write(9, [hostile])
    (tmp_path / "config.yaml").write_text(
        yaml.safe_dump({HOSTILE: HOSTILE, "model_name_or_path": HOSTILE, "$body": "$title"})
    )
    page = write_report(tmp_path).read_text()
    tags = Tags(page)
    assert tags.open == []
    assert not [tag for tag, attributes in tags.found if tag == "script" or "onerror" in attributes]
    assert tags.text.count("<script>alert(1)</script>") >= 8
    assert "$body" in tags.text


def test_no_secret_reaches_the_page(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_canary12345")
    leave_a_run(tmp_path, num_steps=4, question="hf_canary12345")
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"hub_token": "hf_canary12345", "a": {"b": "hf_canary12345"}}))
    page = write_report(tmp_path).read_text()
    assert "canary" not in page and "&lt;HF_TOKEN&gt;" in page


@pytest.mark.parametrize("missing", ["metrics.jsonl", "summary.json", "config.yaml", "manifest.json", "rollouts"])
def test_what_the_run_did_not_leave_is_left_out(tmp_path, missing):
    leave_a_run(tmp_path, num_steps=4)
    (tmp_path / missing).rename(tmp_path / "gone")
    page = write_report(tmp_path).read_text()
    assert Tags(page).open == []
    marks = {"metrics.jsonl": "<h2>Curves", "summary.json": "Held-out accuracy", "rollouts": "<h2>Completions"}
    for name, mark in marks.items():
        assert (mark in page) == (name != missing)


def test_damaged_files_do_not_stop_the_report(tmp_path):
    leave_a_run(tmp_path, num_steps=4)
    (tmp_path / "summary.json").write_text('{"accuracy_before": ')
    (tmp_path / "config.yaml").write_text("a: [")
    for image in (tmp_path / "rollouts" / "images").iterdir():
        image.write_bytes(image.read_bytes()[:40])
    page = write_report(tmp_path).read_text()
    assert "<img" not in page and "<td>dataset_name</td>" in page, "the manifest's copy of the recipe stands in"


def test_a_folder_without_a_run_is_a_clear_error(tmp_path, capsys):
    with pytest.raises(UserError, match=r"found none of them in .*empty"):
        main([str(tmp_path / "empty")])
    with pytest.raises(UserError, match="usage: r1v-rl report OUTPUT_DIR"):
        main([])
    leave_a_run(tmp_path, num_steps=2)
    assert main([str(tmp_path)]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "report.html")


def test_the_same_run_gives_the_same_page(tmp_path):
    leave_a_run(tmp_path)
    pages = {hashlib.sha256(write_report(tmp_path).read_bytes()).hexdigest() for _ in range(2)}
    assert len(pages) == 1


def paths(svg: str) -> list[list[tuple[float, float]]]:
    found = [e.get("d") for e in ET.fromstring(svg).iter("path") if "line" in e.get("class")]
    return [[tuple(map(float, pair.split())) for pair in d[1:].split("L")] for d in found]


def test_a_line_stands_where_its_values_say():
    """By hand: the drawing is 46..328 across and 166..12 up; ticks of 0..1 are at its ends."""
    (line,) = paths(line_chart({"a": [(0, 0.0), (5, 1.0), (10, 0.5)]}))
    assert line == [(46.0, 166.0), (187.0, 12.0), (328.0, 89.0)]


@pytest.mark.parametrize(
    "values",
    [[1.0], [0.0, 0.0], [5.0] * 50, [math.nan, 1.0, 2.0], [1e-9, 2e-9], [-1e12, 1e12], [math.inf, 1.0], [1e300, 2e300]],
)
def test_any_values_give_a_drawing_inside_its_box(values):
    svg = line_chart({"a": list(enumerate(values))})
    ET.fromstring(svg)
    assert "nan" not in svg and "inf" not in svg
    for line in paths(svg):
        assert all(46 <= x <= 328 and 12 <= y <= 166 for x, y in line)


def test_nothing_to_draw_is_no_chart_and_a_long_run_is_thinned():
    assert line_chart({}) == "" and line_chart({"a": [(1, math.nan)]}) == ""
    (line,) = paths(line_chart({"a": [(step, math.sin(step)) for step in range(100_000)]}))
    assert 300 <= len(line) <= 600


def test_ticks_and_numbers_by_hand():
    assert nice_ticks(0, 1) == [0, 0.2, 0.4, 0.6, 0.8, 1]
    assert nice_ticks(0.31, 0.83) == [0.2, 0.4, 0.6, 0.8, 1.0]
    assert nice_ticks(-3, 17) == [-5, 0, 5, 10, 15, 20]
    assert [number(v) for v in (0, 0.5, 1234.5, 2e-6, 1.5e7, -0.25, 12.34)] == [
        "0",
        "0.5",
        "1234",
        "2e-6",
        "1.5e7",
        "-0.25",
        "12.3",
    ]


def test_an_interval_stands_where_it_says():
    """By hand: 0 is at 150 and 1 at 500."""
    svg = ET.fromstring(interval_chart([("after", 0.5, 0.4, 0.6), ("blank", 0.1, None, None)]))
    (bar,) = [e for e in svg.iter("line") if e.get("class").startswith("bar")]
    assert (bar.get("x1"), bar.get("x2")) == ("290.0", "360.0")
    assert [e.get("cx") for e in svg.iter("circle")] == ["325.0", "185.0"]
