"""Tasks: what a data set to imitate consists of. One TOML a task, the built-in ones beside this file.

A task file of one's own has the same form. The least it can hold:

    name = "pets"                 # the output file's name, too
    size = 64                     # pixels, height = width, even
    mean = [0.5, 0.5, 0.5]        # per channel, of pixels in 0..1
    std = [0.25, 0.25, 0.25]
    max_ipc = 500                 # the most images per class in the file
    classes = [
      { index = 0, name = "house_cat" },
      { index = 1, name = "dog", described = "a photo of a dog playing on a lawn" },
    ]

Indices run from 0 without a gap; they are the labels the evaluator gives to positions. A class may also have
`label` (the bare words; default: the name with underscores as spaces), `described` (the prompt sent as it stands;
default: "a photo of a/an LABEL"), `wnid` and `kind`. A kind is a key of the optional `[phrasings]` table, whose
lists, all of one length, hold templates with one `{}` for the described prompt; `diverse` takes them in turn, and then
again in other domains ("a drawing of ..."), where all descriptions begin with "a photo of".
"""

import difflib
from pathlib import Path

from submission.errors import UsageError
from submission.tasks.parse import did_you_mean, parse_prompts, parse_task
from submission.tasks.task import PromptStyle, Task, TaskClass

__all__ = ["PromptStyle", "Task", "TaskClass", "builtin_names", "load_task", "parse_prompts"]


def builtin_names() -> list[str]:
    """Names of the tasks that come along, sorted."""
    return sorted(path.stem for path in Path(__file__).parent.glob("*.toml"))


def load_task(name_or_path: str) -> Task:
    """The built-in task of that name, or the one in that `.toml` file.

    Raises UsageError for an unknown name (with the closest one) and for a bad file (`FILE:LINE: what is wrong`).
    """
    names = builtin_names()
    if name_or_path in names:
        return parse_task(Path(__file__).parent / f"{name_or_path}.toml")
    path = Path(name_or_path)
    if path.suffix == ".toml" or len(path.parts) > 1:
        return parse_task(path)
    files = [file.name for file in Path().glob("*.toml") if file.stem == name_or_path]
    close = files or difflib.get_close_matches(name_or_path.lower(), names, n=1)
    raise UsageError(
        f"no task is called {name_or_path!r}{did_you_mean(close)}; "
        f"there are {', '.join(names)}, or give the path of a .toml file"
    )
