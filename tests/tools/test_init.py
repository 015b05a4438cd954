"""Tasks written from lists of names: any text gives a task that reads back, or one line that says where it is wrong."""

import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image

from submission.tasks import load_task
from tools import init

NAMES = "house cat\r\nbarn_owl\n\n  dog \n"


def run(folder: Path, names: str | bytes, *options: str) -> tuple[int, Path]:
    """The exit code for a list of names, and where the task is to be."""
    (folder / "names.txt").write_bytes(names if isinstance(names, bytes) else names.encode())
    task = folder / "mine.toml"
    return init.main([str(task), "--classes", str(folder / "names.txt"), *options]), task


def test_a_task_to_edit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, file = run(tmp_path, "\ufeff" + NAMES, "--size", "32")
    assert code == 0 and f"./run.sh {file}" in capsys.readouterr().out
    task = load_task(str(file))
    assert (task.name, task.size, task.mean, task.max_ipc) == ("mine", 32, (0.485, 0.456, 0.406), 500)
    assert [c.name for c in task.classes] == ["house cat", "barn_owl", "dog"]
    assert task.prompts("label") == [["house cat", "barn owl", "dog"]]
    assert task.prompts("described") == [["a photo of a house cat", "a photo of a barn owl", "a photo of a dog"]]
    diverse = task.phrased()
    assert diverse[0] == task.prompts("described")[0] and len({tuple(one) for one in diverse}) == len(diverse) == 8
    assert file.read_text().count("index = ") == 3, "a class a line"


def test_no_file_is_overwritten(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine.toml").write_text("precious")
    code, file = run(tmp_path, NAMES)
    assert code == 2 and "is there already" in capsys.readouterr().err
    assert file.read_text() == "precious"


lines = st.one_of(
    st.text(max_size=20),
    st.text(st.sampled_from("ab _é\"\\{}#'\t\x00\u00a0\u200b\x85\u2028"), max_size=6),
    st.integers(195, 205).map(lambda length: "x" * length),
)


@given(st.lists(lines, max_size=6), st.sampled_from(["\n", "\r\n", "\r"]), st.sampled_from(["utf-8", "utf-8-sig"]))
@example(["a b", "a_b"], "\n", "utf-8")
@example(["{}", "{0}", '"""', "\\u0041"], "\n", "utf-8")
@settings(max_examples=200)
def test_any_text_gives_a_task_or_the_line_that_is_wrong(
    tmp_path_factory: pytest.TempPathFactory, content: list[str], end: str, encoding: str
) -> None:
    folder = tmp_path_factory.mktemp("names")
    with pytest.MonkeyPatch.context() as patch:
        said: list[str] = []
        patch.setattr("builtins.print", lambda text, **_: said.append(text))
        code, file = run(folder, end.join(content).encode(encoding, "surrogatepass"))
    if code == 0:
        given = [line.strip() for line in re.split(r"\r\n|\n|\r", end.join(content)) if line.strip()]
        assert [c.name for c in load_task(str(file)).classes] == given
        assert len(load_task(str(file)).phrased()) == 8
    else:
        assert code == 6 and len(said) == 1 and "\n" not in said[0] and not file.exists()
        assert re.match(r"error: .*names\.txt(:\d+: |: [01] class names)", said[0]), said


def test_a_list_too_long_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, file = run(tmp_path, "".join(f"{number}\n" for number in range(60_000)))
    assert code == 6 and "60,000 names make a task of" in capsys.readouterr().err and not file.exists()
    assert run(tmp_path, b"x" * (4 * 2**20 + 1))[0] == 6
    assert "MiB is too much, 4 MiB are the most" in capsys.readouterr().err


def test_names_that_differ_by_case_alone_ask_for_the_same(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(tmp_path, "Turkey\nfox\nturkey\n")[0] == 6
    assert "names.txt:3: 'turkey' asks for the same as line 1" in capsys.readouterr().err


def test_images_without_a_channel_have_no_deviation_to_take(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "images").mkdir()
    nothing, green = Image.new("L", (256, 256)), Image.linear_gradient("L")
    Image.merge("RGB", (nothing, green, nothing)).save(tmp_path / "images/a.png")
    assert run(tmp_path, NAMES, "--images", str(tmp_path / "images"))[0] == 6
    assert "a colour channel of its images has one value" in capsys.readouterr().err


def test_mean_and_deviation_of_ones_own_images(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), dtype=np.uint8)
    pixels[..., 2] //= 2
    for index, image in enumerate(pixels):
        (tmp_path / f"images/{index}").mkdir(parents=True)
        Image.fromarray(image).save(tmp_path / f"images/{index}/a.png")
    code, file = run(tmp_path, NAMES, "--size", "32", "--images", str(tmp_path / "images"))
    assert code == 0
    task = load_task(str(file))
    assert task.mean == pytest.approx((pixels / 255).mean((0, 1, 2)), abs=1e-4)
    assert task.std == pytest.approx((pixels / 255).std((0, 1, 2)), abs=1e-4)
