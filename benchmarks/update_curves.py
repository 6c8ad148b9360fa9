"""How the update of one group grows with completions, tokens and tiles: ours, TRL's, and the cost model beside them.

    python benchmarks/update_curves.py [--quick] [--json FILE] [--svg FILE]

Cases, models and the gate (loss and gradients agree before any time counts) are those of `benchmarks/one_group.py`,
against TRL's best settings. The model is `flops`, divided by the speed of the trunk's bare matrix products, which
is measured beside each case; its error is that of the ratio, TRL's time to ours. One curve varies G, one C, one T.
"""

import argparse
import json
import os
import statistics
from importlib.metadata import version
from pathlib import Path
from typing import Any

import r1v_rl  # isort: skip  # noqa: F401  (before torchvision is imported)
import torch
from one_group import SHAPES, Baseline, Case, Ours, Work, flops, gate, matmul_rate, seconds

from r1v_rl.tracking.charts import line_chart

CURVES = {
    "completions G (T=5, C=64)": [(Case(5, 64, g), g) for g in (2, 4, 8, 16, 32)],
    "tokens C (T=1, G=8)": [(Case(1, c), c) for c in (64, 256, 512, 1024)],
    "tiles T (C=64, G=8)": [(Case(t, 64), t) for t in (1, 5, 13)],
}
QUICK = {"tokens C (T=1, G=8)": CURVES["tokens C (T=1, G=8)"][:2]}
COLOURS = {"TRL": "#c0504d", "TRL, model": "#e6b8b7", "ours": "#1f497d", "ours, model": "#a5b8d3"}
WIDTH, HEIGHT = 340, 190
STYLE = (
    "text{font:11px sans-serif;fill:#555}.grid{stroke:#ddd}.axis{stroke:#999}.line{fill:none;stroke-width:2}"
    + "".join(f".line.c{i}{{stroke:{colour}}}" for i, colour in enumerate(COLOURS.values()))
)


def measure(case: Case, pairs: int) -> dict[str, Any]:
    """Median seconds of both sides, pictures seen anew, with each pair's ratio, ABBA; and what the model says."""
    shape = SHAPES["tiny"]
    work = Work(shape, case, torch.float32)
    theirs, ours = Baseline(work), Ours(work)
    gate(theirs, ours, torch.float32)
    times: dict[str, list[float]] = {"ours": [], "baseline": []}
    for pair in range(pairs):
        order = [("ours", ours), ("baseline", theirs)]
        for name, side in order if pair % 2 == 0 else order[::-1]:
            times[name].append(seconds(side.step))
    ratios = [b / a for a, b in zip(times["ours"], times["baseline"], strict=True)]
    prompt = theirs.batch["prompt_ids"].shape[1]
    rate = matmul_rate(shape, prompt + case.completions * case.tokens, torch.float32)
    modelled = {name: flops(shape, case, prompt, shared=name == "ours", tower=True) / rate for name in times}
    return {
        "case": str(case),
        **{name: statistics.median(values) for name, values in times.items()},
        "ratio_median": statistics.median(ratios),
        "ratio_min": min(ratios),
        "ratio_max": max(ratios),
        "model_ours": modelled["ours"],
        "model_baseline": modelled["baseline"],
        "model_ratio": modelled["baseline"] / modelled["ours"],
    }


def drawing(curves: dict[str, list[tuple[int, dict]]]) -> str:
    """The curves side by side, seconds over what varies."""
    parts = [f"<style>{STYLE}</style>"]
    keys = dict(zip(COLOURS, ("baseline", "model_baseline", "ours", "model_ours"), strict=True))
    for i, (title, rows) in enumerate(curves.items()):
        chart = line_chart({name: [(x, row[key]) for x, row in rows] for name, key in keys.items()})
        place = f'x="{i * WIDTH}" y="20" width="{WIDTH}" height="{HEIGHT}"'
        parts.append(chart.replace("<svg ", f"<svg {place} ", 1))
        parts.append(f'<text x="{i * WIDTH + 46}" y="14">seconds, over {title}</text>')
    for i, (name, colour) in enumerate(COLOURS.items()):
        parts.append(f'<rect x="{46 + 110 * i}" y="{HEIGHT + 28}" width="14" height="4" fill="{colour}"/>')
        parts.append(f'<text x="{66 + 110 * i}" y="{HEIGHT + 34}">{name}</text>')
    size = f"{WIDTH * len(curves)} {HEIGHT + 44}"
    return f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {size}">{"".join(parts)}</svg>\n'


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two points of one curve, one pair each")
    parser.add_argument("--pairs", type=int, default=2)
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    parser.add_argument("--svg", type=Path, help="draw the curves into this file")
    options = parser.parse_args()
    print("versions " + ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "trl")))
    print(f"{torch.get_num_threads()} threads of {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}, float32")
    print(f"{'case':<20}{'ours s':>9}{'TRL s':>9}{'ratio':>8}{'range':>14}{'model':>8}{'error':>8}")
    measured: dict[Case, dict] = {}
    curves: dict[str, list[tuple[int, dict]]] = {}
    for title, points in (QUICK if options.quick else CURVES).items():
        for case, x in points:
            if case not in measured:
                row = measured[case] = measure(case, 1 if options.quick else options.pairs)
                spread = f"{row['ratio_min']:.2f}-{row['ratio_max']:.2f}"
                error = row["model_ratio"] / row["ratio_median"] - 1
                print(f"{row['case']:<20}{row['ours']:>9.2f}{row['baseline']:>9.2f}{row['ratio_median']:>8.2f}"
                      f"{spread:>14}{row['model_ratio']:>8.2f}{error:>8.0%}", flush=True)  # fmt: skip
            curves.setdefault(title, []).append((x, measured[case]))
    if options.json:
        options.json.write_text(json.dumps(list(measured.values()), indent=1) + "\n")
    if options.svg:
        options.svg.write_text(drawing(curves))


if __name__ == "__main__":
    main()
