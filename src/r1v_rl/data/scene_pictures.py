"""Pictures of scenes: position, size, shade and the digit's place vary, so that reading one is a vision task."""

from functools import cache
from random import Random

from PIL import Image, ImageDraw, ImageFont

from r1v_rl.data.scene_questions import Scene, Thing

PICTURE_SIZE = 96
CELL_SIZE = PICTURE_SIZE // 3
_RGB = {"red": (205, 45, 45), "blue": (50, 80, 205), "green": (40, 145, 60), "yellow": (225, 190, 40)}


@cache
def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size=size)


def _jitter(rgb: tuple[int, int, int], rng: Random, amount: int) -> tuple[int, int, int]:
    return tuple(max(0, min(255, channel + rng.randint(-amount, amount))) for channel in rgb)  # type: ignore[return-value]


def _draw_thing(draw: ImageDraw.ImageDraw, thing: Thing, left: int, top: int, rng: Random) -> None:
    radius = rng.uniform(13.0, 15.0)
    slack = CELL_SIZE / 2 - radius
    x = left + CELL_SIZE / 2 + rng.uniform(-slack, slack)
    y = top + CELL_SIZE / 2 + rng.uniform(-slack, slack)
    fill = _jitter(_RGB[thing.color], rng, 18)
    digit_y = y
    if thing.shape == "circle":
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=fill)
    elif thing.shape == "square":
        side = radius * 0.88
        draw.rectangle((x - side, y - side, x + side, y + side), fill=fill)
    else:
        draw.polygon([(x, y - radius), (x - radius, y + radius * 0.9), (x + radius, y + radius * 0.9)], fill=fill)
        digit_y = y + radius * 0.28
    ink = (0, 0, 0) if thing.color == "yellow" or rng.random() < 0.2 else (255, 255, 255)
    spot = (x + rng.uniform(-0.5, 0.5), digit_y + rng.uniform(-0.5, 0.5))
    draw.text(spot, str(thing.digit), fill=ink, font=_font(rng.randint(17, 19)), anchor="mm", stroke_width=0.5)


def draw_scene(scene: Scene, rng: Random) -> Image.Image:
    """A 96x96 RGB picture of the scene."""
    shade = rng.randint(215, 250)
    picture = Image.new("RGB", (PICTURE_SIZE, PICTURE_SIZE), _jitter((shade, shade, shade), rng, 5))
    draw = ImageDraw.Draw(picture)
    for cell, thing in enumerate(scene):
        if thing:
            _draw_thing(draw, thing, cell % 3 * CELL_SIZE, cell // 3 * CELL_SIZE, rng)
    return picture


def blank_picture() -> Image.Image:
    """The picture that shows nothing: accuracy on it is what a model gets without looking."""
    return Image.new("RGB", (PICTURE_SIZE, PICTURE_SIZE), (235, 235, 235))
