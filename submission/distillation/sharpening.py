"""Images moved on from a choice, until networks see in them what they see in the whole pool.

Distribution matching (Zhao & Bilen, arXiv 2110.04181): the mean features of the moved images of a class come nearer to
those of its images in the pool, after every block of the organisers' network and under their augmentation. As in what
came after it (Zhao et al., "Improved distribution matching", CVPR 2023), the networks are not left random: they learn
the pool meanwhile, and the moved images are to be recognised by them, too. Nothing real is looked at.
"""

import math
import time
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from submission.dataset.dataset_file import mean_and_std
from submission.dataset.rounds import Rounds
from submission.distillation import dsa
from submission.distillation.convnet import ConvNet
from submission.tasks import Task

# Steps, and how far Adam moves a normalised pixel in the first of them; the last moves none.
STEPS, RATE = 800, 0.02
# A step looks at so many images of the pool for each class.
SAMPLED = 64
# A network is made anew after so many steps. After each it learns so many batches of the pool, by Adam at this rate.
LIFE, LESSONS, BATCH, LEARNING_RATE = 100, 5, 256, 1e-3
# The weight of being recognised, in nats, beside the distances of features.
RECOGNISED = 0.0005
# Memory: bytes of the pool's images on the device, and pixels that go through a network at a time.
POOL_BYTES, PIXELS = 1 << 30, 4096 * 32**2


def sharpen(
    task: Task, device: torch.device, images: NDArray[np.uint8], pool: Rounds, go_on: Callable[[], bool]
) -> tuple[NDArray[np.uint8], int]:
    """The images uint8 [IPC, classes, 3, size, size] after so many steps, fewer than `STEPS` where `go_on`, which is
    asked before each, says no. The same in every run on a CPU; a GPU rounds differently each time. Raises
    torch.OutOfMemoryError, OSError."""
    rounds = np.arange(min(len(pool), max(1, POOL_BYTES // math.prod(pool.shape))))
    sample = torch.empty((pool.shape[0], len(rounds), *pool.shape[1:]), dtype=torch.uint8, device=device)
    for label in range(len(task.classes)):
        sample[label] = torch.from_numpy(pool[rounds, np.full(len(rounds), label)])
    with torch.random.fork_rng(devices=[torch.cuda.current_device()] if device.type == "cuda" else []):
        torch.manual_seed(0)
        sharpening = _Sharpening(task, sample, images)
        for step in range(STEPS):
            if not go_on():
                return sharpening.images, step
            sharpening.step(step)
        return sharpening.images, STEPS


def seconds(task: Task, device: torch.device, count: int) -> float:
    """What all steps take on a GPU for so many images per class, measured on noise. Raises torch.OutOfMemoryError."""
    shape = (count, len(task.classes), 3, task.size, task.size)
    noise = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    with torch.random.fork_rng(devices=[torch.cuda.current_device()]):
        sharpening = _Sharpening(task, torch.from_numpy(noise).to(device).transpose(0, 1).contiguous(), noise)
        taken = []
        for number in range(3):  # the first one is slow
            began = time.perf_counter()
            sharpening.step(number)
            torch.cuda.synchronize(device)
            taken.append(time.perf_counter() - began)
    return STEPS * min(taken)


class _Sharpening:
    """Images in the making. `pool` is uint8 [classes, rounds, 3, size, size], on the device."""

    def __init__(self, task: Task, pool: Tensor, images: NDArray[np.uint8]) -> None:
        self._pool, self._device = pool, pool.device
        self._classes, self._size = len(task.classes), task.size
        self._mean, self._std = (figure.to(self._device) for figure in mean_and_std(task))
        given = torch.from_numpy(images).to(self._device).transpose(0, 1)
        self._moved = self._normalised(given).requires_grad_()
        self._mover = torch.optim.Adam([self._moved], RATE, betas=(0.5, 0.9))
        self._bounds = -self._mean / self._std, (1 - self._mean) / self._std
        self._renew()

    @property
    def images(self) -> NDArray[np.uint8]:
        """Uint8 [IPC, classes, 3, size, size]."""
        pixels = (self._moved.detach() * self._std + self._mean) * 255
        moved: NDArray[np.uint8] = pixels.round().to(torch.uint8).transpose(0, 1).cpu().numpy()
        return moved

    def step(self, number: int) -> None:
        """The step of that number, from 0 to `STEPS` - 1."""
        if number % LIFE == 0:
            self._renew()
        self._mover.param_groups[0]["lr"] = RATE * (1 - number / STEPS)
        self.match()
        self._mover.step()
        self._mover.zero_grad()
        with torch.no_grad():
            self._moved.clamp_(*self._bounds)
        for _ in range(LESSONS):
            self.learn()

    def match(self) -> None:
        """Adds to the gradient of the images, some classes at a time."""
        self._network.requires_grad_(False)
        count = SAMPLED + self._moved.shape[1]
        some = max(1, PIXELS // (count * self._size**2))
        for start in range(0, self._classes, some):
            labels = torch.arange(start, min(start + some, self._classes), device=self._device)
            places = torch.randint(self._pool.shape[1], (len(labels), SAMPLED), device=self._device)
            self._distance(labels, self._pool[labels[:, None], places]).backward()  # type: ignore[no-untyped-call]
        self._network.requires_grad_(True)

    def learn(self) -> None:
        """The network's next lesson."""
        labels = torch.randint(self._classes, (BATCH,), device=self._device)
        places = torch.randint(self._pool.shape[1], (BATCH,), device=self._device)
        *_, logits = self._look(dsa.augment(self._normalised(self._pool[labels, places])))
        F.cross_entropy(logits, labels).backward()  # type: ignore[no-untyped-call]
        self._learner.step()
        self._learner.zero_grad()

    def _distance(self, labels: Tensor, real: Tensor) -> Tensor:
        """Of the moved images of some classes from images of the pool, uint8 [classes, n, 3, size, size]."""
        moved = self._moved[labels]
        classes, count = moved.shape[:2]
        # Both through the same operation, as a batch of the evaluator goes.
        operation, others = dsa.draw(real.shape[1] * classes + count * classes)
        together = torch.cat([self._normalised(real).flatten(0, 1), moved.flatten(0, 1)])
        seen = operation(together, *(other.to(self._device) for other in others))
        with torch.no_grad():
            *wanted, _ = self._look(seen[: -count * classes])
        *found, logits = self._look(seen[-count * classes :])
        distance = RECOGNISED * F.cross_entropy(logits, labels.repeat_interleave(count)) * classes
        for these, those in zip(found, wanted, strict=True):
            ours, theirs = (part.view(classes, -1, *part.shape[1:]).mean(1) for part in (these, those))
            distance = distance + F.mse_loss(ours, theirs) * classes
        return distance

    def _look(self, images: Tensor) -> list[Tensor]:
        """What the network makes of images: features after each block, and logits; float32."""
        seen = []
        with torch.autocast(self._device.type, torch.bfloat16, enabled=self._device.type == "cuda"):
            for layer in self._network.features:
                images = layer(images)
                if isinstance(layer, nn.AvgPool2d):
                    seen.append(images)
            seen.append(self._network.classifier(images.flatten(1)))
        return [part.float() for part in seen]

    def _normalised(self, images: Tensor) -> Tensor:
        return (images.float() / 255 - self._mean) / self._std

    def _renew(self) -> None:
        """Another network, which knows nothing yet."""
        self._network = ConvNet(self._classes, self._size).to(self._device)
        self._learner = torch.optim.Adam(self._network.parameters(), LEARNING_RATE)
