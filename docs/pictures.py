"""The pictures of the docs, drawn from the code itself: `python docs/pictures.py` writes them all.

Each is a function that gives the inside of an SVG file and its height; all are 720 wide.
"""

import ast
import itertools
import sys
import tomllib
from html import escape
from pathlib import Path

import grimp
import numpy as np

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from bigbatch.commands.plan_time import times  # noqa: E402
from bigbatch.config.file import load_config  # noqa: E402
from bigbatch.layout.time_model import Speeds  # noqa: E402

# What is statistical, and what is hardware; safe for the common colour blindnesses.
GREEN, ORANGE = "var(--green)", "var(--orange)"
STYLE = """<style>
svg { --fg: #1b1f24; --soft: #6e7781; --bg: #ffffff; --green: #0b6e4f; --orange: #b5500d; }
@media (prefers-color-scheme: dark) {
  svg { --fg: #e6edf3; --soft: #8b949e; --bg: #161b22; --green: #5fd3a4; --orange: #f0a35e; }
}
text { font: 14px system-ui, sans-serif; fill: var(--fg); }
.soft { fill: var(--soft); }
.small { font-size: 12px; }
.name { font-weight: 600; }
</style>"""


def text(x, y, said, kind="", anchor="start", fill=None):
    """A line of text."""
    style = f' style="fill: {fill}"' if fill else ""
    where = f'x="{x:g}" y="{y:g}" class="{kind}" text-anchor="{anchor}"'
    return f"<text {where}{style}>{escape(said)}</text>"


def box(x, y, width, height, colour="var(--soft)", opacity=0.18):
    """A box with its border."""
    shape = f'x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="4"'
    return f'<rect {shape} fill="{colour}" fill-opacity="{opacity}" stroke="{colour}"/>'


def path(d, colour="var(--soft)", width=1.5, more=""):
    """A line."""
    return f'<path d="{d}" fill="none" stroke="{colour}" stroke-width="{width}" {more}/>'


def arrow(x, y, to_x):
    """A short arrow to the right."""
    return path(f"M{x} {y}H{to_x}m-6 -4 6 4 -6 4")


def curve(points, colour, more=""):
    """A line through points."""
    return path("M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in points), colour, 2, more)


def architecture():
    """The rooms, and an arc for each that knows another: all of them go down."""
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]
    layers = contracts["contracts"][0]["layers"]
    rooms = layers[: layers.index("schedule") + 1]
    graph, known = grimp.build_graph("bigbatch"), set()
    for module in sorted(graph.modules - {"bigbatch", "bigbatch.__main__"}):
        for other in graph.find_modules_directly_imported_by(module) - {"bigbatch"}:
            known.add((module.split(".")[1], other.split(".")[1]))
    parts, y_of = [], {room: 34 + 44 * number for number, room in enumerate(rooms)}
    colours = {"schedule": GREEN, "layout": ORANGE}
    for room, y in y_of.items():
        face = ROOT / "bigbatch" / room / "__init__.py"
        said = "The command: flags are read, verbs are called."
        if face.exists():
            said = ast.get_docstring(ast.parse(face.read_text("utf-8"))).partition("\n\n")[0]
        said = said.replace("\n", " ").replace("`", "").partition(". ")[0].rstrip(".")
        first, _, second = said.partition(": ")
        said = (second or first).partition(";")[0]
        parts += [box(10, y - 20, 573, 36, colours.get(room, "var(--soft)"))]
        parts += [text(20, y + 3, room, "name"), text(112, y + 3, said, "small soft")]
    for room, other in sorted(known):
        if room in y_of and other in y_of and room != other:
            high, low, colour = y_of[room], y_of[other] - 6, colours.get(other, "var(--soft)")
            reach = 583 + 0.4 * (low - high)
            d = f"M583 {high}C{reach:.0f} {high} {reach:.0f} {low} 585 {low}m7 -3 -7 3 7 4"
            parts.append(path(d, colour, 1.2, 'opacity="0.75"'))
    y = max(y_of.values()) + 44
    ground = ", ".join(layers[len(rooms) :])
    parts.append(text(20, y, f"Below them, known to all: {ground}.", "soft"))
    return parts, y + 20


def hours():
    """Hours of a run by devices, of the recipe and of its growing plan, by the time model."""
    config = load_config("imagenet_inception_resnet_v2:increase")
    found = times(config, 2560, Speeds(examples_per_s=400.0, allreduce_gbps=400.0))
    most = max(scaling.devices for scaling in found.growing)

    def x(devices):
        return 70 + 560 * np.log2(devices / 16) / np.log2(most / 16)

    def y(seconds):
        return 30 + 200 * np.log2(6 * 3600 / seconds) / np.log2(60)

    parts = []
    for name, colour, scalings in (
        ("the recipe", ORANGE, found.original),
        ("growing", GREEN, found.growing),
    ):
        points = [(x(s.devices), y(s.seconds)) for s in scalings if s.devices >= 16]
        parts.append(curve(points, colour, "" if colour == GREEN else 'stroke-dasharray="6 4"'))
        parts.append(text(points[-1][0], points[-1][1] - 10, name, "name", "end", colour))
    for label, value in (
        ("6 h", 6),
        ("2 h", 2),
        ("40 min", 2 / 3),
        ("20 min", 1 / 3),
        ("8 min", 8 / 60),
    ):
        parts += [text(60, y(3600 * value) + 5, label, "soft", "end")]
    for devices in (16, 64, 256, 1024, 4096):
        parts += [text(x(devices), 268, f"{devices:,}", "soft", "middle")]
    return [*parts, text(350, 290, "devices", "soft", "middle")], 305


def noise_scale():
    """Learning rate, batch size and noise scale of CIFAR-10's recipe, decaying and growing."""
    plans = {name: load_config(f"cifar10:{name}").plan for name in ("decay", "increase")}
    parts = []
    rows = (("learning rate", (0.0005, 0.2)), ("batch size", (80, 8000)), ("noise scale", (1, 800)))
    for row, (label, (low, high)) in enumerate(rows):
        top = 20 + 110 * row
        parts += [box(120, top, 580, 90, opacity=0), text(112, top + 50, label, "soft", "end")]
        for (name, plan), colour, dash in zip(
            plans.items(), (ORANGE, GREEN), ("", 'stroke-dasharray="6 4"'), strict=True
        ):
            points = []
            for stage_epoch, end in itertools.pairwise((0, 60, 120, 160, 200)):
                update = int(np.searchsorted(plan.first_examples, stage_epoch * 50_000))
                row_of = plan.row(update)
                rate, size = row_of.hyper["learning_rate"], row_of.batch_size
                value = (rate, size, rate * 50_000 / (size * 0.1))[row]
                y = top + 90 - 90 * np.log(value / low) / np.log(high / low)
                points += [(120 + 2.9 * stage_epoch, y), (120 + 2.9 * end, y)]
            parts.append(curve(points, colour, dash))
            if row == 1:
                y = points[-1][1] + (-8 if name == "decay" else 18)
                parts.append(text(690, y, name, "name", "end", colour))
    ticks = [text(120 + 2.9 * e, 345, str(e), "soft", "middle") for e in (0, 60, 120, 160, 200)]
    return [*parts, *ticks, text(410, 365, "epochs", "soft", "middle")], 380


def ghost_batches():
    """One update of 64 examples, cut for one device, two, and four in two microbatches."""
    parts = []
    for row, (label, cuts) in enumerate(
        (
            ("the update: 64 examples, ghost batches of 8", []),
            ("1 device, 1 microbatch", [64]),
            ("2 devices, 1 microbatch", [32, 32]),
            ("2 devices, 2 microbatches", [16, 16, 16, 16]),
        )
    ):
        top = 40 + 80 * row
        parts.append(text(20, top - 10, label, "soft"))
        for ghost in range(8):
            parts.append(box(20 + 85 * ghost, top, 79, 24, GREEN))
            examples = f"{8 * ghost} to {8 * ghost + 7}"
            parts.append(text(60 + 85 * ghost, top + 17, examples, "", "middle"))
        first = 0
        for number, size in enumerate(cuts):
            x, width = 16 + 85 * first / 8, 85 * size / 8 - 4
            device = f"device {number % min(len(cuts), 2)}"
            parts.append(path(f"M{x:g} {top + 30}v6h{width:g}v-6", ORANGE))
            parts.append(text(x + width / 2, top + 51, device, "", "middle", ORANGE))
            first += size
    return parts, 350


def line():
    """The line between statistics and hardware."""
    parts = [box(10, 20, 700, 100, GREEN, 0.06), box(10, 190, 700, 100, ORANGE, 0.06)]
    parts += [text(24, 44, "statistics: decide the result", "name", fill=GREEN)]
    parts += [text(24, 214, "hardware: may change at every start", "name", fill=ORANGE)]
    for number, (above, below) in enumerate(
        (
            ("recipe", "devices"),
            ("batch size, lr, m", "processes"),
            ("ghost batch", "microbatch"),
            ("plan", "layout"),
            ("seed", "threads"),
        )
    ):
        x = 24 + 136 * number
        parts += [box(x, 62, 126, 36, GREEN), text(x + 63, 85, above, "", "middle")]
        parts += [box(x, 232, 126, 36, ORANGE), text(x + 63, 255, below, "", "middle")]
    parts.append(path("M10 155H710", "var(--fg)", 2, 'stroke-dasharray="2 4"'))
    parts.append(text(360, 147, "nothing crosses this line", "soft", "middle"))
    return parts, 305


def exact_sums():
    """An addend becomes two integer words; words are added, and carried, in any order."""
    parts = [box(10, 40, 150, 40), text(85, 65, "an addend r", "", "middle"), arrow(164, 60, 200)]
    parts += [text(85, 30, "a float32", "soft", "middle")]
    parts += [box(206, 40, 150, 40, GREEN), text(281, 65, "high word", "", "middle")]
    parts += [box(360, 40, 150, 40, GREEN), text(435, 65, "low word: 30 bits", "", "middle")]
    parts += [text(358, 30, "r / u, rounded to a whole number", "soft", "middle")]
    parts += [arrow(514, 60, 550), box(556, 40, 154, 40, ORANGE)]
    parts += [text(633, 65, "integer sums", "", "middle")]
    parts += [text(633, 30, "any order, any device", "soft", "middle")]
    parts += [path("M435 84c0 40 -154 40 -154 4m-4 7 4 -7 5 6", GREEN)]
    parts += [text(358, 136, "what leaves the low word is carried", "soft", "middle")]
    return parts, 155


PICTURES = (architecture, hours, noise_scale, ghost_batches, line, exact_sums)


def svg(picture):
    """A whole file."""
    parts, height = picture()
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 720 {height:g}" role="img">'
    title = escape(picture.__doc__.splitlines()[0])
    back = '<rect width="100%" height="100%" rx="8" fill="var(--bg)"/>'
    return "\n".join([head, f"<title>{title}</title>", STYLE, back, *parts, "</svg>"]) + "\n"


if __name__ == "__main__":
    for picture in PICTURES:
        file = Path(__file__).parent / "pictures" / f"{picture.__name__}.svg"
        file.write_text(svg(picture), encoding="utf-8")
