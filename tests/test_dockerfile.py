"""The Dockerfile, read by hadolint. `tests/container/` builds it."""

import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from tests.paths import ROOT


def test_hadolint_finds_nothing() -> None:
    hadolint = Path(sysconfig.get_path("scripts")) / "hadolint"
    process = subprocess.run([hadolint, ROOT / "Dockerfile"], capture_output=True, text=True, check=False)
    assert (process.returncode, process.stdout, process.stderr) == (0, "", "")


def test_weights_are_fetched_with_no_more_than_is_copied_for_it(tmp_path: Path) -> None:
    stage = (ROOT / "Dockerfile").read_text().partition("WORKDIR /fetch\n")[2].partition("RUN ")[0]
    for line in re.findall(r"COPY (.*)", stage.replace("\\\n", " ")):
        *sources, target = line.split()
        for source in map(ROOT.joinpath, sources):
            if source.is_dir():
                shutil.copytree(source, tmp_path / target)
            else:
                (tmp_path / target).mkdir(parents=True, exist_ok=True)
                shutil.copy(source, tmp_path / target)
    run = "import sys; sys.path.insert(0, '.'); from tools.fetch_weights import main; main(['sd-turbo', 'x'])"
    environment = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-I", "-c", run], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0 and done.stderr.startswith("error: stabilityai/sd-turbo is neither"), done.stderr
