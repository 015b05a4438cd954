"""Charts as SVG that is part of a page: text stays text, and colours are the page's own CSS variables."""

import io
import logging
import re
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure

logging.getLogger("matplotlib").setLevel(logging.ERROR)  # it would complain where it cannot keep a cache

# A chart is drawn in colours that stand for the variables of the page.
INK, MUTED, LINE, ACCENT, SECOND = (f"#00000{digit}" for digit in range(1, 6))
VARIABLES = {INK: "ink", MUTED: "muted", LINE: "line", ACCENT: "accent", SECOND: "second"}
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "font.size": 9,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": LINE,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": LINE,
    "xtick.color": LINE,
    "ytick.color": LINE,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
}
# Inches. Narrow, so that a phone's screen need not shrink the text.
WIDTH = 5.4
# Phases that have a colour; the others are grey.
PHASE_COLOURS = {"generate": ACCENT, "write and verify": SECOND}
# The share of the budget from which on a run is shown up to its deadline.
NEARLY_ALL = 0.8


def timeline(manifest: Mapping[str, Any]) -> Markup:
    """A run from its start on: phases, images per second, batch size, rounds done and planned; thin lines mark where
    the plan changed."""
    budget, ended = manifest["budget_seconds"], manifest["elapsed_seconds"]
    elapsed, images = manifest["progress"]["elapsed"], manifest["progress"]["images"]
    plans = manifest["plans"]
    with matplotlib.rc_context({**STYLE, "svg.hashsalt": "timeline"}):
        figure = Figure(figsize=(WIDTH, 5.2), layout="constrained")
        phases, paces, batches, rounds = figure.subplots(4, 1, sharex=True, height_ratios=(0.35, 2, 1, 2))
        for name, (begin, end) in manifest["phases_from_to"].items():
            phases.barh(0, end - begin, left=begin, height=1, color=PHASE_COLOURS.get(name, MUTED), edgecolor=LINE)
        phases.set(yticks=[], ylim=(-0.5, 0.5))
        put_title(phases, "phases")
        if len(elapsed) > 1:
            pace = np.diff(images) / np.diff(elapsed)
            paces.stairs(pace, elapsed, color=ACCENT, fill=True, alpha=0.15)
            paces.stairs(pace, elapsed, color=ACCENT, baseline=None)
        paces.set_ylim(bottom=0)
        put_title(paces, "images per second")
        batches.step(elapsed, manifest["progress"]["batch_size"], where="post", color=ACCENT)
        batches.set_yscale("log", base=2)
        batches.yaxis.set_major_formatter("{x:g}")
        batches.minorticks_off()
        put_title(batches, "batch size")
        done = [count / manifest["classes"] for count in images]
        rounds.fill_between(elapsed, done, color=ACCENT, alpha=0.15, linewidth=0)
        rounds.plot(elapsed, done, color=ACCENT, label="done")
        if plans:
            at = [*(plan["elapsed"] for plan in plans), max(elapsed[-1], plans[-1]["elapsed"])]
            planned = [*(plan["rounds"] for plan in plans), plans[-1]["rounds"]]
            rounds.step(at, planned, where="post", color=SECOND, linewidth=1, label="planned")
            rounds.plot(at[:-1], planned[:-1], "o", color=SECOND, markersize=3)
        rounds.set_ylim(bottom=0)
        rounds.yaxis.get_major_locator().set_params(integer=True)
        rounds.legend(loc="lower right", frameon=False)
        put_title(rounds, "rounds")
        rounds.set_xlabel("seconds since the start")
        rounds.set_xlim(0, budget if ended > NEARLY_ALL * budget else ended)
        for axes in (paces, rounds):
            for plan in plans:
                axes.axvline(plan["elapsed"], color=SECOND, linewidth=0.8, alpha=0.3)
        if ended > NEARLY_ALL * budget:
            phases.set_title("deadline", loc="right", fontsize=9, color=SECOND, pad=3)
            for axes in (phases, paces, batches, rounds):
                axes.axvline(budget, color=SECOND, linestyle=":", clip_on=False)
        return as_svg(figure, "Timeline of the run: phases, images per second, batch size, rounds done and planned.")


def learning_curves(curves: Sequence[Mapping[str, Sequence[float]]], tested: Sequence[float], chance: float) -> Markup:
    """Accuracy against SGD steps: in training, a line per run, and on the test images at the end."""
    with matplotlib.rc_context({**STYLE, "svg.hashsalt": "curves"}):
        figure = Figure(figsize=(WIDTH, 3), layout="constrained")
        axes = figure.subplots()
        for number, (curve, accuracy) in enumerate(zip(curves, tested, strict=True)):
            in_training, on_test = ("in training", "on test images") if number == 0 else (None, None)
            axes.plot(curve["step"], curve["accuracy"], color=ACCENT, alpha=0.7, label=in_training)
            axes.plot(curve["step"][-1], accuracy, "o", color=SECOND, clip_on=False, label=on_test)
        axes.axhline(chance, color=MUTED, linestyle=":", label="chance")
        axes.set(xlabel="SGD steps", xlim=(0, None), ylim=(0, None))
        put_title(axes, "accuracy")
        axes.legend(loc="upper left", frameon=False)
        return as_svg(figure, "Learning curves: accuracy against SGD steps, in training and on test images.")


def put_title(axes: Axes, text: str) -> None:
    """Names what the axes show, above them."""
    axes.set_title(text, loc="left", fontsize=9, color=MUTED, pad=3)


def as_svg(figure: Figure, label: str) -> Markup:
    """The figure as an element of a page, which is to style it, named `label` for those who do not see it."""
    file = io.StringIO()
    figure.savefig(file, format="svg", transparent=True, metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    text = file.getvalue()
    for colour, variable in VARIABLES.items():
        text = text.replace(colour, f"var(--{variable})")
    text = re.sub(r"<defs>\s*<style.*?</defs>", "", text, flags=re.DOTALL)  # it would hold for the whole page
    text = re.sub(r"font-family: [^;]*; ", "", text)
    text = re.sub(r'<g id="[^"]*">', "<g>", text)  # ids that are the same in every chart
    # Ids of clipping paths come from addresses in memory, whatever the salt: numbered, a page is the same every time.
    for number, name in enumerate(dict.fromkeys(re.findall(r'id="(p[0-9a-f]{10})"', text))):
        text = text.replace(name, f"{matplotlib.rcParams['svg.hashsalt']}-{number}")
    box = re.search(r'viewBox="[^"]*"', text)
    assert box
    head = Markup('<svg role="img" aria-label="{}" ').format(label)
    return Markup(re.sub(r"^.*?<svg [^>]*>", f"{head}{box[0]}>", text, count=1, flags=re.DOTALL))
