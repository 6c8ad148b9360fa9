"""What is told of a picture from its pixels: made-up drawings whose content is known, and NLVR's own scene records."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

from r1v_rl.data.images import load_image
from r1v_rl.distill.drawing import _regions, look

NLVR = Path(__file__).parents[1] / "assets" / "nlvr"
NLVR_COLORS = {"#0099ff": "blue", "Yellow": "yellow", "Black": "black"}


def drawn(*polygons, size=(200, 200), ground="white", outline=None):
    """A picture of (sides, middle, radius, degrees, colour); 0 sides is a circle."""
    image = Image.new("RGB", size, ground)
    draw = ImageDraw.Draw(image)
    for sides, middle, radius, turned, color in polygons:
        if sides:
            draw.regular_polygon((*middle, radius), sides, rotation=turned, fill=color, outline=outline)
        else:
            draw.circle(middle, radius, fill=color, outline=outline)
    return image


def flooded(mask):
    """Regions of a mask by filling one after the other."""
    labels, count = np.full(mask.shape, -1), 0
    for start in np.ndindex(mask.shape):
        todo = [start] if labels[start] < 0 else []
        count += len(todo)
        while todo:
            y, x = todo.pop()
            if labels[y, x] >= 0:
                continue
            labels[y, x] = count - 1
            for b, a in ((y + 1, x), (y - 1, x), (y, x + 1), (y, x - 1)):
                if 0 <= b < mask.shape[0] and 0 <= a < mask.shape[1] and mask[b, a] == mask[y, x]:
                    todo.append((b, a))
    return labels


@pytest.mark.parametrize("seed", range(4))
def test_regions_are_those_of_a_flood_fill(seed):
    mask = np.random.default_rng(seed).random((30, 37)) < 0.55
    found, expected = _regions(mask[..., None].astype(np.int16) * 255), flooded(mask)
    pairs = np.unique(np.stack([found.ravel(), expected.ravel()]), axis=1)
    assert pairs.shape[1] == found.max() + 1 == expected.max() + 1, "one to one"


@pytest.mark.parametrize("turned", [0, 17, 45, 90])
@pytest.mark.parametrize(("sides", "name"), [(3, "triangle"), (4, "square"), (5, "pentagon"), (6, "hexagon")])
def test_a_shape_has_its_name_however_it_is_turned(sides, name, turned):
    for radius in (25, 40, 80):
        (shape,) = look(drawn((sides, (100, 100), radius, turned, "green"), outline="black")).shapes
        assert shape.names - {"circle"} == {name} and shape.colors == {"green"}, radius
    assert "circle" not in shape.names


@pytest.mark.parametrize("radius", [5, 8, 20, 80])
def test_a_circle_is_one_at_every_size(radius):
    (shape,) = look(drawn((0, (100, 100), radius, 0, "blue"))).shapes
    assert "circle" in shape.names and not shape.names & {"triangle", "square"}


def test_ground_lines_frames_and_letters_are_no_shapes():
    image = drawn((4, (60, 100), 30, 0, "yellow"))
    draw = ImageDraw.Draw(image)
    draw.rectangle((110, 0, 130, 199), fill="grey")  # from edge to edge
    draw.line((140, 150, 190, 190), fill="red", width=3)
    draw.rectangle((140, 20, 190, 70), outline="purple", width=3)
    draw.text((150, 80), "L", fill="black", font_size=50)
    assert sorted(next(iter(shape.colors)) for shape in look(image).shapes) == [
        "white",
        "yellow",
    ]  # and the frame's inside


@pytest.mark.parametrize(
    ("color", "names"),
    [
        ("crimson", {"red"}), ("#ea9999", {"red", "pink"}), ("#f6b26b", {"orange"}), ("#ffd966", {"yellow"}),
        ("#93c47d", {"green"}), ("#0099ff", {"blue"}), ("navy", {"blue"}), ("#8e7cc3", {"purple"}),
        ("purple", {"purple"}), ("saddlebrown", {"brown"}), ("#d9ead3", {"green"}), ("black", {"black"}),
        ("#eeeeee", {"grey"}),
    ],
)  # fmt: skip
def test_colors_have_their_names(color, names):
    assert set(look(drawn((4, (100, 100), 40, 0, color))).colors) - {"white"} == names


def test_a_speck_is_no_color_and_no_shape():
    seen = look(drawn((4, (100, 100), 3, 45, "red")))
    assert set(seen.colors) == {"white"} and seen.shapes == () and seen.is_blank


def test_a_photograph_has_colors_but_no_shapes():
    noise = np.random.default_rng(0).integers(0, 256, (300, 1200, 3), dtype=np.uint8)
    seen = look(Image.fromarray(noise))
    assert seen.shapes is None and {"red", "green", "blue"} <= set(seen.colors) and not seen.is_blank


def test_scenes_are_read_as_nlvr_recorded_them():
    rows = [json.loads(line) for line in (NLVR / "dev.jsonl").read_text().splitlines()]
    for row in rows:
        objects = [item for box in row["structured_rep"] for item in box]
        recorded = Counter((item["type"], NLVR_COLORS[item["color"]]) for item in objects)
        shapes = look(load_image(NLVR / row["images"][0])).shapes
        for (name, color), count in recorded.items():
            assert sum(name in shape.names and color in shape.colors for shape in shapes) == count, row["id"]
        assert len(shapes) == len(objects) > 0
