"""What a task is: the classes of a data set in the evaluator's order, and the words that ask for them."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from submission.errors import UsageError

# `own` are a user's, from a file.
PromptStyle = Literal["label", "described", "diverse", "own"]
# What diverse prompts ask for in place of the photo that a description begins with, one after the other. Images of
# several domains made better training sets for CIFAR-100 than photos alone (Shipard et al., arXiv 2302.03298).
PHOTO = "a photo of "
DOMAINS = (PHOTO, "a drawing of ", "a painting of ", "a sketch of ")


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
    own_prompts: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  # class -> one or more

    def prompts(self, style: PromptStyle) -> list[list[str]]:
        """Prompts as `[phrasing][class]`: one list for `label` and `described`; for `diverse` one per phrasing, in each
        domain; for `own` as many as the class with most has, classes with fewer beginning anew.

        Round r of the job uses list `r % len(prompts)`. Raises UsageError for `diverse` where the task has no
        phrasings, or a class no kind.
        """
        if style == "own":
            own = [self.own_prompts[c.name] for c in self.classes]
            return [[prompts[row % len(prompts)] for prompts in own] for row in range(max(map(len, own)))]
        if style == "label":
            return [[c.label for c in self.classes]]
        if style == "described":
            return [[c.described for c in self.classes]]
        phrased = self.phrased()
        domains = DOMAINS if all(c.described.startswith(PHOTO) for c in self.classes) else (PHOTO,)
        return [
            [domain + prompt.removeprefix(PHOTO) if len(domains) > 1 else prompt for prompt in row]
            for domain in domains
            for row in phrased
        ]

    @property
    def has_phrasings(self) -> bool:
        """Whether `diverse` prompts can be had."""
        return bool(self.phrasings) and all(c.kind is not None for c in self.classes)

    def phrased(self) -> list[list[str]]:
        """The described prompts in each phrasing, `[phrasing][class]`. Raises UsageError as `prompts` does."""
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
