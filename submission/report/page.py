"""The page about a run: what was asked, what happened, what every class looks like. One file that needs no other."""

import base64
import hashlib
import io
import json
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from submission.dataset.dataset_file import mean_and_std
from submission.machine.disk import write_whole
from submission.report.charts import learning_curves, timeline
from submission.tasks import Task, builtin_names

TEMPLATE = "page.html.jinja"
# Images shown of a class: so many in a row, rows, and pixels of the side of one at most. Where there are so many
# classes that this were more than `MOST_TILES` images, there are fewer rows: a thousand of 64 px take about a megabyte.
COLUMNS, ROWS, TILE, MOST_TILES = 4, 3, 64, 2000
# Of WebP, 0 to 100 and 0 (fast) to 6 (small).
QUALITY, EFFORT = 80, 2


@dataclass(frozen=True)
class Card:
    """A class in the gallery: `picture` is the data URI of its images, `accuracy` is 0..1 where it was measured."""

    name: str
    prompt: str
    picture: str
    accuracy: float | None


def write_report(dataset: Path, task: Task) -> Path:
    """Writes the page beside a finished `dataset` (.pt) and its manifest (.json); returns its path (.html).

    Raises OSError where these cannot be read, and OutputError.
    """
    manifest, page = json.loads(dataset.with_suffix(".json").read_bytes()), dataset.with_suffix(".html")
    images = torch.load(dataset, mmap=True, weights_only=True)
    write_whole(page, render(task, manifest, images).encode())
    return page


def render(task: Task, manifest: Mapping[str, Any], images: Tensor, results: Mapping[str, Any] | None = None) -> str:
    """The page as HTML.

    `images` are the dataset's, normalised [classes * IPC, 3, H, W], of which only those shown are touched; `results`
    are what `evaluate` found, as in its `results.json`.
    """
    warnings, found = list(manifest["warnings"]), results["tasks"][task.name] if results else None
    if found:
        warnings[:0] = [finding["text"] for finding in found["findings"]]
        if found["class_order"] == "suspect":
            warnings.insert(0, found["class_order_audit"]["statement"])
    shown = shown_positions(len(task.classes), manifest["ipc"], manifest["rounds"])
    return (
        templates(Path(__file__).parent)
        .get_template(TEMPLATE)
        .render(
            task=task,
            run=manifest,
            warnings=warnings,
            command=_command(manifest),
            timeline=timeline(manifest),
            rows=shown.shape[0],
            columns=shown.shape[1],
            copies=manifest["ipc"] > manifest["rounds"],
            cards=list(_cards(task, manifest, images, shown, found["accuracy_by_class"] if found else {})),
            results=results,
            found=found,
            curves=learning_curves(found["learning_curves"], found["runs"], found["chance"]) if found else None,
        )
    )


def templates(*folders: Path) -> jinja2.Environment:
    """Those of pages, in any of the folders. What they are given is escaped."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(folders),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["sha256"] = _sha256
    return environment


def shown_positions(classes: int, ipc: int, rounds: int) -> NDArray[np.int64]:
    """Which of a class's `ipc` images are shown, by their places in the file: int [rows, columns], -1 for none.

    A row is a generated image and the copies of it, or, where there are no copies, just generated images.
    """
    row, column = np.indices((ROWS, COLUMNS))
    grid = row + rounds * column if ipc > rounds else column + COLUMNS * row
    grid[(grid >= ipc) | (row >= max(1, MOST_TILES // (COLUMNS * classes))) | (row >= rounds)] = -1
    return grid[(grid >= 0).any(1)][:, (grid >= 0).any(0)]


def _cards(
    task: Task, manifest: Mapping[str, Any], images: Tensor, shown: NDArray[np.int64], accuracies: Mapping[str, float]
) -> Iterator[Card]:
    ipc, style = manifest["ipc"], manifest["prompts"]
    # A report that is made anew does not know what a user's file said.
    known = style != "own" or task.own_prompts
    prompts = task.prompts(style)[0] if known else [""] * len(task.classes)
    mean, std = (figure.numpy() for figure in mean_and_std(task))
    values = images.numpy()  # whose lookup stays on this thread, where torch's would wait for others
    for one, prompt in zip(task.classes, prompts, strict=True):
        pixels = values[np.maximum(shown, 0) + one.index * ipc].astype(np.float32) * std + mean
        pixels[shown < 0] = 1
        yield Card(one.name.replace("_", " "), prompt, picture(pixels), accuracies.get(one.name))


def picture(tiles: NDArray[np.float32]) -> str:
    """Images [rows, columns, 3, H, W] in 0..1 side by side, each of `TILE` pixels at most, as a data URI."""
    rows, columns, _, height, width = tiles.shape
    sheet = tiles.transpose(0, 3, 1, 4, 2).reshape(rows * height, columns * width, 3)
    image = Image.fromarray((255 * sheet).round().clip(0, 255).astype(np.uint8))
    side = min(TILE, width)
    if side < width:
        image = image.resize((columns * side, rows * side), Image.Resampling.BOX)
    file = io.BytesIO()
    image.save(file, format="WEBP", quality=QUALITY, method=EFFORT)
    return "data:image/webp;base64," + base64.b64encode(file.getvalue()).decode()


def _command(manifest: Mapping[str, Any]) -> str:
    """What asks for the same images again."""
    guidance, file = manifest["guidance"], manifest["prompts_file"]
    options = {
        "budget": f"{manifest['budget_seconds']:g}s",
        "model": manifest["model"],
        "steps": manifest["steps"],
        "guidance": guidance and ":".join(f"{strength:g}" for strength in guidance),
        "resolution": manifest["resolution"],
        "decoder": manifest["decoder"]["name"],
        "prompts": file or manifest["prompts"],
        "seed": manifest["seed"],
        "pda": manifest["pda"],
        "aug-per-image": manifest["copies_per_image"],
        "max-ipc": manifest["max_ipc"],
        "select": None if manifest["pool"] else "none",
        "pool": manifest["pool"],
        "dtype": manifest["dtype"],
    }
    # A file of prompts may have those of all the run's tasks, and then of no fewer.
    tasks = manifest["tasks"] if file else [manifest["task"]]
    words = ["./run.sh", *(task if task in builtin_names() else f"{task}.toml" for task in tasks)]
    return shlex.join([*words, *(f"--{name}={value}" for name, value in options.items() if value is not None)])


def _sha256(text: str) -> str:
    """As a Content-Security-Policy names a script that may run."""
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
