"""A recipe's files are fetched once, at the pinned revision, none that is not used, and no others pass for them."""

import hashlib
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from submission.model.checkpoint import WEIGHTS, inspect, weight_digests
from submission.model.hub import wanted
from submission.model.recipe import load_recipe
from tools import fetch_weights

TURBO = load_recipe("sdxl-turbo")


@pytest.fixture
def copy(checkpoint_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(checkpoint_folder, tmp_path / "copy"))


@pytest.fixture
def recipe(checkpoint_folder: Path, tmp_path: Path) -> Path:
    """SDXL-Turbo's, with the tests' own small checkpoint as what is published."""
    digests = weight_digests(inspect(checkpoint_folder, "test"))
    known = "".join(f'"{name}" = "{digest}"\n' for name, digest in digests.items())
    file = tmp_path / "small.toml"
    file.write_text(f'base = "{TURBO.base}"\nrevision = "{TURBO.revision}"\n[sha256]\n{known}')
    return file


@pytest.fixture
def parted(tmp_path: Path) -> Path:
    """Two repositories, no digests."""
    file = tmp_path / "parted.toml"
    file.write_text(
        'base = "some/base"\nlicence = "MIT"\n[unet]\nrepository = "some/parts"\nfile = "unet.safetensors"\n'
        '[sampling]\nscheduler = "EulerDiscreteScheduler"\nsteps = 1\n'
    )
    return file


@pytest.fixture(autouse=True)
def hub(monkeypatch: pytest.MonkeyPatch, checkpoint_folder: Path) -> list[tuple[str, Any]]:
    """A hub that has the small checkpoint, and its UNet, under every name; what it is asked for, with the revision."""
    asked: list[tuple[str, Any]] = []
    unet = checkpoint_folder / "unet/diffusion_pytorch_model.fp16.safetensors"

    def snapshot_download(name: str, *, revision: str, local_dir: Path, allow_patterns: list[str], **_: object) -> str:
        asked.append((name, revision))
        for file in checkpoint_folder.rglob("*"):
            path = file.relative_to(checkpoint_folder)
            if file.is_file() and any(path.match(pattern) for pattern in allow_patterns):
                (local_dir / path).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(file, local_dir / path)
        return str(local_dir)

    def hf_hub_download(name: str, file: str, *, local_dir: Path, **_: object) -> str:
        asked.append((name, file))
        return str(shutil.copy(unet, local_dir / file))

    def model_info(*_: object, **__: object) -> SimpleNamespace:
        names = [str(file.relative_to(checkpoint_folder)) for file in checkpoint_folder.rglob("*") if file.is_file()]
        return SimpleNamespace(
            siblings=[SimpleNamespace(rfilename=n, size=10**9) for n in [*names, "unet.safetensors"]]
        )

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", hf_hub_download)
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", model_info)
    return asked


def test_files_that_are_there_are_checked_without_the_hub(copy: Path, recipe: Path, hub: list[object]) -> None:
    assert fetch_weights.main([str(recipe), str(copy)]) == 0
    assert hub == [] and not (copy / "SHA256SUMS").exists(), "all is published"


def test_what_is_missing_is_fetched_at_the_pinned_revision(
    copy: Path, recipe: Path, hub: list[object], capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.rmtree(copy / "unet")
    assert fetch_weights.main([str(recipe), str(copy)]) == 0
    assert hub == [(TURBO.base, TURBO.revision)] and inspect(copy, "test")
    assert "4.0 GB of weights" in capsys.readouterr().out


def test_nothing_is_fetched_that_is_not_used_and_what_is_unknown_is_written_down(
    parted: Path, tmp_path: Path, hub: list[object], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "weights"
    assert fetch_weights.main([str(parted), str(folder)]) == 0
    assert hub == [("some/base", None), ("some/parts", "unet.safetensors")]
    assert "4.0 GB of weights" in (said := capsys.readouterr().out) and "licence: MIT" in said
    assert not list((folder / "unet").glob("*.safetensors")) and (folder / "unet.safetensors").exists()
    assert len((folder / "SHA256SUMS").read_text().splitlines()) == 4
    assert fetch_weights.main([str(parted), str(folder)]) == 0 and len(hub) == 2
    content = bytearray((folder / "unet.safetensors").read_bytes())
    content[-1] ^= 1
    (folder / "unet.safetensors").write_bytes(content)
    assert fetch_weights.main([str(parted), str(folder)]) == 4
    assert "unet.safetensors is another file than when it was fetched" in capsys.readouterr().err


def test_what_is_kept_may_be_as_sha256sum_writes_it(parted: Path, tmp_path: Path) -> None:
    folder = tmp_path / "weights"
    assert fetch_weights.main([str(parted), str(folder)]) == 0
    sums = folder / "SHA256SUMS"
    lines = sums.read_text().splitlines()
    sums.write_text("".join(f"{line.replace('  ', ' *')}\r\n" for line in lines))
    assert fetch_weights.main([str(parted), str(folder)]) == 0
    sums.write_text(f"{'0' * 64}{lines[0][64:]}\n")
    assert fetch_weights.main([str(parted), str(folder)]) == 4


@pytest.mark.parametrize("content", [b"\xff\xfe", b"12 unet.safetensors\n"])
def test_damaged_sums_are_said(
    content: bytes, parted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "weights"
    assert fetch_weights.main([str(parted), str(folder)]) == 0
    (folder / "SHA256SUMS").write_bytes(content)
    assert fetch_weights.main([str(parted), str(folder)]) == 4
    assert "SHA256SUMS" in (said := capsys.readouterr().err) and "remove it, and what is there is written down" in said


def test_a_file_that_lies_elsewhere_is_held_to_its_digest(
    checkpoint_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "parts").mkdir()
    unet = shutil.copy(checkpoint_folder / "unet/diffusion_pytorch_model.fp16.safetensors", tmp_path / "parts/unet.sft")
    file = tmp_path / "mine.toml"
    text = f'base = "{checkpoint_folder}"\n[unet]\nfile = "parts/unet.sft"\nsha256 = "{{}}"\n'
    file.write_text(text.format(hashlib.sha256(Path(unet).read_bytes()).hexdigest()))
    assert fetch_weights.main([str(file), str(tmp_path / "new")]) == 0
    file.write_text(text.format("0" * 64))
    assert fetch_weights.main([str(file), str(tmp_path / "new")]) == 4
    assert f"error: {tmp_path}/parts/unet.sft is not the file as published" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["sd-trubo"], ["nonsense", "folder"]])
def test_a_name_that_is_misspelt_is_no_folder(
    arguments: list[str], hub: list[object], capsys: pytest.CaptureFixture[str]
) -> None:
    assert fetch_weights.main(arguments) == 2 and hub == []
    assert f"error: no recipe is called {arguments[0]!r}: there are dmd2-sdxl" in capsys.readouterr().err


def test_of_several_weights_those_that_are_used_are_fetched(
    monkeypatch: pytest.MonkeyPatch, copy: Path, parted: Path, tmp_path: Path
) -> None:
    """Repositories have them in formats, precisions and states of training that nothing here reads."""
    for file in copy.rglob("*.fp16.safetensors"):
        file.rename(file.with_name(file.name.replace(".fp16", "")))
    shutil.copy(
        copy / "vae/diffusion_pytorch_model.safetensors", copy / "vae/diffusion_pytorch_model.non_ema.safetensors"
    )
    sizes = {str(file.relative_to(copy)): 1 for file in copy.rglob("*") if file.is_file()}
    used = {f"{one}/{WEIGHTS[one]}.safetensors" for one in ("text_encoder", "text_encoder_2", "vae")}
    assert wanted(sizes, tuple(WEIGHTS), ["unet"]).keys() == used

    def download(_: str, *, local_dir: Path, allow_patterns: list[str], **__: object) -> str:
        for name in sizes:
            if any(Path(name).match(pattern) for pattern in allow_patterns):
                (local_dir / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(copy / name, local_dir / name)
        return str(local_dir)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert fetch_weights.main([str(parted), str(tmp_path / "weights")]) == 0
    fetched = {str(file.relative_to(tmp_path / "weights")) for file in (tmp_path / "weights").rglob("*.safetensors")}
    assert fetched == used | {"unet.safetensors"}


def test_a_folder_alone_gets_sdxl_turbo(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, hub: list[object], capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert fetch_weights.main(["models/turbo"]) == 4
    assert hub == [(TURBO.base, TURBO.revision)]
    assert "is not the file as published" in capsys.readouterr().err


@pytest.mark.usefixtures("hub")
def test_what_is_missing_without_a_hub_is_an_error(
    monkeypatch: pytest.MonkeyPatch, copy: Path, recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def offline(*_: object, **__: object) -> None:
        raise OSError("no network")

    monkeypatch.setattr("huggingface_hub.HfApi.model_info", offline)
    (copy / "vae/config.json").unlink()
    for folder in (copy, tmp_path / "new"):
        assert fetch_weights.main([str(recipe), str(folder)]) == 4
        assert capsys.readouterr().err.startswith(f"error: {TURBO.base} is neither a folder here nor to be had")


def test_other_weights_are_named(copy: Path, recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = copy / "vae/diffusion_pytorch_model.fp16.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    assert fetch_weights.main([str(recipe), str(copy)]) == 4
    assert f"error: {file} is not the file as published" in capsys.readouterr().err
