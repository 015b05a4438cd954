"""What README, CONTRIBUTING and docs print: commands exist and, where they can be tried here, work; links lead on."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from PIL import Image

from submission import cli
from submission.model.checkpoint import EMBEDDED
from submission.tasks import load_task
from tests.paths import ROOT
from tests.tools.real_data import FOLDER, real_test_images
from tools import audit, evaluate, init, make_checkpoint, rehearse, report, reproduce, train
from tools import fetch_weights as fetch
from tools.bench import __main__ as bench

TOOLS = {
    "audit": audit.build_parser,
    "bench": lambda: bench.build_parser(bench.find_benches()),
    "evaluate": evaluate.build_parser,
    "fetch-weights": fetch.build_parser,
    "init": init.build_parser,
    "make-checkpoint": make_checkpoint.build_parser,
    "rehearse": rehearse.build_parser,
    "reproduce": reproduce.build_parser,
    "report": report.build_parser,
    "train": train.build_parser,
}
# Why a command is not tried: words in it, and the reason.
NOT_HERE = {
    "docker ": "needs a container engine",
    "srun ": "needs Slurm",
    "scontrol ": "needs Slurm",
    "export ": "is for the line after it",
    "ray start": "starts a cluster that stays",
    "--cluster": "needs a cluster",
    "accelerate launch": "needs GPUs",
    "torchrun": "needs GPUs",
    "--devices 4": "needs GPUs",
    "fetch-weights": "needs the hub",
    "models/sdxl-turbo": "needs SDXL-Turbo",
    "--model sd-turbo": "needs SD-Turbo",
    "my-model.toml": "is a recipe of the reader's",
    "--size full": "writes 7 GB",
    "models/random": "needs 7 GB of weights",
    "run.sh train ": "takes minutes, and has tests of its own",
    "outputs/my-model": "needs what train leaves",
    "outputs/ten": "needs ten of CIFAR-100's classes in folders",
    "run.sh test": "would run this test",
}


def commands(text: str) -> Iterator[str]:
    """Those in blocks of bash, then those inside sentences; where one leaves something out (...), it is none."""
    for block in re.findall(r"```bash\n(.*?)```", text, flags=re.DOTALL):
        yield from (shlex.join(shlex.split(line, comments=True)) for line in block.replace("\\\n", " ").splitlines())
    yield from (line for line in re.findall(r"`(\./run\.sh [^`]*)`", text) if "..." not in line)


DOCUMENTS = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    EMBEDDED / "README.md",
    *sorted((ROOT / "docs").glob("*.md")),
]
PRINTED = list(dict.fromkeys(c for document in DOCUMENTS for c in commands(document.read_text()) if c))


@pytest.mark.parametrize("command", PRINTED)
def test_a_printed_command_is_one_that_there_is(command: str) -> None:
    words = shlex.split(command)
    if "./run.sh" in words:
        arguments = words[words.index("./run.sh") + 1 :]
    elif "submission" in words:
        arguments = words[words.index("submission") + 1 :]
    else:
        assert words[0] in ("docker", "mkdir", "export", ".venv/bin/ray") or words[0].startswith("HEAD="), command
        return
    if arguments[0] == "test":
        return
    parser = TOOLS[arguments.pop(0)]() if arguments[0] in TOOLS else cli.build_parser()
    if arguments == ["--help"]:
        return
    if arguments or parser.prog != "./run.sh train":  # named alone, in passing
        _, others = parser.parse_known_args([word.replace("EPOCH", "0") for word in arguments])
        assert not others or parser.prog in ("./run.sh rehearse", "./run.sh reproduce"), others
        cli.build_parser().parse_args(["cifar100", *others])  # what rehearse passes on


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(document: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", document.read_text()):
        assert "://" in target or (document.parent / target).exists(), target


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The project as someone has just fetched it, and what the commands expect them to have."""
    folder = tmp_path_factory.mktemp("clone") / "banko"
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in listed.splitlines():
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, target)
    (folder / "names.txt").write_text("tabby cat\ngoldfish\n")
    for name, colour in (("tabby cat", "brown"), ("goldfish", "orange")):
        (folder / "my-images" / "test" / name).mkdir(parents=True)
        Image.new("RGB", (80, 60), colour).save(folder / "my-images" / "test" / name / "1.png")
    if FOLDER.exists():
        images, labels = real_test_images(load_task("cifar100"))
        (folder / "reference_data").mkdir()
        torch.save({"images_val": images, "labels_val": labels}, folder / "reference_data" / "cifar100_test.pt")
    return folder


@pytest.mark.long
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("command", PRINTED)
def test_a_printed_command_works(clone: Path, command: str) -> None:
    for words, reason in NOT_HERE.items():
        if words in command:
            pytest.skip(reason)
    if "reference_data" in command and not FOLDER.exists():
        pytest.skip("needs the real images in ../shared/data")
    environment = os.environ | {"BANKO_PYTHON": sys.executable}
    done = subprocess.run(command, shell=True, cwd=clone, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
