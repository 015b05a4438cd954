"""Training: it survives kills, repeats itself, and what it leaves is what diffusers and the job load."""

import json
import os
import re
import resource
import shutil
import signal
import time
from collections.abc import Callable
from multiprocessing.context import ForkServerProcess
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from submission import cli
from submission.errors import OutputError
from submission.machine.disk import unfinished
from submission.model.checkpoint import inspect
from tests import forked
from tests.diffusers_pipeline import load_pipeline, networks_of, sample
from tests.paths import ROOT
from tools import train
from tools.init import task_text
from tools.training import arithmetic, layout
from tools.training.progress import StoppedError, load_whole, save_whole

# Tasks of two canvases: name, size of the images, classes.
TASKS = {"tiles": (32, ("red", "green", "blue")), "signs": (50, ("stop", "yield"))}
EACH = 6


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Both tasks' files, and a folder per class with images of several sizes."""
    folder = tmp_path_factory.mktemp("data")
    dice = np.random.default_rng(0)
    for name, (size, classes) in TASKS.items():
        text = task_text(name, classes, size, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25), "made up")
        (folder / f"{name}.toml").write_text(text)
        for number, one in enumerate(classes):
            (folder / name / "train" / one).mkdir(parents=True)
            for index in range(EACH):
                pixels = dice.integers(0, 256, (size + index, size + 2 * index, 3), dtype=np.uint8)
                pixels[..., number] //= 4
                Image.fromarray(pixels).save(folder / name / "train" / one / f"{index}.png")
    return folder


def test_a_launcher_s_variables_that_lack_others_are_said(data: Path, tmp_path: Path) -> None:
    arguments = [str(data / "tiles.toml"), "--data", str(data), "--output", str(tmp_path / "out"), "--device", "cpu"]
    log = tmp_path / "errors"
    process = forked.start_command(train.main, arguments, log, folder=ROOT, environment={"WORLD_SIZE": "2"})
    assert forked.end(process) == 2
    (line,) = [line for line in log.read_text().splitlines() if line.startswith("error: ")]
    assert "launcher's variables" in line and "unset" in line


def start(data: Path, output: Path, *more: str, fault: Callable[[], None] = forked.small_training) -> ForkServerProcess:
    tasks = [str(data / f"{name}.toml") for name in TASKS]
    arguments = [*tasks, "--data", str(data), "--output", str(output), "--budget", "3000", "--seed", "5", *more]
    log = output.with_suffix(".errors")
    return forked.start_command(
        train.main, [*arguments, "--device", "cpu"], log, folder=ROOT, environment={}, fault=fault
    )


def finish(process: ForkServerProcess, output: Path, code: int = 0) -> str:
    process.join(200)
    said = output.with_suffix(".errors").read_text()
    assert process.exitcode == code, said
    return said


@pytest.fixture(scope="module")
def trained(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("trained") / "out"
    finish(start(data, output), output)
    return output


def reached(output: Path, line: str) -> Callable[[], bool]:
    """Whether the log has come to a line that begins so."""
    log = output / "training.log"
    return lambda: log.exists() and re.search(f"^{line}", log.read_text(), re.MULTILINE) is not None


def test_a_training_killed_in_every_stage_goes_on_to_the_same_end(data: Path, trained: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    moments = {
        "critic": (output / "state.pt").exists,
        "vae": reached(output, "vae 2 "),
        "diffusion": reached(output, "diffusion 7 "),
        "pairs": (output / "train.html").exists,
        "distil": reached(output, "distil 2 "),
        "match": reached(output, "match 2 "),
    }
    for moment in moments.values():
        process = start(data, output, "--resume")
        forked.wait_for(moment, process)
        process.kill()
        process.join()
        # There is no checkpoint yet, or a whole one.
        if (output / "checkpoint").exists():
            load_pipeline(output / "checkpoint")
    finish(start(data, output, "--resume"), output)
    assert (output / "training.log").read_text() == (trained / "training.log").read_text()
    for name in ("unet/diffusion_pytorch_model", "text_encoder_2/model", "vae/diffusion_pytorch_model"):
        file = f"checkpoint/{name}.fp16.safetensors"
        assert (output / file).read_bytes() == (trained / file).read_bytes()


@pytest.mark.parametrize("line", ["vae 1 ", "diffusion 3 ", "distil 1 "])
def test_told_to_stop_it_leaves_what_there_is(line: str, data: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    process = start(data, output)
    forked.wait_for(reached(output, line), process)
    forked.kill(process, signal.SIGTERM)
    if line.startswith("vae"):
        assert "stopped before anything could be drawn: go on with --resume" in finish(process, output, code=3)
        assert not (output / "checkpoint").exists()
        return
    finish(process, output)
    load_pipeline(output / "checkpoint")
    assert not json.loads((output / "checkpoint/training.json").read_text())["finished"]
    assert "not finished" in (output / "train.html").read_text()
    finish(start(data, output, "--resume"), output)
    assert json.loads((output / "checkpoint/training.json").read_text())["finished"]


def test_told_to_stop_while_it_reads_it_says_so(data: Path, tmp_path: Path) -> None:
    shutil.copytree(data, tmp_path / "data")
    large = tmp_path / "large.png"
    Image.new("RGB", (3000, 3000)).save(large)
    for index in range(2000):  # a minute's work
        os.link(large, tmp_path / f"data/tiles/train/red/large_{index}.png")
    output = tmp_path / "out"
    process = start(tmp_path / "data", output)
    forked.wait_for(output.exists, process)
    time.sleep(0.5)
    forked.kill(process, signal.SIGTERM)
    assert "error: stopped while the images were read: go on with --resume" in finish(process, output, code=3)
    assert not list(output.glob("images_*"))


def test_killed_and_then_stopped_before_a_step_it_shows_what_the_teacher_had_learnt(data: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    process = start(data, output)
    forked.wait_for(reached(output, "diffusion 7 "), process)
    process.kill()
    process.join()
    leftover = unfinished(output / "state.pt")
    leftover.touch()
    teacher = load_whole(output / "state.pt")["networks"]["teacher"]
    finish(start(data, output, "--resume", fault=forked.small_training_stopped_before_a_step), output)
    shown = load_file(output / "checkpoint/unet/diffusion_pytorch_model.fp16.safetensors")
    assert all(torch.equal(shown[name], weights.half()) for name, weights in teacher.items())
    assert not leftover.exists()


@pytest.mark.parametrize(("there", "code"), [(False, 3), (True, 0)])
def test_told_to_stop_while_it_reads_a_checkpoint_in_place_is_what_there_is(
    there: bool, code: int, data: Path, tmp_path: Path, refused: "Refused", monkeypatch: pytest.MonkeyPatch
) -> None:
    def read(*_: object) -> None:
        if there:
            (tmp_path / "checkpoint").mkdir()
        raise StoppedError

    monkeypatch.setattr(train, "real_images", read)
    assert refused("--data", data, "--output", tmp_path)[0] == code


def test_what_is_left_tells_what_was_done(trained: Path) -> None:
    facts = json.loads((trained / "checkpoint/training.json").read_text())
    assert facts["resolutions"] == [32, 64] and facts["classes"]["signs"] == ["stop", "yield"]
    assert facts["images"] == {"tiles": 3 * EACH, "signs": 2 * EACH}
    assert set(facts["steps"]) == {"critic", "vae", "diffusion", "pairs", "distil", "match"}
    assert all(facts["steps"].values()) and 0 <= facts["copying"]["share_of_copies"] <= 1
    page = (trained / "train.html").read_text()
    assert page.count("data:image/png") == 2 * 3 and "<svg" in page and "yield" in page
    sheet = Image.open(trained / "samples/signs_match.png")
    assert sheet.size == (2 * 64, 2 * 64)


@pytest.mark.parametrize(
    ("canvas", "prompts"), [(32, ["a photo of a red", "photo, blue"]), (64, ["a photo of a stop"])]
)
def test_training_and_diffusers_sample_alike_at_every_size(
    canvas: int, prompts: list[str], trained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(arithmetic, "compute_dtype", lambda device: torch.float32)  # as the pipeline computes
    pipeline = load_pipeline(trained / "checkpoint")
    networks = networks_of(pipeline)
    noise = torch.randn(len(prompts), *layout.latent_shape(canvas), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        ours = layout.one_step_latents(networks, noise, layout.encode(networks, layout.token_ids(networks, prompts)))
    theirs = sample(pipeline, prompts, canvas, noise, "latent")
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


def test_the_job_knows_what_it_was_trained_for(trained: Path) -> None:
    checkpoint = inspect(trained / "checkpoint", "here")
    assert checkpoint.resolution_for(50) == 64 and checkpoint.resolution_for(32) == 32
    assert checkpoint.classes == frozenset({"red", "green", "blue", "stop", "yield"})


def test_the_job_draws_from_it_what_it_was_trained_for(data: Path, trained: Path, tmp_path: Path) -> None:
    """Without a warning, at the task's own size, and in the words that it learnt."""
    options = ["--model", str(trained / "checkpoint"), "--output", str(tmp_path), "--max-ipc", "2", "--select", "none"]
    arguments = [str(data / "signs.toml"), *options, "--budget", "60s", "--device", "cpu"]
    process = forked.start_command(cli.main, arguments, tmp_path / "errors", folder=ROOT, environment={})
    process.join(100)
    assert process.exitcode == 0, (tmp_path / "errors").read_text()
    manifest = json.loads((tmp_path / "signs.json").read_text())
    assert manifest["resolution"] == 64 and manifest["prompts"] == "described"
    assert not [warning for warning in manifest["warnings"] if "trained" in warning]
    assert torch.load(tmp_path / "signs.pt", weights_only=True).shape == (2 * 2, 3, 50, 50)


# What it refuses, and says


Refused = Callable[..., tuple[int, str]]


@pytest.fixture
def refused(data: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Refused:
    monkeypatch.setattr(signal, "signal", lambda *_: None)  # the test's own process

    def run(*argv: object, tasks: int = 1) -> tuple[int, str]:
        named = [str(data / "tiles.toml")] * tasks
        return train.main([*named, "--device", "cpu", *map(str, argv)]), capsys.readouterr().err

    return run


def test_the_folder_of_another_training_is_left_alone(data: Path, tmp_path: Path, refused: Refused) -> None:
    save_whole({"settings": {"device": "cpu", "seed": 5}}, tmp_path / "state.pt")
    code, said = refused("--data", data, "--output", tmp_path)
    assert code == 5 and "go on with --resume" in said
    code, said = refused("--data", data, "--output", tmp_path, "--resume")
    assert code == 5 and "seed 5" in said
    (tmp_path / "state.pt").write_bytes(b"x")
    code, said = refused("--data", data, "--output", tmp_path, "--resume")
    assert code == 5 and "state.pt cannot be read" in said
    (tmp_path / "file").touch()
    code, said = refused("--data", data, "--output", tmp_path / "file")
    assert code == 5 and "another --output" in said
    (tmp_path / "model/checkpoint").mkdir(parents=True)
    code, said = refused("--data", data, "--output", tmp_path / "model")
    assert code == 5 and "checkpoint is there, of no training to go on with" in said


def test_a_training_of_other_classes_or_sizes_does_not_go_on(
    data: Path, trained: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    other = data / "signs.toml"
    for old, new in (("size = 50", "size = 32"), ('"a photo of a stop"', '"a photo of a stop sign"')):
        changed = tmp_path / "signs.toml"
        changed.write_text(other.read_text().replace(old, new))
        arguments = [str(data / "tiles.toml"), str(changed), "--data", str(data), "--output", str(trained)]
        assert train.main([*arguments, "--seed", "5", "--device", "cpu", "--resume"]) == 5
        assert "is of a training with other options" in capsys.readouterr().err


def test_wrong_usage_and_data_are_said_in_a_line(data: Path, tmp_path: Path, refused: Refused) -> None:
    out = tmp_path / "out"
    code, said = refused("--data", tmp_path, "--output", out)
    assert code == 6 and "tiles_train.pt: no such file, nor is there a folder per class" in said
    code, said = refused("--data", data, "--output", data)
    assert code == 2 and "is where the images are" in said
    code, said = refused("--data", data, "--output", out, "--budget", "soon")
    assert code == 2 and "--budget 'soon'" in said
    code, said = refused("--data", data, "--output", out, tasks=2)
    assert code == 2 and "named twice" in said
    code, said = refused("--data", data, "--output", out, "--budget", "5s")
    assert code == 3 and "give a longer --budget" in said
    assert len(said.strip().splitlines()) == 1


def test_under_a_launcher_a_gpu_that_is_not_there_is_said(
    data: Path, tmp_path: Path, refused: Refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    code, said = refused("--data", data, "--output", tmp_path / "out", "--device", "cuda")
    assert code == 2 and "--device cuda" in said


def out_of_memory() -> None:
    raise torch.OutOfMemoryError("CUDA out of memory.\nOf 8 GiB")


@pytest.mark.parametrize("take", [out_of_memory, lambda: torch.empty(10**14), lambda: bytearray(1 << 60)])
def test_too_little_memory_is_said(
    take: Callable[[], object], data: Path, tmp_path: Path, refused: Refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    def build(*_: object) -> None:
        take()

    monkeypatch.setattr(train, "build_networks", build)
    code, said = refused("--data", data, "--output", tmp_path / "out")
    assert code == 2 and "cpu has too little memory for this training" in said


def test_a_full_disk_is_what_it_is_called(tmp_path: Path) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, before[1]))
    try:
        with pytest.raises(OutputError, match=r"4\.\d+ MB are needed there: make room"):
            save_whole({"weights": torch.zeros(1 << 20)}, tmp_path / "state.pt")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not list(tmp_path.iterdir())
