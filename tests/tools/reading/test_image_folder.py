"""Test images of people's own: of any size and format, cut and resized; hostile ones refused by name."""

import os
import struct
import unicodedata
import zlib
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from submission.dataset.dataset_file import mean_and_std
from submission.errors import InputFileError
from submission.tasks import Task, load_task
from tools.reading import image_folder
from tools.reading.image_folder import find_images, read_images
from tools.reading.real_images import find_test_images

COLOURS = {"apple": (255, 0, 0), "pear": (0, 255, 0), "plum": (0, 0, 255)}


@pytest.fixture
def task(task_file: Path) -> Task:
    return load_task(str(task_file))


def make_images(folder: Path) -> None:
    """An image a class of its own size, mode and format, and another of apples further down."""
    for (name, colour), size, suffix in zip(
        COLOURS.items(), [(40, 20), (9, 33), (16, 16)], ["png", "gif", "webp"], strict=True
    ):
        (folder / name).mkdir(parents=True)
        image = Image.new("RGB", size, colour)
        image.save(folder / name / f"1.{suffix}", lossless=True)
    (folder / "apple/more").mkdir()
    Image.new("L", (100, 300), 255).save(folder / "apple/more/2.PNG")
    (folder / "apple/.DS_Store").write_bytes(b"not an image")


@pytest.mark.parametrize("place", ["tiny", "."])
def test_a_folder_per_class(task: Task, tmp_path: Path, place: str) -> None:
    make_images(tmp_path / "truth" / place)
    (tmp_path / "truth" / place / "another class").mkdir()
    found = find_test_images(tmp_path / "truth", task)
    assert found.labels.tolist() == [0, 0, 1, 2] and found.images.shape == (4, 3, 16, 16)
    mean, std = mean_and_std(task)
    pixels = (found.images * std + mean) * 255
    assert torch.equal(pixels.round()[:, :, 8, 8], torch.tensor([(255, 0, 0), (255,) * 3, (0, 255, 0), (0, 0, 255)]))


LEFT_BEHIND = (
    ".hidden/1.png",
    ".ipynb_checkpoints/1-checkpoint.png",
    "@eaDir/1.png/SYNOPHOTO_THUMB_M.png",
    "__MACOSX/._1.png",
    "._1.png",
    "$RECYCLE.BIN/1.png",
    "#recycle/1.png",
    "lost+found/1.png",
    "Thumbs.db",
    "desktop.ini",
    "n01443537_boxes.txt",
    "notes.md",
    "no ending",
)


@pytest.mark.parametrize("name", LEFT_BEHIND)
def test_what_systems_and_programs_leave_is_passed_over(name: str, task: Task, tmp_path: Path) -> None:
    make_images(tmp_path)
    file = tmp_path / "pear" / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(b"no image")
    found = find_test_images(tmp_path, task)
    assert found.labels.tolist() == [0, 0, 1, 2]
    assert len(find_images(tmp_path)) == 4, "init reads them by the same rule"


def test_links_are_followed_once_and_odd_names_of_files_are_names(task: Task, tmp_path: Path) -> None:
    make_images(tmp_path / "real")
    (tmp_path / "linked").mkdir()
    for name in COLOURS:
        (tmp_path / "linked" / name).symlink_to(tmp_path / "real" / name)
    (tmp_path / "real/pear/round").symlink_to(tmp_path / "linked/pear")  # in a circle
    Image.new("RGB", (9, 9)).save(tmp_path / "real/plum/@user $1.jpg")
    assert find_test_images(tmp_path / "linked", task).labels.tolist() == [0, 0, 1, 2, 2]
    assert len(find_images(tmp_path / "linked")) == 5


def test_a_folder_that_cannot_be_read_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_images(tmp_path)
    scandir = os.scandir

    def refuse(path: str) -> object:
        if str(path).endswith("more"):
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr("os.scandir", refuse)  # root may read everything
    with pytest.raises(PermissionError, match="more"):
        find_images(tmp_path)


def test_a_folder_s_name_may_be_spelt_in_another_normal_form(task_file: Path, tmp_path: Path) -> None:
    """As a Mac's file system spells it."""
    task_file.write_text(task_file.read_text("utf-8").replace('"pear"', '"poiré"'), "utf-8")
    make_images(tmp_path)
    (tmp_path / "pear").rename(tmp_path / unicodedata.normalize("NFD", "poiré"))
    assert find_test_images(tmp_path, load_task(str(task_file))).labels.tolist() == [0, 0, 1, 2]


def test_a_folder_may_be_called_by_its_wordnet_id(task_file: Path, tmp_path: Path) -> None:
    task_file.write_text(task_file.read_text().replace('name = "pear"', 'name = "pear", wnid = "n07767847"'))
    make_images(tmp_path / "truth")
    (tmp_path / "truth/pear").rename(tmp_path / "truth/n07767847")
    assert find_test_images(tmp_path / "truth", load_task(str(task_file))).labels.tolist() == [0, 0, 1, 2]


def read_image(file: Path, size: int) -> NDArray[np.uint8]:
    """As [size, size, 3]."""
    image: NDArray[np.uint8] = read_images([file], size)[0].permute(1, 2, 0).numpy()
    return image


def test_the_middle_is_cut_out_and_antialiased(tmp_path: Path) -> None:
    stripes = np.zeros((64, 192, 3), np.uint8)
    stripes[:, 64:128:2] = 255  # as wide as the middle square, too fine for its size
    Image.fromarray(stripes).save(tmp_path / "a.png")
    image = read_image(tmp_path / "a.png", 8)
    assert image.shape == (8, 8, 3) and np.abs(image[:, 2:-2].astype(int) - 127).max() < 20


def test_a_photograph_lies_as_its_camera_was_held(tmp_path: Path) -> None:
    pixels = np.zeros((16, 16, 3), np.uint8)
    pixels[:8] = 255
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    Image.fromarray(pixels).save(tmp_path / "a.png", exif=exif)
    assert read_image(tmp_path / "a.png", 16)[12, 8, 0] == 255


def bomb(width: int, height: int) -> bytes:
    """A PNG of a few bytes that claims to be so large."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(b"")), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data)) for name, data in chunks
    )


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "cannot identify"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "cannot identify"),
        (bomb(60_000, 60_000), "more than 89 million pixels: make it smaller"),
        (bomb(12_000, 12_000), "more than 89 million pixels: make it smaller"),
        (bomb(64, 64), "no image that can be read"),
    ],
)
def test_hostile_files_are_refused_by_name(tmp_path: Path, content: bytes, words: str) -> None:
    (tmp_path / "a.png").write_bytes(content)
    before = psutil.Process().memory_info().rss
    with pytest.raises(InputFileError, match=rf"a\.png: .*{words}") as caught:
        read_image(tmp_path / "a.png", 16)
    assert "\n" not in str(caught.value) and psutil.Process().memory_info().rss - before < 50e6


def test_a_library_s_remarks_are_not_for_the_reader(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    palette = Image.linear_gradient("L").convert("P")
    palette.save(tmp_path / "a.png", transparency=bytes(range(200)))
    assert read_image(tmp_path / "a.png", 16).shape == (16, 16, 3)
    assert not recwarn.list


def test_16_bits_and_pipes_are_refused(tmp_path: Path) -> None:
    Image.fromarray(np.zeros((9, 9), np.uint16)).save(tmp_path / "deep.png")
    with pytest.raises(InputFileError, match=r"deep\.png: .*pixels of mode I;16 are not read"):
        read_image(tmp_path / "deep.png", 16)
    os.mkfifo(tmp_path / "pipe.png")
    with pytest.raises(InputFileError, match=r"pipe\.png: .*not a file"):
        read_image(tmp_path / "pipe.png", 16)


def test_what_is_missing_is_named(task: Task, tmp_path: Path) -> None:
    make_images(tmp_path)
    (tmp_path / "pear/1.gif").unlink()
    with pytest.raises(InputFileError, match=r"pear: there are no images of class 'pear'"):
        find_test_images(tmp_path, task)
    (tmp_path / "pear").rename(tmp_path / "pears")
    with pytest.raises(InputFileError, match=r"class 'pear' of tiny has no folder there \(did you mean 'pears'\?\)"):
        find_test_images(tmp_path, task)


def test_more_than_memory_holds_is_refused_beforehand(
    task: Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_images(tmp_path)
    monkeypatch.setattr(image_folder, "MEMORY_SHARE", 1e-9)
    with pytest.raises(InputFileError, match=r"its 4 images at 16 px take .* GB of memory"):
        find_test_images(tmp_path, task)
