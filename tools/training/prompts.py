"""The prompts that the training asks for: every class of all tasks, in each style, and none at all."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from submission.tasks import PromptStyle, Task
from tools.training.layout import Conditioning, Networks, encode, token_ids

# How often a class is asked for in each style. `described` is the default; `diverse` has eight phrasings to learn.
STYLE_SHARES: dict[PromptStyle, float] = {"label": 0.2, "described": 0.55, "diverse": 0.25}
ENCODED_AT_ONCE = 512


def all_prompts(tasks: Sequence[Task]) -> list[str]:
    """What a tokenizer learns its words from."""
    return [
        prompt for task in tasks for style in STYLE_SHARES for phrasing in of_style(task, style) for prompt in phrasing
    ]


def of_style(task: Task, style: PromptStyle) -> list[list[str]]:
    """A task's prompts as they are trained on: real images are photos, whatever else `diverse` asks for."""
    return task.phrased() if style == "diverse" else task.prompts(style)


@dataclass(frozen=True)
class Prompts:
    """`ids` int64 `[phrasings * classes + 1, tokens]`: phrasing by phrasing those of all classes, then the empty
    prompt. How often each is drawn: `phrasing_shares` `[phrasings]`, `class_shares` `[classes]`."""

    ids: Tensor
    phrasing_shares: Tensor
    class_shares: Tensor

    @property
    def empty(self) -> int:
        """The row of the empty prompt."""
        return len(self.ids) - 1

    def draw(self, count: int, generator: torch.Generator) -> Tensor:
        """Rows of that many classes at random, int64 `[count]`."""
        labels = torch.multinomial(self.class_shares, count, replacement=True, generator=generator)
        return self.draw_phrasings(labels, generator)

    def draw_phrasings(self, labels: Tensor, generator: torch.Generator) -> Tensor:
        """A row for each of `labels` `[N]`, of a phrasing at random."""
        phrasings = torch.multinomial(self.phrasing_shares, len(labels), replacement=True, generator=generator)
        return phrasings * len(self.class_shares) + labels


def prompts_of(networks: Networks, tasks: list[Task], counts: Tensor) -> Prompts:
    """The prompts of all classes of the tasks, in a row, a class drawn in proportion to its real images, `counts`."""
    ids, shares = [], []
    for style, share in STYLE_SHARES.items():
        phrasings = list(zip(*(of_style(task, style) for task in tasks), strict=True))
        for phrasing in phrasings:
            ids.append(torch.cat([token_ids(networks, of_task) for of_task in phrasing]))
            shares.append(share / len(phrasings))
    everything = torch.cat([*ids, token_ids(networks, [""])])
    return Prompts(everything.to(counts.device), torch.tensor(shares, device=counts.device), counts.float())


@torch.no_grad()
def encode_prompts(networks: Networks, prompts: Prompts) -> Conditioning:
    """Of every row, when the text encoders have learnt what they will."""
    parts = [encode(networks, part) for part in torch.split(prompts.ids, ENCODED_AT_ONCE)]
    return Conditioning(*(torch.cat(part) for part in zip(*parts, strict=True)))
