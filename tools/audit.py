"""Checks a training set's file without training on it, and draws it.

    ./run.sh audit outputs/cifar100.pt

What makes a score worthless and shows in the numbers is found in seconds: pixels left unnormalised, flat or repeated
images, a wrong shape. A wrong order of classes does not show; `./run.sh evaluate` looks for that.
"""

import argparse
import hashlib
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from submission.cli import Parser
from submission.contact_sheet import MOST_CLASSES, draw_contact_sheet
from submission.dataset_file import mean_and_std
from submission.errors import InputFileError, UsageError
from submission.manifest import write_json, write_whole
from submission.tasks import Task, builtin_names, load_task
from tools.command import exit_code_of
from tools.tensor_files import LabelledImages, read_submission

# Pixels of images looked at together: 12 MB of float32.
PIXELS_A_CHUNK = 1 << 20
# How far a number may lie from where it should be: half precision's rounding at the ends of the range.
TOLERANCE = 0.01


@dataclass(frozen=True)
class Finding:
    """Something wrong with a file: a word for machines, whether it makes the file useless, a sentence for people."""

    code: str
    fatal: bool
    text: str


@dataclass(frozen=True)
class Survey:
    """What one pass over the images saw."""

    low: torch.Tensor  # float32 [3], the least number of each channel
    high: torch.Tensor  # float32 [3], the greatest
    flat: list[int]  # positions of images whose every pixel is the same
    repeated: list[int]  # positions of images that an earlier image equals


def build_parser() -> Parser:
    parser = Parser(
        prog="./run.sh audit",
        description="Checks a training set's file without training on it, and draws one image of each class.",
        epilog="examples:\n  ./run.sh audit outputs/cifar100.pt\n"
        "  ./run.sh audit outputs/my-classes.pt --task my-classes.toml\n\n"
        "exit codes: 0 nothing wrong, or warnings alone; 2 usage; 5 output cannot be written; 6 a bad file",
    )
    parser.add_argument(
        "file", type=Path, metavar="FILE.pt", help="what the job has made, or anyone: a tensor of torch.save"
    )
    parser.add_argument(
        "--task",
        metavar="TASK",
        help=f"{', '.join(builtin_names())}, or a task's .toml (default: the one called like the file)",
    )
    parser.add_argument("--sheet", type=Path, metavar="PATH", help="the picture (default: FILE.audit.png, beside it)")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write what was found there as well")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    options = build_parser().parse_args(arguments)
    return exit_code_of(lambda: _report(options))


def audit(path: Path, task: Task) -> list[Finding]:
    """All that is wrong with the file, the worst first. Raises InputFileError for one that cannot be read at all."""
    return inspect(read_submission(path, task), task)


def inspect(data: LabelledImages, task: Task) -> list[Finding]:
    """All that is wrong with the images of a submission that could be read, the worst first."""
    survey = _survey(data.images)
    found = [*_normalisation(survey, task), *_flat(survey, data, task), *_repeated(survey, data, task)]
    return sorted(found, key=lambda finding: not finding.fatal)


def _report(options: argparse.Namespace) -> int:
    """Print and write what was found; returns the exit code. Raises UsageError, InputFileError, OutputError."""
    try:
        task = load_task(options.task or options.file.stem)
    except UsageError as error:
        raise error if options.task else UsageError(f"--task is missing: {error}") from error
    facts: dict[str, object] = {"file": str(options.file), "task": task.name}
    try:
        data = read_submission(options.file, task)
    except InputFileError as error:
        if options.json:
            findings = [Finding("refused", True, str(error))]
            write_json(options.json, {**facts, "good": False, "findings": [asdict(one) for one in findings]})
        raise
    findings = inspect(data, task)
    good = not any(finding.fatal for finding in findings)
    ipc, dtype = len(data.labels) // len(task.classes), str(data.images.dtype).removeprefix("torch.")
    print(f"{options.file}: {ipc} images a class for the {len(task.classes)} classes of {task.name}, {dtype}")
    for finding in findings:
        print(f"{'ERROR' if finding.fatal else 'warning'}: {finding.text}")
    sheet = options.sheet or options.file.with_suffix(".audit.png")
    write_whole(sheet, _draw(data, task))
    print(f"{'good' if good else 'BAD'}; one image of each class, to be looked at: {sheet}")
    if options.json:
        facts |= {"ipc": ipc, "dtype": dtype, "good": good, "findings": [asdict(one) for one in findings]}
        write_json(options.json, facts)
    return 0 if good else InputFileError.exit_code


def _survey(images: torch.Tensor) -> Survey:
    low, high = torch.full((3,), torch.inf), torch.full((3,), -torch.inf)
    flat: list[int] = []
    repeated: list[int] = []
    seen: set[bytes] = set()
    for start, chunk in _chunks(images):
        low = torch.minimum(low, chunk.amin((0, 2, 3)))
        high = torch.maximum(high, chunk.amax((0, 2, 3)))
        is_flat = (chunk.amax((2, 3)) == chunk.amin((2, 3))).all(1)
        flat += (start + is_flat.nonzero().flatten()).tolist()
        for offset, image in enumerate(chunk.numpy()):
            digest = hashlib.blake2b(image, digest_size=16).digest()
            if digest in seen:
                repeated.append(start + offset)
            seen.add(digest)
    return Survey(low, high, flat, repeated)


def _chunks(images: torch.Tensor) -> Iterator[tuple[int, torch.Tensor]]:
    """Position and content, contiguous float32, of some images at a time."""
    step = max(1, PIXELS_A_CHUNK // images[0, 0].numel())
    for start in range(0, len(images), step):
        yield start, images[start : start + step].float().contiguous()


def _normalisation(survey: Survey, task: Task) -> Iterator[Finding]:
    """Numbers that are not pixels of 0..1 less the task's mean, over its deviation."""
    darkest, brightest = ((pixel - torch.tensor(task.mean)) / torch.tensor(task.std) for pixel in (0.0, 1.0))
    low, high = survey.low.min().item(), survey.high.max().item()
    mended = f"normalise them: (pixels in 0..1 - {_numbers(task.mean)}) / {_numbers(task.std)} a channel"
    if low >= 0 and high > 1 + TOLERANCE and high <= 255:
        yield Finding("raw-0-255", True, f"the numbers, {low:.4g} to {high:.4g}, look like pixels of 0..255; {mended}")
    elif low >= 0 and high <= 1 + TOLERANCE:
        yield Finding("raw-0-1", True, f"the numbers, {low:.4g} to {high:.4g}, look like pixels of 0..1; {mended}")
    elif _all_near(survey.low, -1) and _all_near(survey.high, 1) and not _all_near(darkest, -1):
        yield Finding("raw-minus-1-1", True, f"the numbers run from -1 to 1 exactly, as a decoder's output; {mended}")
    elif (survey.low < darkest - TOLERANCE).any() or (survey.high > brightest + TOLERANCE).any():
        yield Finding(
            "out-of-range",
            False,
            f"the numbers, {low:.4g} to {high:.4g}, go beyond black ({darkest.min():.4g}) or white "
            f"({brightest.max():.4g}): another mean and deviation than {task.name}'s?",
        )


def _flat(survey: Survey, data: LabelledImages, task: Task) -> Iterator[Finding]:
    if survey.flat:
        yield Finding("flat", True, f"{_which(survey.flat, data, task)} one flat colour")


def _repeated(survey: Survey, data: LabelledImages, task: Task) -> Iterator[Finding]:
    if survey.repeated:
        most = len(survey.repeated) > len(data.labels) / 2
        yield Finding("repeated", most, f"{_which(survey.repeated, data, task)} equal to earlier ones")


def _which(positions: list[int], data: LabelledImages, task: Task) -> str:
    """How many images, and where the first of them is."""
    first = positions[0]
    name = task.classes[int(data.labels[first])].name
    verb = "is" if len(positions) == 1 else "are"
    return f"{len(positions):,} of {len(data.labels):,} images (the first at {first}, a {name}) {verb}"


def _all_near(numbers: torch.Tensor, value: float) -> bool:
    return bool(((numbers - value).abs() < TOLERANCE).all())


def _numbers(values: Sequence[float]) -> str:
    return "(" + ", ".join(f"{value:g}" for value in values) + ")"


def _draw(data: LabelledImages, task: Task) -> bytes:
    """A contact sheet of the first image of each class."""
    classes = task.classes[:MOST_CLASSES]
    firsts = data.images[:: len(data.labels) // len(task.classes)][: len(classes)].float()
    mean, std = mean_and_std(task)
    pixels = ((firsts * std + mean) * 255).round().clamp(0, 255).to(torch.uint8)
    return draw_contact_sheet(pixels.numpy(), [one.name for one in classes])


if __name__ == "__main__":
    sys.exit(main())
