"""The page about a run: of a real one, with a task whose words try to be more than words."""

import base64
import hashlib
import io
import json
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.nn import functional

from submission import cli
from submission.dataset.dataset_file import mean_and_std
from submission.report.page import render, shown_positions
from submission.tasks import Task, TaskClass, load_task
from tests import browser

HOSTILE = "</li><script>document.title = 'taken'</script>"
TASK = """
name = "pets"
title = "Pets & <b>more</b>"
size = 16
mean = [0.5, 0.4, 0.3]
std = [0.2, 0.25, 0.3]
max_ipc = 6
classes = [
  { index = 0, name = "house_cat" },
  { index = 1, name = "House dog", described = "<img src=x onerror=\\"document.title = 'taken'\\">" },
  { index = 2, name = "%s" },
]
"""
SCORE: dict[str, Any] = {
    "accuracy_mean": 0.4321,
    "accuracy_std": 0.01,
    "runs": [0.4421, 0.4221],
    "chance": 1 / 3,
    "published": None,
    "steps": 12,
    "class_order": "ok",
    "class_order_audit": {"statement": "class order: ok & sound"},
    "accuracy_by_class": {"house_cat": 0.2, "House dog": 0.9},
    "findings": [],
    "learning_curves": [{"step": [6, 12], "loss": [1.0, 0.5], "accuracy": [0.3, 0.5]}] * 2,
}


@dataclass(frozen=True)
class Made:
    """A run's task, manifest, images and page."""

    task: Task
    manifest: dict[str, Any]
    images: Tensor
    page: Path

    def page_with(self, score: dict[str, Any] | None = None, **changes: object) -> str:
        """The page of this run, had its manifest been otherwise."""
        results = {"tasks": {"pets": score}, "protocol": "official", "seed": 0} if score else None
        return render(self.task, self.manifest | changes, self.images, results)


@dataclass
class Elements(HTMLParser):
    """The elements of a page with their attributes, what scripts it has, and the rest of its text."""

    page: str
    found: list[tuple[str, dict[str, str | None]]] = field(default_factory=list)
    scripts: list[str] = field(default_factory=list)
    text: str = ""

    def __post_init__(self) -> None:
        super().__init__()
        self.feed(self.page)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attributes)))

    def handle_data(self, data: str) -> None:
        if self.lasttag == "script" and self.cdata_elem:
            self.scripts.append(data)
        else:
            self.text += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.found if name == tag]


@pytest.fixture(scope="module")
def made(checkpoint_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Made:
    folder = tmp_path_factory.mktemp("report")
    file = folder / "pets.toml"
    file.write_text(TASK % HOSTILE)
    options = ["--model", str(checkpoint_folder), "--output", str(folder), "--max-ipc", "5", "--pda", "paper"]
    options += ["--select", "none"]
    assert cli.main([str(file), *options]) == 0
    manifest = json.loads((folder / "pets.json").read_text())
    return Made(load_task(str(file)), manifest, torch.load(folder / "pets.pt", mmap=True), folder / "pets.html")


def test_it_tells_what_was_asked_and_what_happened(made: Made) -> None:
    page = Elements(made.page.read_text())
    for text in ("Pets & <b>more</b>", "3 classes, 5 images of 16 px", "prompts are longer", "generate", "paper"):
        assert text in page.text
    assert f"torch {made.manifest['versions']['torch']}" in page.text
    assert all(digest in page.text for digest in made.manifest["checkpoint"]["sha256"].values())
    assert "./run.sh pets.toml --budget=600s" in page.text and "--seed=0" in page.text


def test_the_command_asks_for_what_was_asked_for(made: Made) -> None:
    assert not {"--steps", "--guidance"} & set(Elements(made.page.read_text()).text.split("="))
    of_one: dict[str, Any] = {"steps": 4, "guidance": [1.0, 3.0], "prompts": "own", "prompts_file": "my words.toml"}
    of_one |= {"max_pool": 10_000, "pool": 1234, "sharpening_steps": 800}
    text = Elements(made.page_with(**of_one, tasks=["cifar100", "pets"])).text
    (command,) = re.findall(r"\./run\.sh .*", text)
    options = cli.build_parser().parse_args(shlex.split(command)[1:])
    assert options.tasks == ["cifar100", "pets.toml"], "whose prompts are in the same file"
    assert (options.steps, options.guidance, options.prompts) == (4, (1.0, 3.0), Path("my words.toml"))
    assert options.pool == 1234, "as many as there was time for"
    assert "chosen from 1,234 and sharpened" in text


def test_the_page_needs_no_other_file(made: Made) -> None:
    page = Elements(made.page_with(SCORE))
    for tag, attributes in page.found:
        for name, value in attributes.items():
            if name in ("src", "href", "xlink:href", "srcset", "poster", "data", "action"):
                assert value and value.startswith(("data:image/", "#")), f"{tag} {name}={value}"
    assert "@import" not in page.page and "url(http" not in page.page
    assert not page.all("link") and not page.all("iframe")


def test_words_of_a_task_stay_words(made: Made) -> None:
    page = Elements(made.page_with({**SCORE, "findings": [{"text": HOSTILE}]}, warnings=[HOSTILE]))
    assert page.text.count(HOSTILE) >= 3, "as a class, a finding and a warning"
    (script,) = page.scripts
    assert not any(name.startswith("on") for _, attributes in page.found for name in attributes)
    assert len(page.all("img")) == 3 and not page.all("b")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = page.all("meta")[1]["content"]
    assert policy and policy.startswith("default-src 'none'") and f"script-src 'sha256-{digest}'" in policy


def test_warnings_come_first(made: Made) -> None:
    suspect = {**SCORE, "class_order": "suspect", "class_order_audit": {"statement": "class order: SUSPECT"}}
    text = Elements(made.page_with(suspect, warnings=["too slow", "out of memory"])).text
    order = [text.index(words) for words in ("SUSPECT", "too slow", "out of memory", "images per class (IPC)")]
    assert order == sorted(order) and "No warnings" not in text
    assert "No warnings" in made.page_with(warnings=[])


def test_a_score_is_shown_where_there_is_one(made: Made) -> None:
    without, page = (Elements(made.page_with(score)).text for score in (None, SCORE))
    for text in ("43.21%", "0.4321 ± 0.0100", "class order: ok & sound", "90% recognised"):
        assert text in page and text not in without
    assert page.index("0.20") < page.index("0.90"), "the worst first"


def test_a_job_stopped_before_it_generated_anything_has_a_page(made: Made) -> None:
    """With the rounds of the run that it resumed."""
    nothing: dict[str, list[int]] = {"elapsed": [], "images": [], "batch_size": []}
    page = Elements(made.page_with(progress=nothing, plans=[], decoder={**made.manifest["decoder"], "fidelity_db": {}}))
    assert "Nothing cheaper was measured" in page.text and len(page.all("svg")) == 1


@pytest.mark.parametrize(
    ("ipc", "rounds", "expected"),
    [
        (1, 1, [[0]]),
        (5, 1, [[0, 1, 2, 3]]),
        (5, 2, [[0, 2, 4], [1, 3, -1]]),
        (500, 400, [[0, 400], [1, 401], [2, 402]]),
        (500, 500, [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]),
        (6, 9, [[0, 1, 2, 3], [4, 5, -1, -1]]),
    ],
)
def test_generated_images_have_their_copies_beside_them(ipc: int, rounds: int, expected: list[list[int]]) -> None:
    assert shown_positions(100, ipc, rounds).tolist() == expected
    assert shown_positions(1000, ipc, rounds).tolist() == expected[:1]


@pytest.mark.parametrize("rounds", [5, 2])
def test_pictures_show_the_images_of_their_class(made: Made, rounds: int) -> None:
    ipc = made.manifest["ipc"]
    shown = shown_positions(3, ipc, rounds)
    mean, std = mean_and_std(made.task)
    pixels = (255 * (made.images.float() * std + mean)).numpy().reshape(3, ipc, 3, 16, 16)
    for label, image in enumerate(Elements(made.page_with(rounds=rounds)).all("img")):
        picture = decode(image["src"])
        assert picture.shape == (16 * shown.shape[0], 16 * shown.shape[1], 3)
        for row, column in np.argwhere(shown >= 0):
            tile = picture[16 * row : 16 * row + 16, 16 * column : 16 * column + 16].transpose(2, 0, 1)
            errors = np.abs(pixels[label] - tile).mean((1, 2, 3))
            assert errors.argmin() == shown[row, column]


def decode(address: str | None) -> NDArray[np.uint8]:
    assert address
    content = base64.b64decode(address.removeprefix("data:image/webp;base64,"))
    return np.array(Image.open(io.BytesIO(content)))


def test_a_thousand_large_classes_stay_a_page_that_can_be_mailed(made: Made) -> None:
    names = [TaskClass(index, f"class {index}", "label", "described") for index in range(1000)]
    task = replace(made.task, size=128, classes=tuple(names))
    coarse = torch.rand(1, 3, 7, 7, generator=torch.Generator().manual_seed(0))
    image = functional.interpolate(coarse, size=(128, 128), mode="bicubic")
    page = render(task, {**made.manifest, "classes": 1000, "ipc": 2}, image.expand(2000, -1, -1, -1))
    assert page.count("<img ") == 1000 and len(page) < 8e6


@pytest.fixture(scope="module")
def window(tmp_path_factory: pytest.TempPathFactory) -> Iterator[browser.Browser]:
    if reason := browser.missing():
        pytest.skip(reason)
    with browser.chromium(tmp_path_factory.mktemp("browser")) as window:
        yield window


@pytest.fixture(params=["run", "score"])
def page(request: pytest.FixtureRequest, made: Made, tmp_path: Path) -> Path:
    file = tmp_path / "page.html"
    file.write_text(made.page_with(SCORE if request.param == "score" else None, warnings=["x" * 200]))
    return file


@pytest.mark.parametrize("width", [390, 1280])
def test_a_browser_shows_it_without_complaint(window: browser.Browser, page: Path, width: int) -> None:
    window.open(page, width, 800)
    assert window.complaints() == []
    assert window.ask("return document.title").startswith("Pets & <b>more</b>"), "nothing of the task was run"
    decoded = "return Promise.all([...document.images].map((image) => image.decode().then(() => image.naturalWidth)))"
    assert len(widths := window.ask(decoded)) == 3 and min(widths) >= 16
    assert window.ask("return document.documentElement.scrollWidth") <= width, "nothing reaches beyond the screen"


def test_the_search_is_found_by_keyboard_and_filters(window: browser.Browser, page: Path) -> None:
    window.open(page, 1280, 800)
    cards = "[...document.querySelectorAll('#classes > li')]"
    visible = f"return {cards}.filter((card) => card.offsetHeight).map((card) => card.dataset.name)"
    assert len(window.ask(visible)) == 3
    for _ in range(20):
        window.type(browser.TAB)
        assert window.ask("return getComputedStyle(document.activeElement).outlineStyle") != "none", "the focus shows"
        if window.ask("return document.activeElement.id") == "search":
            break
    window.type("HOUSE")
    assert window.ask(visible) == ["house cat", "house dog"]
    window.type("_c")
    assert window.ask(visible) == ["house cat"]
    assert window.ask("return document.querySelector('#count').value") == "1 of 3"
    window.type("zzz")
    assert window.ask(visible) == []


def test_it_follows_the_reader_s_colours(window: browser.Browser, page: Path) -> None:
    def contrast(*, dark: bool) -> tuple[float, float]:
        window.open(page, 1280, 800, dark=dark)
        ask = "const s = getComputedStyle({}); return s.{}.match(/\\d+/g).slice(0, 3).map(Number)"
        paper = window.ask(ask.replace("{}", "document.body", 1).replace("{}", "backgroundColor"))
        chart = window.ask(ask.replace("{}", "document.querySelector('svg text')", 1).replace("{}", "fill"))
        return sum(paper) / 3, sum(chart) / 3

    (light, on_light), (dark, on_dark) = contrast(dark=False), contrast(dark=True)
    assert on_light < light - 100 and on_dark > dark + 100, "text in charts, too"
