#!/usr/bin/env python3
"""Draws the loss of training runs over their tokens, as an SVG: a line for the steps, points for
validations.

    tools/plot_training.py run -o loss.svg
    tools/plot_training.py runs/delta_net runs/fox -o loss.svg --smooth 20
    tools/plot_training.py --self-test
"""

import argparse
import json
import math
import sys
import tempfile
from html import escape
from pathlib import Path

WIDTH, HEIGHT = 720, 360
LEFT, RIGHT, TOP, BOTTOM = 56, 16, 16, 44
COLOURS = ["#2066a8", "#c44e23", "#3a8a4d", "#8655a6", "#a0742a", "#5b6770"]


def read(run, name, key):
    """[(tokens, value)] of the lines of a run's log that have the key."""
    path = Path(run) / "metrics" / "jsonlines" / f"{name}.jsonl"
    if not path.exists():
        return []
    lines = map(json.loads, path.read_text(encoding="utf-8").splitlines())
    return [(line["step"], line[key]) for line in lines if key in line]


def smoothed(points, count):
    """Means over the last `count` points of each."""
    result = []
    for i, (x, _) in enumerate(points):
        window = [y for _, y in points[max(0, i + 1 - count) : i + 1]]
        result.append((x, sum(window) / len(window)))
    return result


def ticks(low, high, count=6):
    """Round numbers from low to high, about `count` of them."""
    step = (high - low or 1) / count
    power = 10 ** math.floor(math.log10(step))
    step = min((m * power for m in (1, 2, 5, 10) if m * power >= step * 0.999))
    first = math.ceil(low / step - 1e-9)
    return [i * step for i in range(first, math.floor(high / step + 1e-9) + 1)]


def tokens_text(tokens):
    for unit, letter in ((1e9, "B"), (1e6, "M"), (1e3, "K")):
        if tokens >= unit:
            return f"{tokens / unit:g}{letter}"
    return f"{tokens:g}"


class Axes:
    def __init__(self, points):
        xs, ys = [x for x, _ in points], [y for _, y in points]
        self.x_range = (0, max(xs))
        margin = 0.04 * (max(ys) - min(ys) or 1)
        self.y_range = (min(ys) - margin, max(ys) + margin)

    def at(self, point):
        (x0, x1), (y0, y1) = self.x_range, self.y_range
        x = LEFT + (WIDTH - LEFT - RIGHT) * (point[0] - x0) / (x1 - x0 or 1)
        y = TOP + (HEIGHT - TOP - BOTTOM) * (y1 - point[1]) / (y1 - y0)
        return f"{x:.1f}", f"{y:.1f}"

    def draw(self):
        right, bottom = WIDTH - RIGHT, HEIGHT - BOTTOM
        for value in ticks(*self.y_range):
            _, y = self.at((0, value))
            yield f'<path class="grid" d="M{LEFT} {y}H{right}"/>'
            yield f'<text x="{LEFT - 8}" y="{y}" dy=".35em" text-anchor="end">{value:g}</text>'
        for value in ticks(*self.x_range):
            x, _ = self.at((value, self.y_range[0]))
            yield f'<text x="{x}" y="{bottom + 18}" text-anchor="middle">{tokens_text(value)}</text>'
        yield f'<path class="axis" d="M{LEFT} {TOP}V{bottom}H{right}"/>'
        middle = (LEFT + right) / 2
        yield f'<text x="{middle}" y="{HEIGHT - 8}" text-anchor="middle">tokens trained on</text>'
        yield f'<text x="{LEFT + 8}" y="{TOP + 12}">loss, nats a token</text>'


def draw(curves):
    """The SVG of [(name, steps, validations)]."""
    axes = Axes([point for _, steps, validations in curves for point in steps + validations])
    parts = list(axes.draw())
    for i, (name, steps, validations) in enumerate(curves):
        colour = COLOURS[i % len(COLOURS)]
        if steps:
            path = "L".join(" ".join(axes.at(point)) for point in steps)
            parts.append(f'<path class="line" stroke="{colour}" d="M{path}"/>')
        for point in validations:
            x, y = axes.at(point)
            parts.append(f'<circle cx="{x}" cy="{y}" r="3.5" fill="{colour}"/>')
        y = TOP + 12 + 18 * i
        label = name + (f", validation {validations[-1][1]:.3f} at the end" if validations else "")
        parts.append(f'<path stroke="{colour}" stroke-width="3" d="M{WIDTH - 300} {y - 4}h18"/>')
        parts.append(f'<text x="{WIDTH - 276}" y="{y}">{escape(label)}</text>')
    style = (
        "text{font:12px sans-serif;fill:#333}.grid{stroke:#e4e4e4}"
        ".axis{stroke:#333;fill:none}.line{fill:none;stroke-width:1.5}"
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}">\n'
        f'<style>{style}</style>\n<rect width="{WIDTH}" height="{HEIGHT}" fill="#fff"/>\n'
        + "\n".join(parts)
        + "\n</svg>\n"
    )


def self_test():
    with tempfile.TemporaryDirectory() as folder:
        logs = Path(folder) / "a<b" / "metrics" / "jsonlines"
        logs.mkdir(parents=True)
        lines = [{"step": 1000 * i, "train/loss": 5 - i} for i in range(1, 5)]
        (logs / "train.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        (logs / "val.jsonl").write_text('{"step": 4000, "val/loss": 1.5}\n')
        assert read(Path(folder) / "a<b", "train", "train/loss")[0] == (1000, 4)
        assert smoothed([(0, 1), (1, 3), (2, 5)], 2) == [(0, 1), (1, 2), (2, 4)]
        assert ticks(0, 10, 5) == [0, 2, 4, 6, 8, 10]
        assert tokens_text(134_217_728) == "134.218M"
        svg = main([str(Path(folder) / "a<b"), "-o", str(Path(folder) / "x.svg")])
        assert "a&lt;b, validation 1.500 at the end" in svg and svg.count("<circle") == 1
    return "plot_training: right"


def main(arguments):
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("runs", nargs="*", help="output_dir of each run")
    parser.add_argument("-o", "--output", default="loss.svg")
    parser.add_argument("--smooth", type=int, default=1, help="steps that a point is the mean of")
    parser.add_argument("--self-test", action="store_true")
    options = parser.parse_args(arguments)
    if options.self_test:
        return self_test()
    curves = []
    for run in options.runs:
        steps = smoothed(read(run, "train", "train/loss"), max(1, options.smooth))
        curves.append((Path(run).resolve().name, steps, read(run, "val", "val/loss")))
    if not any(steps or validations for _, steps, validations in curves):
        sys.exit("plot_training: the runs have logged no losses")
    svg = draw(curves)
    Path(options.output).write_text(svg, encoding="utf-8")
    return svg


if __name__ == "__main__":
    answer = main(sys.argv[1:])
    if not answer.startswith("<svg"):
        print(answer)
