"""Line charts and interval charts as inline SVG, drawn by hand: nothing is loaded, every text is escaped."""

import math
from collections.abc import Mapping, Sequence
from html import escape

Points = Sequence[tuple[float, float]]

_WIDTH, _HEIGHT = 340, 190
_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 12, 12, 24
_MAX_POINTS = 600


def line_chart(series: Mapping[str, Points]) -> str:
    """An SVG of y over step, one line a series; in a long run the raw values are faint, their moving average strong."""
    drawn = {name: _thinned([p for p in points if math.isfinite(p[1])]) for name, points in series.items()}
    everything = [point for points in drawn.values() for point in points]
    if not everything:
        return ""
    x_low, x_high = _span([x for x, _ in everything])
    y_low, y_high = _span([y for _, y in everything])
    y_ticks = nice_ticks(y_low, y_high)
    y_low, y_high = min(y_low, y_ticks[0]), max(y_high, y_ticks[-1])

    def place(x: float, y: float) -> tuple[float, float]:
        across = (x - x_low) / (x_high - x_low) * (_WIDTH - _LEFT - _RIGHT)
        up = (y - y_low) / (y_high - y_low) * (_HEIGHT - _TOP - _BOTTOM)
        return _LEFT + across, _HEIGHT - _BOTTOM - up

    parts = [_horizontal_axis(x_low, x_high, place(0, y_low)[1], lambda x: place(x, y_low)[0])]
    parts += [_grid_line(place(x_low, tick)[1], tick) for tick in y_ticks]
    for index, (name, points) in enumerate(drawn.items()):
        parts.append(_line(name, points, f"c{index % 6}", place))
    return _svg(_WIDTH, _HEIGHT, "".join(parts))


def interval_chart(rows: Sequence[tuple[str, float, float | None, float | None]]) -> str:
    """An SVG of shares between 0 and 1: a dot and, where known, its interval for each (label, value, low, high)."""
    width, row_height, left = 560, 34, 150
    height = row_height * len(rows) + 30

    def place(share: float) -> float:
        return left + min(max(share, 0.0), 1.0) * (width - left - 60)

    parts = []
    for share in (0, 0.25, 0.5, 0.75, 1):
        parts.append(f'<line class="grid" x1="{place(share):.1f}" x2="{place(share):.1f}" y1="6" y2="{height - 22}"/>')
        parts.append(
            f'<text class="tick" x="{place(share):.1f}" y="{height - 6}" text-anchor="middle">{share:.0%}</text>'
        )
    for index, (label, value, low, high) in enumerate(rows):
        y = 6 + row_height * (index + 0.5)
        parts.append(f'<text class="label" x="{left - 12}" y="{y + 4:.1f}" text-anchor="end">{escape(label)}</text>')
        end = place(value)
        if low is not None and high is not None:
            end = place(high)
            parts.append(f'<line class="bar c{index % 6}" x1="{place(low):.1f}" x2="{end:.1f}" y1="{y}" y2="{y}"/>')
        parts.append(f'<circle class="dot c{index % 6}" cx="{place(value):.1f}" cy="{y}" r="5.5"/>')
        parts.append(f'<text class="value" x="{end + 12:.1f}" y="{y + 4:.1f}">{value:.1%}</text>')
    return _svg(width, height, "".join(parts))


def bar_chart(bars: Sequence[tuple[str, float]]) -> str:
    """An SVG of one bar for each (label, value of 0 or more); nothing where there is none."""
    if not bars:
        return ""
    ticks = nice_ticks(0.0, max(value for _, value in bars) or 1.0)
    width, height = (_WIDTH - _LEFT - _RIGHT) / len(bars), _HEIGHT - _TOP - _BOTTOM
    parts = [_grid_line(_HEIGHT - _BOTTOM - tick / ticks[-1] * height, tick) for tick in ticks]
    for index, (label, value) in enumerate(bars):
        x, tall = _LEFT + index * width, value / ticks[-1] * height
        parts.append(
            f'<rect class="dot c0" x="{x + 0.1 * width:.1f}" y="{_HEIGHT - _BOTTOM - tall:.1f}" '
            f'width="{0.8 * width:.1f}" height="{tall:.1f}"><title>{escape(label)}: {number(value)}</title></rect>'
        )
        parts.append(
            f'<text class="tick" x="{x + width / 2:.1f}" y="{_HEIGHT - 8}" text-anchor="middle">{escape(label)}</text>'
        )
    return _svg(_WIDTH, _HEIGHT, "".join(parts))


def scatter_chart(series: Mapping[str, Points]) -> str:
    """An SVG of the points of each series, at most `_MAX_POINTS`, evenly chosen; nothing where there is none."""
    drawn = {name: points[:: math.ceil(len(points) / _MAX_POINTS) or 1] for name, points in series.items()}
    everything = [point for points in drawn.values() for point in points]
    if not everything:
        return ""
    x_ticks, y_ticks = (nice_ticks(*_span([point[axis] for point in everything])) for axis in (0, 1))

    def place(x: float, y: float) -> tuple[float, float]:
        across = (x - x_ticks[0]) / (x_ticks[-1] - x_ticks[0]) * (_WIDTH - _LEFT - _RIGHT)
        up = (y - y_ticks[0]) / (y_ticks[-1] - y_ticks[0]) * (_HEIGHT - _TOP - _BOTTOM)
        return _LEFT + across, _HEIGHT - _BOTTOM - up

    parts = [_grid_line(place(x_ticks[0], tick)[1], tick) for tick in y_ticks]
    for tick in x_ticks:
        x = place(tick, y_ticks[0])[0]
        parts.append(f'<text class="tick" x="{x:.1f}" y="{_HEIGHT - 8}" text-anchor="middle">{number(tick)}</text>')
    for index, points in enumerate(drawn.values()):
        places = (place(*point) for point in points)
        parts += [f'<circle class="dot c{index % 6}" cx="{x:.1f}" cy="{y:.1f}" r="2"/>' for x, y in places]
    return _svg(_WIDTH, _HEIGHT, "".join(parts))


def nice_ticks(low: float, high: float, count: int = 5) -> list[float]:
    """About `count` round numbers (1, 2 or 5 times a power of ten apart) that cover low to high."""
    raw = (high - low) / count
    magnitude = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * magnitude for factor in (1, 2, 5, 10) if factor * magnitude >= raw * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(index * step, 12) for index in range(first, last + 1)]


def number(value: float) -> str:
    """A number as an axis or a tile shows it: three or four digits that matter."""
    if value == 0:
        return "0"
    if abs(value) >= 1e6 or abs(value) < 1e-3:
        mantissa, exponent = f"{value:.1e}".split("e")
        return f"{mantissa.removesuffix('.0')}e{int(exponent)}"
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def _span(values: list[float]) -> tuple[float, float]:
    """Lowest and highest value, moved apart where they are one."""
    low, high = min(values), max(values)
    if high - low <= 1e-12 * max(abs(low), abs(high), 1e-30):
        margin = abs(low) * 0.1 or 0.5
        return low - margin, high + margin
    return low, high


def _thinned(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """At most `_MAX_POINTS` points, each the mean of its neighbours in a long run."""
    size = math.ceil(len(points) / _MAX_POINTS)
    if size <= 1:
        return points
    blocks = [points[start : start + size] for start in range(0, len(points), size)]
    return [(block[-1][0], sum(y for _, y in block) / len(block)) for block in blocks]


def _smoothed(points: Points) -> list[tuple[float, float]]:
    """Centred moving average over about a twelfth of the run, over what is there at its ends."""
    half = len(points) // 24
    smooth = []
    for index, (x, _) in enumerate(points):
        window = points[max(0, index - half) : index + half + 1]
        smooth.append((x, sum(y for _, y in window) / len(window)))
    return smooth


def _line(name: str, points: Points, colour: str, place) -> str:
    if not points:
        return ""
    title = f"<title>{escape(name)}: {number(points[0][1])} to {number(points[-1][1])}</title>"
    if len(points) == 1:
        x, y = place(*points[0])
        return f'<circle class="dot {colour}" cx="{x:.1f}" cy="{y:.1f}" r="3">{title}</circle>'
    smooth = _smoothed(points)
    raw = "" if smooth == list(points) else f'<path class="raw {colour}" d="{_path(points, place)}"/>'
    return f'{raw}<path class="line {colour}" d="{_path(smooth, place)}">{title}</path>'


def _path(points: Points, place) -> str:
    return "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in (place(*point) for point in points))


def _grid_line(y: float, tick: float) -> str:
    return (
        f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
        f'<text class="tick" x="{_LEFT - 6}" y="{y + 3.5:.1f}" text-anchor="end">{number(tick)}</text>'
    )


def _horizontal_axis(low: float, high: float, y: float, place) -> str:
    ticks = [tick for tick in nice_ticks(low, high) if low <= tick <= high and tick == int(tick)]
    labels = "".join(
        f'<text class="tick" x="{place(tick):.1f}" y="{_HEIGHT - 8}" text-anchor="middle">{int(tick)}</text>'
        for tick in ticks
    )
    return f'<line class="axis" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>{labels}'


def _svg(width: int, height: int, body: str) -> str:
    return f'<svg viewBox="0 0 {width} {height}" role="img">{body}</svg>'
