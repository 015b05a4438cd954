"""What a task is: the classes of a data set in the evaluator's order, and the words that ask for them."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from submission.errors import UsageError

PromptStyle = Literal["label", "described", "diverse"]


@dataclass(frozen=True)
class TaskClass:
    """One class: its position in the evaluator's order and the words that ask for it."""

    index: int
    name: str
    label: str  # the paper's prompt
    described: str  # the default prompt, sent as it stands
    kind: str | None = None  # which phrasings suit it
    wnid: str | None = None  # WordNet id, where the data set is a part of ImageNet


@dataclass(frozen=True)
class Task:
    """A data set to imitate. `classes` is in the evaluator's order: `classes[i].index == i`."""

    name: str
    title: str
    size: int  # pixels, height = width of the images in the file
    mean: tuple[float, float, float]  # per channel (RGB), of pixels in 0..1
    std: tuple[float, float, float]
    max_ipc: int  # the cap: the most images per class that the file may hold
    classes: tuple[TaskClass, ...]
    phrasings: Mapping[str, tuple[str, ...]]  # kind -> templates with one {}; all lists of one length

    def prompts(self, style: PromptStyle) -> list[list[str]]:
        """Prompts as `[phrasing][class]`: one list for `label` and `described`, one a phrasing for `diverse`.

        Round r of the job uses list `r % len(prompts)`. Raises UsageError for `diverse` where the task has no
        phrasings, or a class no kind.
        """
        if style == "label":
            return [[c.label for c in self.classes]]
        if style == "described":
            return [[c.described for c in self.classes]]
        if not self.phrasings:
            raise UsageError(
                f"diverse prompts need phrasings, and task {self.name} has none: add a [phrasings] table "
                'such as thing = ["{}, close-up", "{}, from a distance"], and kind = "thing" to every class'
            )
        of_class: list[tuple[str, ...]] = []
        for c in self.classes:
            if c.kind is None:
                raise UsageError(
                    f"diverse prompts need a kind for every class, and {c.name} in task {self.name} has none: "
                    f"add one of {', '.join(self.phrasings)}"
                )
            of_class.append(tuple(template.replace("{}", c.described) for template in self.phrasings[c.kind]))
        return [list(one_phrasing) for one_phrasing in zip(*of_class, strict=True)]
