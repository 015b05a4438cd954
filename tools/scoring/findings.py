"""What makes a training set worthless and shows in its numbers: pixels left unnormalised, flat or repeated images."""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from submission.tasks import Task
from tools.reading.tensor_files import LabelledImages, read_submission

# Pixels of images looked at together: 12 MB of float32.
PIXELS_PER_CHUNK = 1 << 20
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


def audit(path: Path, task: Task) -> list[Finding]:
    """All that is wrong with the file, the worst first. Raises InputFileError for one that cannot be read at all."""
    return inspect(read_submission(path, task), task)


def inspect(data: LabelledImages, task: Task) -> list[Finding]:
    """All that is wrong with the images of a submission that could be read, the worst first."""
    survey = _survey(data.images)
    found = list(_normalisation(survey, task))
    if survey.flat:
        found.append(Finding("flat", True, f"{_which(survey.flat, data, task)} one flat colour"))
    if survey.repeated:
        most = len(survey.repeated) > len(data.labels) / 2
        found.append(Finding("repeated", most, f"{_which(survey.repeated, data, task)} equal to earlier ones"))
    return sorted(found, key=lambda finding: not finding.fatal)


def _survey(images: torch.Tensor) -> Survey:
    low, high = torch.full((3,), torch.inf), torch.full((3,), -torch.inf)
    flat: list[int] = []
    repeated: list[int] = []
    seen: set[bytes] = set()
    step = max(1, PIXELS_PER_CHUNK // images[0, 0].numel())
    for start in range(0, len(images), step):
        chunk = images[start : start + step].float().contiguous()
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
