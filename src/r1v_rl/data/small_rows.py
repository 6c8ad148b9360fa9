"""Rows for `recipes/small`: captions, worked counts and questions from the files of NLVR and PuzzleVQA.

    python -m r1v_rl.data.small_rows data --out outputs/small/data

`data` holds `nlvr/` (`dev.jsonl` with NLVR's scene records, `counting_dev.jsonl` with questions, `images/`) and
`puzzlevqa/` (`dev.jsonl` with caption, explanation, deduction, `images/`). A picture of NLVR shows three boxes side by
side, four times as wide as high: each box becomes a picture of its own. All pictures are written below `--out`, where
the rows' image paths start. NLVR draws each scene six times, its boxes in another order each time: the last number of
a picture's name counts the orders, and the scene's record has the first.
"""

import argparse
import hashlib
import itertools
import json
import random
import shutil
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image
from tqdm.auto import tqdm

from r1v_rl.durable import replace_file
from r1v_rl.errors import DataError

COLORS = {"#0099ff": "blue", "Yellow": "yellow", "Black": "black"}
DESCRIBE = "Describe the picture."
INSTRUCTION = "Think step by step inside <think> and </think>, then give the answer inside \\boxed{}."
BOXES, BOX, STEP = 3, 100, 150
"""Boxes of a picture; their side, and from one's left edge to the next one's, in pixels."""
ORDERS = {str(number): order for number, order in enumerate(itertools.permutations(range(BOXES)))}
"""Last number of a picture's name -> which of the record's boxes it shows, from left to right."""
HELDOUT_ONE_IN = 4
"""One picture of NLVR in four is held out, of captions too."""
MORE_QUESTIONS = 3
"""Asked about each held-out picture beside its own, in `counting_heldout_more.jsonl`."""

Row = Mapping[str, Any]


def main(argv: Sequence[str] | None = None) -> int:
    """Writes the pictures, and `align`, `sft`, `counting_train`, `counting_heldout`, `counting_heldout_more.jsonl`."""
    parser = argparse.ArgumentParser(
        prog="python -m r1v_rl.data.small_rows", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("data", type=Path, help="folder with nlvr/ and puzzlevqa/")
    parser.add_argument("--out", type=Path, default=Path("outputs/small/data"))
    options = parser.parse_args(argv)
    options.out.mkdir(parents=True, exist_ok=True)
    write_pictures(options.data, options.out)
    for name, rows in small_rows(options.data).items():
        replace_file(options.out / f"{name}.jsonl", "".join(json.dumps(row) + "\n" for row in rows).encode())
        print(f"{options.out / name}.jsonl: {len(rows)} rows")
    return 0


def small_rows(data: Path) -> dict[str, list[dict[str, Any]]]:
    """Name of the file -> its rows.

    Raises:
        DataError: If a file is missing, or a counting question does not agree with the scene's record.
    """
    scenes = {_number(row): row for row in _read(data / "nlvr" / "dev.jsonl")}
    counting = list(_read(data / "nlvr" / "counting_dev.jsonl"))
    puzzles = list(_read(data / "puzzlevqa" / "dev.jsonl"))
    train: list[dict[str, Any]] = []
    heldout: list[dict[str, Any]] = []
    more: list[dict[str, Any]] = []
    questions = sorted({row["problem"] for row in counting})
    for row in counting:
        if (scene := scenes.get(_number(row))) is None:
            raise DataError(f"row {row['id']}: nlvr/dev.jsonl has no scene of this number")
        (heldout if _is_heldout(row) else train).append(_counting_row(row, scene))
        if _is_heldout(row):
            more += [_counting_row(other, scene) for other in _other_questions(row, scene, questions)]
    captions = [row for scene in scenes.values() if not _is_heldout(scene) for row in _box_captions(scene)]
    captions += [
        _row({"id": f"{row['id']}-caption"}, _pictures(row), DESCRIBE, completion=row["caption"]) for row in puzzles
    ]
    solved = [
        _row(row, _pictures(row), f"{row['problem']} {INSTRUCTION}", answer=row["answer"])
        | {"completion": f"<think>{row['explanation']} {row['deduction']}</think>\n\\boxed{{{row['answer']}}}"}
        for row in puzzles
    ]
    return {
        "align": captions,
        "sft": [*train, *solved],
        "counting_train": train,
        "counting_heldout": heldout,
        "counting_heldout_more": more,
    }


def write_pictures(data: Path, out: Path) -> None:
    """NLVR's boxes and PuzzleVQA's pictures below `out`, by the names that the rows give."""
    for row in tqdm(list(_read(data / "nlvr" / "dev.jsonl")), desc="NLVR's boxes", unit="picture"):
        (image,) = row["images"]
        with Image.open(data / "nlvr" / image) as picture:
            for number, name in enumerate(_pictures(row)):
                (out / name).parent.mkdir(parents=True, exist_ok=True)
                left = number * STEP
                picture.convert("RGB").crop((left, 0, left + BOX, BOX)).save(out / name)
    for row in _read(data / "puzzlevqa" / "dev.jsonl"):
        for image, name in zip(row["images"], _pictures(row), strict=True):
            (out / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(data / "puzzlevqa" / image, out / name)


def shown_boxes(row: Row) -> list[Sequence[Row]]:
    """What is in the picture's boxes, from left to right; `dev-1572-0-5.png` has the last of the six orders."""
    order = Path(row["images"][0]).stem.rpartition("-")[2]
    if order not in ORDERS:
        raise DataError(f"row {row['id']}: {row['images'][0]} must end on the number, 0 to 5, of its boxes' order")
    return [row["structured_rep"][box] for box in ORDERS[order]]


def worked_count(boxes: Sequence[Sequence[Row]], wanted: str) -> tuple[str, int]:
    """(chain, count) of `black squares`, `circles`, `objects`, ...: what is in each box with its count, then the sum.

    No step of it is larger than to copy some numbers, or to add them up for one box, or two of them: a small model that
    had to give the three counts at once named what it saw and counted something else.
    """
    words = wanted.split()
    colors = [word for word in words if word in COLORS.values()]
    shapes = [word.removesuffix("s") for word in words if word not in (*COLORS.values(), "objects")]
    lines, counts = [], []
    for number, box in enumerate(boxes, start=1):
        parts = [
            n
            for (color, shape), n in _kinds(box)
            if (not colors or color in colors) and (not shapes or shape in shapes)
        ]
        lines.append(f"Box {number}: {_listed(box)}; {wanted}: {_sum(parts)}.")
        counts.append(sum(parts))
    totals = list(itertools.accumulate(counts))
    steps = [f"{before} + {n} = {after}" for before, n, after in zip(totals[:-1], counts[1:], totals[1:], strict=True)]
    return f"{' '.join(lines)} Together: {', '.join(steps)}.", totals[-1]


def _other_questions(row: Row, scene: Row, questions: Sequence[str]) -> Iterable[Row]:
    """Questions about the row's picture that it does not ask itself, drawn by its id, with the record's answers."""
    others = [question for question in questions if question != row["problem"]]
    drawn = random.Random(row["id"]).sample(others, min(MORE_QUESTIONS, len(others)))
    for number, problem in enumerate(drawn):
        _, count = worked_count(shown_boxes(scene), _wanted(problem))
        yield {**row, "id": f"{row['id']}-{number}", "problem": problem, "answer": str(count)}


def _wanted(problem: str) -> str:
    return problem.removeprefix("How many ").split(" are in the image")[0]


def _counting_row(row: Row, scene: Row) -> dict[str, Any]:
    wanted = _wanted(row["problem"])
    chain, count = worked_count(shown_boxes(scene), wanted)
    if str(count) != row["answer"]:
        raise DataError(f"row {row['id']}: the scene's record has {count} {wanted}, the answer says {row['answer']}")
    if row["images"] != scene["images"]:
        raise DataError(f"row {row['id']}: asks about {row['images'][0]}, its scene's picture is {scene['images'][0]}")
    return _row(row, _pictures(row), f"{row['problem']} {INSTRUCTION}", answer=str(count)) | {
        "completion": f"<think>{chain}</think>\n\\boxed{{{count}}}"
    }


def _box_captions(scene: Row) -> list[dict[str, Any]]:
    return [
        _row({"id": f"{scene['id']}-box-{i}"}, [picture], DESCRIBE, completion=f"{_listed(box).capitalize()}.")
        for i, (picture, box) in enumerate(zip(_pictures(scene), shown_boxes(scene), strict=True), start=1)
    ]


def _row(row: Row, pictures: Sequence[str], problem: str, **columns: str) -> dict[str, Any]:
    marks = ["<image>"] if len(pictures) == 1 else [f"Box {i}: <image>" for i in range(1, len(pictures) + 1)]
    return {"id": row["id"], "problem": "\n".join([*marks, problem]), "images": list(pictures), **columns}


def _pictures(row: Row) -> list[str]:
    """The files that the pictures of a data set's row become."""
    if not row["id"].startswith("nlvr"):
        return [f"puzzlevqa/{image}" for image in row["images"]]
    (image,) = row["images"]
    stem, _, suffix = image.rpartition(".")
    return [f"nlvr/{stem}-box-{number}.{suffix}" for number in range(1, BOXES + 1)]


def _kinds(box: Sequence[Row]) -> list[tuple[tuple[str, str], int]]:
    """((colour, shape), how many), by name."""
    return sorted(Counter((COLORS[thing["color"]], thing["type"]) for thing in box).items())


def _listed(box: Sequence[Row]) -> str:
    if not box:
        return "nothing"
    return ", ".join(f"{n} {color} {shape}{'s' if n > 1 else ''}" for (color, shape), n in _kinds(box))


def _sum(parts: Sequence[int]) -> str:
    """`0`, `3` or `1 + 2 = 3`."""
    return str(sum(parts)) if len(parts) < 2 else f"{' + '.join(map(str, parts))} = {sum(parts)}"


def _number(row: Row) -> str:
    """`dev-1572-0` of `nlvr/dev-1572-0` and of `nlvr-count/dev-1572-0`."""
    return row["id"].rpartition("/")[2]


def _is_heldout(row: Row) -> bool:
    return int(hashlib.sha1(_number(row).encode()).hexdigest(), 16) % HELDOUT_ONE_IN == 0


def _read(path: Path) -> Iterable[Row]:
    if not path.is_file():
        raise DataError(f"{path} is missing: put the files of NLVR and PuzzleVQA there, as the docstring names them")
    return [json.loads(line) for line in path.read_text().splitlines() if line.strip()]


if __name__ == "__main__":
    sys.exit(main())
