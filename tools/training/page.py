"""The page about a training: what it learnt from, how it went, what it draws, whether it copies. One file."""

import base64
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from markupsafe import Markup
from matplotlib.figure import Figure
from torch import Tensor

from submission.report import page as report
from submission.report.charts import ACCENT, STYLE, WIDTH, as_svg, put_title
from tools.training.copying import COPIES

TEMPLATE = "page.html.jinja"
# What the curve of a stage shows, of all that its lines in the log say.
SHOWN = {
    "vae": ("loss", "VAE: error of pictures"),
    "diffusion": ("v", "teacher: error of v"),
    "distil": ("error", "student: error to the teacher"),
    "match": ("gap", "student: gap to the teacher"),
}


def render(
    facts: Mapping[str, Any],
    command: str,
    lines: Sequence[str],
    sheets: Mapping[str, Mapping[str, bytes]],
    copies: Sequence[Tensor],
) -> str:
    """The page as HTML.

    Args:
        facts: what `training.json` says.
        command: what draws with it.
        lines: those of the log.
        sheets: PNG files by stage and task.
        copies: of each canvas samples with the training images nearest to them, uint8 `[n, 2, 3, s, s]`.
    """
    environment = report.templates(Path(__file__).parent, Path(report.__file__).parent)
    return environment.get_template(TEMPLATE).render(
        facts=facts,
        command=command,
        copies=facts["copying"]["share_of_copies"] >= COPIES,
        curves=loss_curves(lines),
        sheets={
            stage: {task: "data:image/png;base64," + base64.b64encode(png).decode() for task, png in of_stage.items()}
            for stage, of_stage in sheets.items()
            if of_stage
        },
        # The samples in the upper row, the images below.
        nearest=[report.picture(pairs.transpose(0, 1).float().div(255).numpy()) for pairs in copies],
    )


def loss_curves(lines: Sequence[str]) -> Markup | None:
    """The losses of each stage against its steps; None where there are none yet."""
    curves: dict[str, list[tuple[int, float]]] = {}
    for line in lines:
        stage, step, *losses = line.split()
        values = dict(loss.split("=") for loss in losses)
        if stage in SHOWN:
            curves.setdefault(stage, []).append((int(step), float(values[SHOWN[stage][0]])))
    if not curves:
        return None
    with matplotlib.rc_context({**STYLE, "svg.hashsalt": "losses"}):
        figure = Figure(figsize=(WIDTH, 1.5 * len(curves)), layout="constrained")
        every = figure.subplots(len(curves), squeeze=False)[:, 0]
        for axes, (stage, points) in zip(every, curves.items(), strict=True):
            axes.plot(*zip(*points, strict=True), color=ACCENT)
            put_title(axes, SHOWN[stage][1])
        every[-1].set_xlabel("steps of the stage")
        return as_svg(figure, "Losses of each stage against its steps.")
