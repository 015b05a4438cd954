"""The `.pt` file: what stands where, that it is what torch would have written, and that it is whole or absent."""

import io
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from submission.dataset import dataset_file
from submission.dataset.augment import augment
from submission.dataset.dataset_file import FileSpec, verify, write_dataset
from submission.errors import OutputError
from submission.tasks import Task, load_task
from tests.conftest import TINY_TASK


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Task:
    file = tmp_path_factory.mktemp("task") / "tiny.toml"
    file.write_text(TINY_TASK)
    return load_task(str(file))


def make_rounds(count: int, task: Task, seed: int = 0) -> NDArray[np.uint8]:
    shape = (count, len(task.classes), 3, task.size, task.size)
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


@settings(max_examples=20)
@given(count=st.integers(1, 7), extra=st.integers(0, 12), dtype=st.sampled_from([torch.float32, torch.float16]))
def test_every_place_holds_its_image_or_copy(
    task: Task, tmp_path_factory: pytest.TempPathFactory, count: int, extra: int, dtype: torch.dtype
) -> None:
    path = tmp_path_factory.mktemp("out") / "tiny.pt"
    rounds, ipc = make_rounds(count, task), count + extra
    write_dataset(path, rounds, FileSpec(task, ipc, "natural", 5, dtype))
    images = torch.load(path, weights_only=True)
    assert images.dtype == dtype and images.shape == (3 * ipc, 3, 16, 16)
    pixels = images.float() * torch.tensor(task.std).view(3, 1, 1) + torch.tensor(task.mean).view(3, 1, 1)
    for position in range(len(images)):
        label, place = divmod(position, ipc)
        copy, source = divmod(place, count)
        expected = torch.from_numpy(rounds[source, label])[None]
        wanted = augment(expected, np.array([[label, source, copy]]), 5, "natural")[0] if copy else expected[0] / 255
        torch.testing.assert_close(pixels[position], wanted, atol=2e-3 if dtype == torch.float16 else 1e-5, rtol=0)


def test_the_file_is_the_archive_torch_would_have_written(task: Task, tmp_path: Path) -> None:
    path = tmp_path / "tiny.pt"
    write_dataset(path, make_rounds(3, task), FileSpec(task, 4, "paper", 0, torch.float32))
    images = torch.load(path, weights_only=True)
    buffer = io.BytesIO()
    torch.save(images, buffer)
    with zipfile.ZipFile(path) as ours, zipfile.ZipFile(buffer) as theirs:
        assert ours.testzip() is None, "checksums are right"
        by_name = [{Path(n).relative_to(Path(n).parts[0]): z.read(n) for n in z.namelist()} for z in (ours, theirs)]
        ids = [records.pop(Path(".data/serialization_id")) for records in by_name]
        assert by_name[0] == by_name[1] and len(ids[0]) == len(ids[1])
    mapped = torch.load(path, weights_only=True, mmap=True)
    assert torch.equal(mapped, images) and mapped.data_ptr() % 64 == 0


def test_a_file_larger_than_zip_s_old_limit_could_be_read(task: Task, tmp_path: Path) -> None:
    """Tiny-ImageNet at the cap is 4.9 GB: the size field of the record must be the 64-bit one."""
    path = tmp_path / "tiny.pt"
    write_dataset(path, make_rounds(1, task), FileSpec(task, 1, "paper", 0, torch.float32))
    with zipfile.ZipFile(path) as archive:
        record = next(r for r in archive.infolist() if r.filename.endswith("/data/0"))
    header = path.read_bytes()[record.header_offset : record.header_offset + 30]
    assert header[18:26] == b"\xff" * 8


def test_a_file_in_place_stays_when_writing_fails(task: Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "tiny.pt"
    write_dataset(path, make_rounds(1, task), FileSpec(task, 1, "paper", 0, torch.float32))
    before = path.read_bytes()

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(OutputError, match=r"No space left on device.*MB are needed"):
        write_dataset(path, make_rounds(2, task), FileSpec(task, 2, "paper", 0, torch.float32))
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["tiny.pt"], "nothing half-written is left"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: x[:-1].clone(), "reads back as"),
        (lambda x: x.double(), "reads back as"),
        (lambda x: x.index_fill(0, torch.tensor([5]), torch.nan), "no normalised pixels"),
        (lambda x: x.index_fill(0, torch.tensor([5]), torch.inf), "no normalised pixels"),
        (lambda x: x * 255, "no normalised pixels"),
        (torch.zeros_like, "almost black, white or grey"),
    ],
)
def test_verification_refuses(task: Task, tmp_path: Path, change: object, message: str) -> None:
    assert callable(change)
    path = tmp_path / "tiny.pt"
    spec = FileSpec(task, 4, "paper", 0, torch.float32)
    write_dataset(path, make_rounds(4, task), spec)
    torch.save(change(torch.load(path, weights_only=True)), path)
    with pytest.raises(OutputError, match=message):
        verify(path, spec)


def test_numbers_may_be_large(task: Task, tmp_path: Path) -> None:
    """A normalisation that leaves pixels as 0 to 255 is one, and float16 rounds these by more."""
    plain = replace(task, mean=(0.0, 0.0, 0.0), std=(1 / 255, 1 / 255, 1 / 255))
    write_dataset(tmp_path / "tiny.pt", make_rounds(4, task), FileSpec(plain, 8, "natural", 0, torch.float16))
    assert torch.load(tmp_path / "tiny.pt", weights_only=True).max() > 250


def test_images_of_one_colour_channel_are_images(task: Task, tmp_path: Path) -> None:
    """As those under a microscope may be."""
    rounds = make_rounds(4, task)
    rounds[:, :, [0, 2]] = 0
    write_dataset(tmp_path / "tiny.pt", rounds, FileSpec(task, 4, "natural", 0, torch.float32))
    assert torch.load(tmp_path / "tiny.pt", weights_only=True).shape == (12, 3, 16, 16)


def test_verification_notices_a_flipped_bit(task: Task, tmp_path: Path) -> None:
    path = tmp_path / "tiny.pt"
    spec = FileSpec(task, 4, "paper", 0, torch.float32)
    write_dataset(path, make_rounds(4, task), spec)
    content = bytearray(path.read_bytes())
    content[5000] ^= 1
    path.write_bytes(content)
    with pytest.raises(OutputError, match="does not read back"):
        verify(path, spec)


def test_a_file_larger_than_the_machine_s_memory_can_be_begun(tmp_path: Path) -> None:
    """A thousand classes at 224 px are 300 GB at 500 images per class: the disk has to have room for them, no more."""
    shape = (2 * psutil.virtual_memory().total // (3 * 8 * 8 * 4), 3, 8, 8)
    records = dataset_file._skeleton(tmp_path / "large.pt", shape, torch.float32)
    assert [name for name, content in records.items() if content is None] == ["large/data/0"]
    assert (tmp_path / "large.pt").stat().st_blocks * 512 < 1 << 20
