"""The job as users run it: through the command line, on real checkpoints, with real files and signals."""

import hashlib
import itertools
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor

from submission import cli
from submission.dataset.rounds import Spool
from submission.distillation import sharpening
from submission.distillation.selection import Selector
from submission.errors import BankoError
from submission.job import ending
from submission.job import run as job
from submission.job.files import JobFiles
from submission.machine import memory
from submission.plan.estimates import Extent
from submission.plan.file_plan import FilePlan
from submission.tasks import load_task
from tests.paths import ROOT
from tools import report

Run = Callable[..., Tensor]


@pytest.fixture
def run(checkpoint_folder: Path, task_file: Path, tmp_path: Path) -> Run:
    """Runs the tiny task in this process; returns the file's images as [classes, IPC, 3, 16, 16] pixels in 0..1."""
    task = load_task(str(task_file))

    def run(*options: str, output: str = "out") -> Tensor:
        arguments = [str(task_file), "--model", str(checkpoint_folder), "--output", str(tmp_path / output)]
        arguments += ["--select", "none", *options]
        assert cli.main(arguments) == 0
        images: Tensor = torch.load(tmp_path / output / "tiny.pt", weights_only=True).float()
        images = images * torch.tensor(task.std).view(3, 1, 1) + torch.tensor(task.mean).view(3, 1, 1)
        return images.reshape(len(task.classes), -1, *images.shape[1:])

    return run


def levels(a: Tensor, b: Tensor) -> int:
    """The largest difference in 8-bit levels."""
    return int(((a - b).abs().max() * 255).round())


def test_a_job_leaves_file_manifest_and_sheet(run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images = run("--budget", "1m", "--seed", "5")
    manifest = json.loads((tmp_path / "out/tiny.json").read_text())
    assert images.shape == (3, 12, 3, 16, 16), "the task's cap"
    assert (manifest["ipc"], manifest["rounds"], manifest["seed"], manifest["warnings"]) == (12, 12, 5, [])
    assert manifest["checkpoint"]["source"].startswith("--model ") and len(manifest["checkpoint"]["sha256"]) == 4
    assert manifest["checkpoint"]["recognised"] is None
    assert 0 < manifest["elapsed_seconds"] < 60 and manifest["peak_memory_bytes"] > 1e8
    assert {"generate", "write and verify", "encode prompts"} <= set(manifest["phases_seconds"])
    assert manifest["snapshots_seconds"] > 0
    assert [plan["rounds"] for plan in manifest["plans"]][-1] == 12
    with Image.open(tmp_path / "out/tiny.png") as sheet:
        assert sheet.width > 150
    assert {file.name for file in (tmp_path / "out").iterdir()} == {"tiny.html", "tiny.json", "tiny.png", "tiny.pt"}
    progress = manifest["progress"]
    assert progress["images"][0] == 0 and progress["images"] == sorted(progress["images"])
    assert len(progress["elapsed"]) == len(progress["images"]) == len(progress["batch_size"]) <= 201
    spans = list(manifest["phases_from_to"].values())
    assert all(begin <= end for begin, end in spans) and spans == sorted(spans)
    lines = capsys.readouterr().out.splitlines()
    assert "model: --model " in lines[0]
    assert any("plan: 12 rounds" in line for line in lines)
    assert lines[-1].endswith("s before the deadline")


def test_the_docs_list_what_the_manifest_has(run: Run, tmp_path: Path) -> None:
    run("--max-ipc", "1")
    told = json.loads((tmp_path / "out/tiny.json").read_text()).keys()
    text = (ROOT / "docs/output.md").read_text()
    section = text[text.index("## The manifest") : text.index("## The report")]
    listed = {name for row in re.findall(r"^\| (`.*?) \|", section, re.M) for name in re.findall(r"`(\w+)`", row)}
    assert listed - {"peak_device_memory_bytes"} == told, "but for what a GPU adds"


def test_without_time_for_the_report_the_job_says_how_to_get_it(
    run: Run, task_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(ending, "REPORT_SECONDS", 6000)
    run("--max-ipc", "2", "--budget", "5m")
    assert not (tmp_path / "out/tiny.html").exists()
    manifest = str(tmp_path / "out/tiny.json")
    assert f"no time for the report: ./run.sh report {manifest} --task tiny.toml makes it" in capsys.readouterr().out
    assert report.main([manifest, "--task", str(task_file)]) == 0
    assert (tmp_path / "out/tiny.html").exists()


def test_a_run_that_is_resumed_replaces_no_file_by_a_smaller_one(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has no time for the rounds there are, and keeps them."""
    monkeypatch.setattr(Spool, "remove", lambda _: None)  # as if the job had been killed before
    options = ("--max-ipc", "4", "--aug-per-image", "0", "--select", "none")
    before = run(*options)
    told = (tmp_path / "out/tiny.json").read_text()
    monkeypatch.setattr(job, "GUESSED_FIXED", 1000.0)
    for _ in range(2):
        assert torch.equal(run(*options, "--resume"), before)
        assert (tmp_path / "out/tiny.json").read_text() == told, "which is that of the run which made it"


@pytest.mark.parametrize("fault", ["cut", "another", "stale", "odd", "chosen"])
def test_a_file_that_is_not_what_its_manifest_says_is_made_anew(
    fault: str, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options, file, manifest = (
        ("--max-ipc", "4", "--aug-per-image", "0"),
        tmp_path / "out/tiny.pt",
        tmp_path / "out/tiny.json",
    )
    with monkeypatch.context() as patch:
        patch.setattr(Spool, "remove", lambda _: None)
        before = run(*options)
    told = json.loads(manifest.read_text())
    if fault == "cut":
        file.write_bytes(file.read_bytes()[:2000])
    elif fault == "another":
        torch.save(torch.zeros(3), file)
    elif fault == "stale":
        torch.save(torch.load(file, weights_only=True)[:3].clone(), file)
    elif fault == "odd":
        manifest.write_text(json.dumps(told | {"rounds": "X"}).replace('"X"', "1e999"))
    else:
        manifest.write_text(json.dumps(told | {"pool": 9}))
    assert torch.equal(run(*options, "--resume"), before)
    assert json.loads(manifest.read_text())["resumed_rounds"] == 4


def test_a_run_without_time_for_its_rounds_keeps_them(
    run: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ("--max-ipc", "4", "--aug-per-image", "0", "--select", "none")
    monkeypatch.setattr(JobFiles, "keep_up", lambda _: None)
    monkeypatch.setattr(FilePlan, "last_file", lambda plan, **_: None if plan.in_place else Extent(1, 1))
    assert run(*options).shape[1] == 1
    assert "--resume goes on from them" in capsys.readouterr().out
    monkeypatch.undo()
    assert run(*options, "--resume").shape[1] == 4
    assert "resumed: 4 whole rounds" in capsys.readouterr().out


def test_a_report_that_cannot_be_written_costs_nothing(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "out/tiny.html").mkdir(parents=True)
    assert run("--max-ipc", "2").shape[1] == 2
    assert "warning: no report (cannot write" in capsys.readouterr().out
    assert {file.name for file in (tmp_path / "out").iterdir()} == {"tiny.html", "tiny.json", "tiny.png", "tiny.pt"}


def test_images_do_not_depend_on_the_batch_size(run: Run) -> None:
    """To one 8-bit level: kernels add up in another order for another batch size."""
    by_one = run("--batch-size", "1", output="one")
    for size in ("2", "5", "7", "auto"):
        assert levels(run("--batch-size", size, output=size), by_one) <= 1
    assert levels(run("--seed", "1", output="other"), by_one) > 1


def test_more_copies_and_a_higher_cap_keep_the_generated_images(run: Run) -> None:
    few = run("--max-ipc", "4", "--aug-per-image", "0", output="few")
    many = run("--max-ipc", "6", "--pda", "paper", output="many")
    assert levels(many[:, :4], few) <= 1


def test_images_are_chosen_from_a_pool(run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each is one that was made, and the same ones are chosen from the same pool."""
    everything = run("--max-ipc", "12", "--aug-per-image", "0", output="everything")
    options = ("--max-ipc", "3", "--select", "auto", "--pool", "12")
    chosen = run(*options)
    manifest = json.loads((tmp_path / "out/tiny.json").read_text())
    assert [manifest[name] for name in ("ipc", "rounds", "max_pool", "pool")] == [3, 3, 12, 12]
    assert "IPC 3 chosen from 12 rounds" in capsys.readouterr().out and manifest["warnings"] == []
    for of_class, made in zip(chosen, everything, strict=True):
        numbers = [next(n for n, other in enumerate(made) if levels(image, other) <= 1) for image in of_class]
        assert len(set(numbers)) == 3
    assert levels(chosen, everything[:, :3]) > 1
    with Image.open(tmp_path / "out/tiny.png") as sheet, Image.open(tmp_path / "everything/tiny.png") as of_round_0:
        assert sheet.tobytes()[: len(of_round_0.tobytes())] != of_round_0.tobytes(), "it shows what is in the file"
        assert sheet.height == of_round_0.height + 2 * 114, "and some that were chosen, and some that were passed over"
    assert levels(run(*options, "--batch-size", "5", output="again"), chosen) <= 1
    first = run("--max-ipc", "3", output="first")
    assert levels(first, everything[:, :3]) <= 1
    assert json.loads((tmp_path / "first/tiny.json").read_text())["pool"] is None


def test_where_there_is_time_the_choice_is_sharpened(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU, which takes seconds for it."""
    monkeypatch.setattr(job, "plan_sharpening", lambda *_: 1.0)
    monkeypatch.setattr(sharpening, "STEPS", 3)
    options = ("--max-ipc", "3", "--select", "auto", "--pool", "12")
    sharpened = run(*options)
    manifest = json.loads((tmp_path / "out/tiny.json").read_text())
    assert (manifest["pool"], manifest["sharpening_steps"], manifest["warnings"]) == (12, 3, [])
    assert "sharpened in 3 of 3 steps" in capsys.readouterr().out
    sheet = (tmp_path / "out/tiny.png").read_bytes()
    monkeypatch.setattr(sharpening, "sharpen", no_memory)
    chosen = run(*options)
    manifest = json.loads((tmp_path / "out/tiny.json").read_text())
    assert (manifest["pool"], manifest["sharpening_steps"]) == (12, 0)
    assert "too little memory to sharpen" in manifest["warnings"][0]
    assert 1 < levels(sharpened, chosen) < 60, "moved, and not far"
    assert (tmp_path / "out/tiny.png").read_bytes() != sheet, "it shows what is in the file"


def no_memory(*_: object) -> None:
    raise torch.OutOfMemoryError


def test_a_pool_takes_what_time_there_is(run: Run, tmp_path: Path) -> None:
    run("--max-ipc", "2", "--select", "auto", "--budget", "12s")
    manifest = json.loads((tmp_path / "out/tiny.json").read_text())
    assert manifest["ipc"] == 2 and 20 < manifest["pool"] < manifest["max_pool"]
    assert manifest["elapsed_seconds"] > 5 and "choose images" in manifest["phases_seconds"]
    assert not (tmp_path / "out/.tiny.spool").exists()


def test_where_choosing_turns_out_to_take_less_the_pool_grows_again(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At first it seems to take a second per round, and half the time would be left over."""
    measured = itertools.chain([1 / 3], itertools.repeat(1e-3))
    monkeypatch.setattr(Selector, "seconds_per_image", lambda _: next(measured))
    run("--max-ipc", "2", "--select", "auto", "--budget", "15s")
    assert json.loads((tmp_path / "out/tiny.json").read_text())["pool"] > 30


def test_prompt_styles_make_different_images(run: Run, task_file: Path) -> None:
    described = run("--max-ipc", "2", "--aug-per-image", "0", output="described")
    label = run("--max-ipc", "2", "--aug-per-image", "0", "--prompts", "label", output="label")
    assert levels(described, label) > 0
    text = task_file.read_text().replace('name = "apple"', 'kind = "fruit", name = "apple"')
    text = text.replace('name = "pear"', 'kind = "fruit", name = "pear"').replace(
        'name = "plum"', 'kind = "fruit", name = "plum"'
    )
    task_file.write_text(text + '\n[phrasings]\nfruit = ["{}", "{}, seen from far away"]\n')
    diverse = run("--max-ipc", "2", "--aug-per-image", "0", "--prompts", "diverse", output="diverse")
    assert levels(diverse[:, 0], described[:, 0]) <= 1, "round 0 has the first phrasing"
    assert levels(diverse[:, 1], described[:, 1]) > 0, "round 1 the second"


def test_a_file_that_is_replaced_and_classes_the_model_does_not_know_are_said(
    run: Run,
    checkpoint_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run("--max-ipc", "1")
    assert "is there already" not in capsys.readouterr().out
    trained = tmp_path / "trained"
    shutil.copytree(checkpoint_folder, trained)
    (trained / "training.json").write_text('{"classes": {"another": ["apple"]}}')
    run("--model", str(trained), "--max-ipc", "1")
    assert "out/tiny.pt is there already, and is replaced once a round is done" in capsys.readouterr().out
    warnings = json.loads((tmp_path / "out/tiny.json").read_text())["warnings"]
    assert "this model was not trained for" in warnings[0]


def test_another_file_than_the_recipe_names_is_a_warning(run: Run, checkpoint_folder: Path, tmp_path: Path) -> None:
    file = "unet/diffusion_pytorch_model.fp16.safetensors"
    for digest in ("0" * 64, hashlib.sha256((checkpoint_folder / file).read_bytes()).hexdigest()):
        (tmp_path / "mine.toml").write_text(f'base = "{checkpoint_folder}"\n[sha256]\n"{file}" = "{digest}"\n')
        run("--model", str(tmp_path / "mine.toml"), "--max-ipc", "1")
        warnings = json.loads((tmp_path / "out/tiny.json").read_text())["warnings"]
        assert [file in one for one in warnings] == [True] * (digest == "0" * 64)


def test_batches_keep_to_the_memory_that_was_said(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "WORKING", -(1 << 40))
    run()
    assert json.loads((tmp_path / "out/tiny.json").read_text())["batch_size"] == 1


def test_half_precision_files(run: Run, tmp_path: Path) -> None:
    run("--dtype", "float16", "--max-ipc", "3")
    assert torch.load(tmp_path / "out/tiny.pt", weights_only=True).dtype == torch.float16


def test_another_resolution_is_resized_and_enlarging_is_a_warning(run: Run, tmp_path: Path) -> None:
    assert run("--max-ipc", "1", "--resolution", "32").shape[-1] == 16
    run("--max-ipc", "1", "--resolution", "8")
    assert "enlarged" in json.loads((tmp_path / "out/tiny.json").read_text())["warnings"][0]


def test_decoders_are_asked_for_and_held_to_their_fidelity(run: Run, tmp_path: Path) -> None:
    images, told = {}, {}
    for rung in ("vae", "linear", "distilled"):
        # Latents as fine as the pixels.
        images[rung] = run("--max-ipc", "2", "--resolution", "32", "--decoder", rung, output=rung)
        told[rung] = json.loads((tmp_path / rung / "tiny.json").read_text())["decoder"]
        assert told[rung]["name"] == rung
        assert set(told[rung]["fidelity_db"]) == {rung} - {"vae"}
    for rung in ("linear", "distilled"):
        error = (images[rung] - images["vae"]).square().mean((2, 3, 4))
        # Measured on other images, and on pixels that are not yet rounded; few were fitted to where there was no time
        # for more, and these are among them.
        assert (-10 * error.log10()).mean() > told[rung]["fidelity_db"][rung] - 4
    assert levels(run("--max-ipc", "1", "--resolution", "32", "--decoder", "linear"), images["linear"][:, :1]) <= 1


def test_json_lines(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    run("--max-ipc", "2", "--log", "json")
    events = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert {"info", "progress"} <= {event["event"] for event in events}
    assert all(event["elapsed"] > 0 for event in events)


def test_a_terminal_gets_a_live_display(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    run("--max-ipc", "2", "--log", "rich")
    out = capsys.readouterr().out
    assert "s left" in out and "before the" in out


def test_debug_shows_the_traceback() -> None:
    with pytest.raises(BankoError):
        cli.main(["cifar10", "--debug"])


def start(*options: str, **environment: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "submission", *options]
    # Without a GPU in sight the embedded checkpoint is chosen wherever the tests run.
    variables = {"PATH": os.environ["PATH"], "CUDA_VISIBLE_DEVICES": "", **environment}
    return subprocess.Popen(command, cwd=ROOT, env=variables, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_a_real_run_of_the_embedded_model_ends_before_its_deadline(tmp_path: Path) -> None:
    began = time.monotonic()
    process = start("cifar100", "--budget", "50s", "--output", str(tmp_path), OMP_NUM_THREADS="1")
    out, err = process.communicate(timeout=120)
    took = time.monotonic() - began
    assert process.returncode == 0, err
    assert took < 50, "the deadline is the contract"
    assert "model: embedded" in out.splitlines()[0]
    manifest = json.loads((tmp_path / "cifar100.json").read_text())
    said = re.search(r"memory: at most ([0-9.]+) GB", out)
    assert said and manifest["peak_memory_bytes"] < float(said[1]) * 1e9
    assert manifest["checkpoint"]["source"].startswith("embedded")
    images = torch.load(tmp_path / "cifar100.pt", weights_only=True)
    assert images.shape == (100 * manifest["ipc"], 3, 32, 32) and images.dtype == torch.float32


def test_a_resumed_run_decodes_with_the_network_of_the_run_before(
    checkpoint_folder: Path, task_file: Path, tmp_path: Path
) -> None:
    task_file.write_text(task_file.read_text().replace("max_ipc = 12", "max_ipc = 100000"))
    options = [str(task_file), "--model", str(checkpoint_folder), "--resolution", "32", "--decoder", "distilled"]
    options += ["--output", str(tmp_path), "--aug-per-image", "0", "--batch-size", "3"]
    process = start(*options, "--budget", "5m", OMP_NUM_THREADS="1")
    deadline = time.monotonic() + 100
    while not (tmp_path / "tiny.pt").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    process.kill()
    process.communicate()
    assert (tmp_path / ".tiny.spool/decoder.safetensors").stat().st_size > 0
    before = torch.load(tmp_path / "tiny.pt", weights_only=True)
    again = start(*options, "--resume", "--budget", "15s", OMP_NUM_THREADS="1")
    out, err = again.communicate(timeout=120)
    assert again.returncode == 0, err
    assert "decoder: distilled, the network that was fitted before" in out
    told = json.loads((tmp_path / "tiny.json").read_text())
    assert told["decoder"]["fitted_to"] and told["decoder"]["fidelity_db"]["distilled"] > 0
    after = torch.load(tmp_path / "tiny.pt", weights_only=True).unflatten(0, (3, -1))
    assert torch.equal(after[:, : len(before) // 3], before.unflatten(0, (3, -1)))


@pytest.mark.parametrize("scheduler", ["EulerAncestralDiscreteScheduler", "LCMScheduler"])
def test_images_of_several_steps_depend_on_neither_batch_nor_budget_nor_interruption(
    run: Run, checkpoint_folder: Path, task_file: Path, tmp_path: Path, scheduler: str
) -> None:
    """Of schedulers that add noise at every step; to one 8-bit level per step, since each rounds anew."""
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(f'base = "{checkpoint_folder}"\n[sampling]\nscheduler = "{scheduler}"\nsteps = 4\n')
    task_file.write_text(task_file.read_text().replace("max_ipc = 12", "max_ipc = 100000"))
    options = ["--model", str(recipe), "--aug-per-image", "0"]
    output = tmp_path / "interrupted"
    process = start(str(task_file), *options, "--output", str(output), "--budget", "5m", OMP_NUM_THREADS="1")
    deadline = time.monotonic() + 100
    while not (output / "tiny.pt").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    process.kill()
    process.communicate()
    rounds = (output / ".tiny.spool/rounds.u8").stat().st_size // (3 * 3 * 16 * 16)
    options += ["--max-ipc", str(rounds + 2)]
    resumed = run(*options, "--resume", output="interrupted")
    manifest = json.loads((output / "tiny.json").read_text())
    assert manifest["resumed_rounds"] >= 1 and manifest["sampling"]["steps"] == 4
    for others in (["--batch-size", "1", "--budget", "5m"], ["--batch-size", "7", "--budget", "2m"]):
        assert levels(run(*options, *others, output=others[1]), resumed) <= 4
    assert levels(run(*options, "--seed", "1", output="other"), resumed) > 4


READ_ONLY = """
mount --make-rprivate / && mount -t tmpfs tmpfs {output} || exit 77
for place in $(awk '{{print $5}}' /proc/self/mountinfo | grep -vE "^(/proc|/sys|/dev$|/dev/pts|{output})"); do
    mount -o remount,ro,bind "$place" 2>/dev/null
done
touch /tmp/x /var/tmp/x 2>/dev/null && exit 77
cd {root} && HOME=/nonexistent {command} && ls -A {output}/out
"""


def test_a_root_for_reading_alone_needs_no_temporary_folder(
    checkpoint_folder: Path, task_file: Path, tmp_path: Path
) -> None:
    output = tmp_path / "writable"
    output.mkdir()
    options = [str(task_file), "--model", str(checkpoint_folder), "--device", "cpu", "--output", f"{output}/out"]
    options += ["--select", "none"]
    command = shlex.join([sys.executable, "-m", "submission", *options])
    script = READ_ONLY.format(output=output, root=ROOT, command=command)
    done = subprocess.run(["unshare", "-m", "bash", "-c", script], capture_output=True, text=True, check=False)
    if done.returncode == 77 or "unshare:" in done.stderr:
        pytest.skip(f"a root for reading alone cannot be made here: {done.stderr.strip()}")
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stdout + done.stderr
    assert "tiny.pt" in done.stdout.splitlines()[-3:]


def test_one_device_knows_nothing_of_ray(checkpoint_folder: Path, task_file: Path, tmp_path: Path) -> None:
    options = [str(task_file), "--model", str(checkpoint_folder), "--device", "cpu", "--output", str(tmp_path)]
    code = f"import sys; from submission import cli; assert cli.main({options}) == 0; print('ray' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "False"
    assert "ray" not in (ROOT / "requirements.txt").read_text()


def test_a_budget_without_room_is_code_3_and_leaves_nothing(
    checkpoint_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A hundred images of eight times the usual side take a minute, which a few of them tell."""
    options = ["--resolution", "256", "--output", str(tmp_path), "--budget", "20s", "--device", "cpu"]
    assert cli.main(["cifar100", "--model", str(checkpoint_folder), *options]) == 3
    error = capsys.readouterr().err
    assert "cannot hold one round" in error and "try --budget" in error
    assert len(error.splitlines()) == 1 and list(tmp_path.iterdir()) == []


def test_time_spent_before_the_process_counts(tmp_path: Path) -> None:
    """The harness began 59 s ago: what is left of a minute holds no round."""
    process = start("cifar100", "--budget", "1m", "--output", str(tmp_path), BANKO_STARTED_AT=str(time.time() - 59))
    _, err = process.communicate(timeout=120)
    assert process.returncode == 3 and "a budget of 60 s" in err
    assert list(tmp_path.iterdir()) == []


def test_ctrl_c_finishes_the_file(checkpoint_folder: Path, tmp_path: Path) -> None:
    process = start("cifar100", "--model", str(checkpoint_folder), "--output", str(tmp_path), "--max-ipc", "1000000")
    deadline = time.monotonic() + 100
    while not (tmp_path / "cifar100.pt").exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    time.sleep(1)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    manifest = json.loads((tmp_path / "cifar100.json").read_text())
    images = torch.load(tmp_path / "cifar100.pt", weights_only=True)
    assert len(images) == 100 * manifest["ipc"] and "before the deadline" in out
