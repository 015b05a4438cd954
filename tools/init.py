"""Writes a task of your own, to be looked through and edited, from a list of class names.

./run.sh init my-classes.toml --classes names.txt --size 64
"""

import argparse
import json
import os
import re
import shlex
import unicodedata
from collections.abc import Sequence
from pathlib import Path

from submission.arguments import Parser, exit_code_of, number_from
from submission.errors import InputFileError, UsageError
from submission.machine.disk import write_whole
from submission.tasks import builtin_names
from submission.tasks.parse import MAX_BYTES, check_file_name, check_size, default_prompt, read_text
from tools.reading.image_folder import find_images, mean_and_deviation

# Of ImageNet's training images: photographs of all kinds of things.
IMAGENET_MEAN, IMAGENET_STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
# Some languages spell with them: zero width non-joiner, and joiner.
JOINERS = "\u200c\u200d"
# Characters that change nothing that could be told apart, when names are compared: joiners, and how a sign is drawn.
UNSEEN = f"[{JOINERS}\ufe0e\ufe0f]"
# What begins no name: comments, bullets, quotes and brackets of other kinds of lists, ids of WordNet; what ends none.
NO_NAME = r"#|//|;|%|<|[-*+•▪\u2013\u2014]\s|\[.?\]\s|[\[\]{}'\"]|n\d{8}\b|.*[,:]$"
# Text encoders read some 70 words.
LONGEST_NAME = 200
# What can be said of anything. The first is the prompt as it stands.
PHRASINGS = (
    "{}",
    "{}, close-up filling the frame",
    "{}, small in the frame, wide surroundings",
    "{}, seen from the side",
    "{}, seen at an angle from above",
    "{}, outdoors in clear daylight",
    "{}, in warm evening light with long shadows",
    "{}, on a plain background",
)

TEMPLATE = """\
# {name}: {count} classes. The index is the label, and the order of the classes in the file that is made.
# Look through the prompts. What they leave open the model decides: "a photo of a crane" may be a bird or a machine.

name = "{name}"  # of the files: {name}.pt, {name}.json, {name}.png
size = {size}  # pixels, height = width of the images in the file
mean = {mean}  # per channel, of pixels in 0..1: (pixel - mean) / std is what the file holds, {source}
std = {std}
max_ipc = 500  # the most images per class in the file

# `described` is sent to the model as it stands; `label`, where you add one, is what `--prompts label` sends, instead of
# the name. `kind` says which of the phrasings below suit the class; `wnid` may name its folder of test images, too.
classes = [
{classes}
]

# What `--prompts diverse` makes of a described prompt, {{}}: one a round, in turn; where all begin with "a photo of",
# then once more as drawings, paintings and sketches. Kinds of your own may stand beside `thing`, each with as many
# phrasings.
[phrasings]
thing = [
{phrasings}
]
"""


def build_parser() -> Parser:
    parser = Parser(
        prog="./run.sh init",
        description="Writes a task of your own, to be edited, from a list of class names: prompts, phrasings, size and "
        "normalisation, with a comment on each. No file is overwritten.",
        epilog="example:\n  ./run.sh init my-classes.toml --classes names.txt --size 64\n  ./run.sh my-classes.toml\n\n"
        "exit codes: 0 written; 2 usage; 5 it cannot be written; 6 the names or images were refused",
    )
    add = parser.add_argument
    add("file", type=Path, metavar="TASK.toml", help="a new file; its name becomes the task's")
    add(
        "--classes",
        type=Path,
        required=True,
        metavar="NAMES.txt",
        help="UTF-8 text: a class per line, in order of labels",
    )
    add("--size", type=number_from(1), default=64, metavar="PX", help="side of the images, even, 8 to 1024")
    add("--images", type=Path, metavar="DIR", help="whose mean and deviation to take (default: those of ImageNet)")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    options = build_parser().parse_args(arguments)
    return exit_code_of(lambda: init(options))


def init(options: argparse.Namespace) -> None:
    """Read the names and write the task. Raises UsageError, InputFileError, OutputError."""
    file: Path = options.file
    check_target(file)
    if complaint := check_size(options.size):
        raise UsageError(f"--size {options.size}: {complaint}")
    names = read_names(options.classes)
    mean, std, source = IMAGENET_MEAN, IMAGENET_STD, "ImageNet's"
    if options.images:
        images = find_images(options.images)
        if not images:
            raise InputFileError(f"{options.images}: no images there")
        mean, std = mean_and_deviation(images, options.size)
        if min(std) <= 0:
            raise InputFileError(
                f"{options.images}: a colour channel of its images has one value, and no deviation: leave out --images"
            )
        source = f"those of {len(images):,} images"
    text = task_text(file.stem, names, options.size, mean, std, source)
    if len(text.encode()) > MAX_BYTES:
        raise InputFileError(
            f"{options.classes}: {len(names):,} names make a task of {len(text.encode()) / 2**20:.1f} MiB, and "
            f"{MAX_BYTES >> 20} MiB are the most: give fewer or shorter ones"
        )
    write_whole(file, text.encode())
    print(f"{file}: {len(names):,} classes at {options.size} px, mean and deviation {source}")
    print(f"look through its prompts, and then: {shlex.join(['./run.sh', str(file)])}")


def check_target(file: Path) -> None:
    """Raises UsageError where a task cannot be called like that."""
    if file.suffix != ".toml":
        raise UsageError(f"{file}: a task's file ends in .toml: name it {file.name}.toml")
    if complaint := check_file_name(file.stem):
        raise UsageError(f"{file}: its name less .toml, {file.stem!r}, becomes the task's name, and that {complaint}")
    if os.access(file, os.F_OK):
        raise UsageError(f"{file} is there already: remove it, or name another")
    if file.stem in builtin_names():
        raise UsageError(f"{file}: {file.stem} is the name of a task that comes along: choose another")


def read_names(path: Path) -> list[str]:
    """The class names in a text file, a line each. Raises InputFileError, with the line where it is one's fault."""
    names: list[str] = []
    lines: dict[str, int] = {}
    # Lines as editors count them; str.splitlines knows of many more ends.
    every = re.split(r"\r\n|\n|\r", read_text(path, InputFileError))
    filled = [line.strip() for line in every if line.strip()]
    if numbered := _numbered(filled):
        raise InputFileError(f"{path}:1: its lines are numbered, as {numbered!r}: leave the names alone, one per line")
    for number, line in enumerate(every, 1):
        name = unicodedata.normalize("NFC", line.strip())  # what looks the same is the same
        if not name:
            continue
        if complaint := _complaint(name):
            raise InputFileError(f"{path}:{number}: {complaint}")
        # In small letters, as text encoders read them.
        prompt = default_prompt(" ".join(re.sub(UNSEEN, "", name).split())).lower()
        if prompt in lines:
            raise InputFileError(
                f"{path}:{number}: {name!r} asks for the same as line {lines[prompt]}: write what sets them apart, as "
                "in 'crane (bird)' and 'crane (machine)'"
            )
        lines[prompt] = number
        names.append(name)
    if len(names) < 2:
        raise InputFileError(f"{path}: {len(names)} class names, and a task has two or more: write one a line")
    return names


def _toml(text: str) -> str:
    """As a TOML string, whose form JSON's is for what is printable."""
    return json.dumps(text, ensure_ascii=False)


def task_text(
    name: str, names: Sequence[str], size: int, mean: Sequence[float], std: Sequence[float], source: str
) -> str:
    """The TOML of a task: `load_task` reads these names back. `source` says whose mean and deviation these are."""
    classes = [
        f'  {{ index = {index}, name = {_toml(one)}, kind = "thing", described = {_toml(default_prompt(one))} }},'
        for index, one in enumerate(names)
    ]
    return TEMPLATE.format(
        name=name,
        count=f"{len(names):,}",
        size=size,
        mean=list(mean),
        std=list(std),
        source=source,
        classes="\n".join(classes),
        phrasings="\n".join(f"  {_toml(phrasing)}," for phrasing in PHRASINGS),
    )


def _complaint(name: str) -> str | None:
    """What keeps a line from being a class name."""
    if re.match(NO_NAME, name):
        return f"{name!r} looks like a comment or an item of a list: leave names alone, one per line"
    if len(name) > LONGEST_NAME:
        return f"{len(name):,} characters are too many for a class name, at most {LONGEST_NAME}: {name[:30]!r}..."
    for character in name:
        if not character.isprintable() and character not in JOINERS:
            called = unicodedata.name(character, "a control character")
            return f"a class name cannot hold U+{ord(character):04X}, {called}: {name!r}"
    if not re.sub(UNSEEN, "", name).strip("_ "):
        return f"a class name of nothing that can be read: {name!r}"
    return None


def _numbered(lines: Sequence[str]) -> str | None:
    """The first line with a number beside its name, where all lines have one, but perhaps for a heading: running ones
    before a blank, any beside what sets columns apart."""
    for given in (lines, lines[1:]):
        columns = [re.match(r"[\W_]*(\d+)\s*[\t,;:|=)\]]\s*\S|.*\S\s*[\t,;:|=]\s*(\d+)$", line) for line in given]
        blanks = [re.match(r"\W?(\d+)\W?[\s.\-_]\s*\S", line) for line in given]
        running = {int(found[1]) for found in blanks if found}
        if len(given) > 1 and (
            all(columns) or (all(blanks) and running in (set(range(len(given))), set(range(1, len(given) + 1))))
        ):
            return given[0]
    return None


if __name__ == "__main__":
    raise SystemExit(main())
