"""The prompts that the training asks for: every class of all tasks, in each style, and none at all."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from submission.tasks import Task
from tools.training.images import RealImages
from tools.training.layout import Conditioning, Networks, encode, token_ids

# How often a class is asked for in each style. `described` is the default; `diverse` has several phrasings to learn.
LABEL, DESCRIBED, DIVERSE = 0.2, 0.55, 0.25
ENCODED_AT_ONCE = 512


def phrasings_of(task: Task) -> list[list[str]]:
    """A task's prompts as they are trained on, `[phrasing][class]`: `label`, `described`, then those of `diverse`,
    where the task has any. Real images are photos, whatever else `diverse` asks for."""
    diverse = task.phrased() if task.has_phrasings else task.prompts("described")
    return [*task.prompts("label"), *task.prompts("described"), *diverse]


def all_prompts(tasks: Sequence[Task]) -> list[str]:
    """What a tokenizer learns its words from."""
    return [prompt for task in tasks for phrasing in phrasings_of(task) for prompt in phrasing]


@dataclass(frozen=True)
class Prompts:
    """`ids` int64 `[prompts, tokens]`, the last the empty prompt; `rows` int64 `[classes, phrasings]`, where those of
    each class stand; `shares` `[phrasings]`, how often each is drawn."""

    ids: Tensor
    rows: Tensor
    shares: Tensor

    @property
    def empty(self) -> int:
        """The row of the empty prompt."""
        return len(self.ids) - 1

    @property
    def described(self) -> Tensor:
        """The rows of the default prompts, int64 `[classes]`."""
        return self.rows[:, 1]

    def draw(self, images: RealImages, count: int, generator: torch.Generator) -> Tensor:
        """Rows of that many classes of a canvas at random, in proportion to their images, int64 `[count]`."""
        return self.draw_phrasings(images.draw_labels(count, generator), generator)

    def draw_phrasings(self, labels: Tensor, generator: torch.Generator) -> Tensor:
        """A row for each of `labels` `[N]`, of a phrasing at random."""
        phrasings = torch.multinomial(self.shares, len(labels), replacement=True, generator=generator)
        return self.rows[labels, phrasings]


def prompts_of(networks: Networks, tasks: Sequence[Task], device: torch.device) -> Prompts:
    """The prompts of all classes of the tasks, in a row."""
    every = [phrasings_of(task) for task in tasks]
    width = max(map(len, every))
    texts: dict[str, int] = {}
    rows = []
    for phrasings in every:
        # A task with fewer of the diverse ones begins anew with its first.
        columns = phrasings[:2] + [phrasings[2 + i % (len(phrasings) - 2)] for i in range(width - 2)]
        rows += [
            [texts.setdefault(prompt, len(texts)) for prompt in of_class] for of_class in zip(*columns, strict=True)
        ]
    shares = [LABEL, DESCRIBED, *[DIVERSE / (width - 2)] * (width - 2)]
    return Prompts(
        token_ids(networks, [*texts, ""]).to(device),
        torch.tensor(rows, device=device),
        torch.tensor(shares, device=device),
    )


def encode_rows(networks: Networks, prompts: Prompts, rows: Tensor) -> Conditioning:
    """The conditioning of rows, with gradients to both text encoders; each prompt once, where these are fewer."""
    if len(prompts.ids) <= len(rows):
        return encode(networks, prompts.ids).of(rows)
    return encode(networks, prompts.ids[rows])


@torch.no_grad()
def encode_prompts(networks: Networks, prompts: Prompts) -> Conditioning:
    """Of every row, when the text encoders have learnt what they will."""
    parts = [encode(networks, part) for part in torch.split(prompts.ids, ENCODED_AT_ONCE)]
    return Conditioning(*(torch.cat(part) for part in zip(*parts, strict=True)))
