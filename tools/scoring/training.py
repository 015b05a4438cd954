"""The organisers' training recipe: a ConvNet from scratch on a synthetic set, then tested on real images.

SGD at 0.01 with momentum 0.9 and weight decay 5e-4, batches of 256 in random order, one augmentation drawn a batch,
cross entropy; a new optimiser (its momentum forgotten) at a tenth of the rate a little after the middle.
Every random number comes from torch's global generators in the reference's order.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader

from submission.distillation import dsa
from submission.distillation.convnet import ConvNet
from tools.scoring.recorded import recorded

BATCH_SIZE = 256
LEARNING_RATE = 0.01
RESTART_FACTOR = 0.1
MOMENTUM = 0.9
WEIGHT_DECAY = 5e-4
# On a GPU, steps whose measures are read together: it would stand still for each.
STEPS_UNREAD = 100


@dataclass(frozen=True)
class Schedule:
    """How long a run trains."""

    epochs: int = 1000  # number of the last epoch; they count from 0, so there is one more of them
    max_steps: int | None = None  # a shorter run: this many SGD steps, with the restart at half of them
    batch_size: int = BATCH_SIZE

    def steps(self, images: int) -> int:
        """SGD steps of a run on that many images."""
        full = self._full_steps(images)
        return full if self.max_steps is None else min(self.max_steps, full)

    def restart(self, images: int) -> int:
        """The step count after which the optimiser is made anew. It may lie past the end of the run."""
        if self.max_steps is not None and self.max_steps < self._full_steps(images):
            return self.max_steps // 2
        return (self.epochs // 2 + 2) * self._epoch_steps(images)  # after epoch E//2 + 1, counted from 0

    def images_per_step(self, images: int) -> float:
        """The mean size of a batch: the last one of an epoch may be smaller."""
        return images / self._epoch_steps(images)

    def _epoch_steps(self, images: int) -> int:
        return -(-images // self.batch_size)

    def _full_steps(self, images: int) -> int:
        return (self.epochs + 1) * self._epoch_steps(images)


@dataclass(frozen=True)
class Measure:
    """Mean cross entropy (nats) and accuracy (0..1) over the images of an epoch or of a test set."""

    loss: float
    accuracy: float


def train(
    net: ConvNet,
    images: torch.Tensor,
    labels: torch.Tensor,
    schedule: Schedule,
    on_step: Callable[[int, Measure], None] = lambda step, measure: None,
    forward: Callable[[torch.Tensor], torch.Tensor] | None = None,
    *,
    record: bool = False,
) -> list[Measure]:
    """Train the network in place; the measure of each epoch, taken in passing on augmented images.

    Args:
        net: on the device that trains.
        images: float32 or float16 [N, 3, H, W], normalised; they may lie elsewhere, memory-mapped files included.
        labels: int64 [N], on the device of the images.
        schedule: how long; a run that it stops inside an epoch has a last measure of the part done.
        on_step: told the number of steps done and the measure of the batch, after each step.
        forward: called for the logits in the net's place, on at most `schedule.batch_size` images; its gradients
            have to arrive in the net's parameters. The random numbers drawn are the same.
        record: on a GPU, launch each step of full size as a recording, one for every operation of the augmentation.
    """
    steps, restart = schedule.steps(len(images)), schedule.restart(len(images))
    device = next(net.parameters()).device
    full_size = schedule.batch_size if record else math.inf
    window = STEPS_UNREAD if device.type == "cuda" else 1
    step = _Stepper(forward or net, _sgd(net, LEARNING_RATE), device)
    order = _random_order(len(images), schedule.batch_size)
    net.train()
    epochs = []
    done = 0
    while done < steps:
        batches: list[tuple[int, Measure]] = []
        unread: list[tuple[int, torch.Tensor]] = []
        for indices in order:
            chosen = _sent(indices, images.device)
            inputs, targets = images[chosen].to(device, torch.float32), labels[chosen].to(device)
            operation, others = dsa.draw(len(indices))
            found = step(operation, inputs, targets, *others, record=len(indices) == full_size)
            unread.append((len(indices), found))
            done += 1
            if done == restart:
                step = _Stepper(forward or net, _sgd(net, LEARNING_RATE * RESTART_FACTOR), device)
            if len(unread) >= window or done == steps:
                _read(unread, batches, done, on_step)
            if done == steps:
                break
        _read(unread, batches, done, on_step)
        epochs.append(_mean(batches))
    return epochs


class _Stepper:
    """Steps of SGD on the mean cross entropy of a batch, each of which returns [loss, accuracy], float32 [2]."""

    def __init__(
        self, forward: Callable[[torch.Tensor], torch.Tensor], optimiser: torch.optim.SGD, device: torch.device
    ) -> None:
        self._forward, self._optimiser, self._device = forward, optimiser, device
        self._recorded: dict[dsa.Operation, Callable[..., torch.Tensor]] = {}
        self._pool = torch.cuda.graph_pool_handle() if device.type == "cuda" else None

    def __call__(
        self, operation: dsa.Operation, images: torch.Tensor, labels: torch.Tensor, *others: torch.Tensor, record: bool
    ) -> torch.Tensor:
        # Of a function that knows nothing of this object: a cycle would keep recordings, and their memory, for long.
        step: Callable[..., torch.Tensor] = partial(_step, self._forward, self._optimiser, operation)
        if record:
            if operation not in self._recorded:
                self._recorded[operation] = recorded(step, self._device, self._pool)
            step = self._recorded[operation]
        return step(images, labels, *(_sent(other, self._device) for other in others)).clone()


def _step(
    forward: Callable[[torch.Tensor], torch.Tensor],
    optimiser: torch.optim.SGD,
    operation: dsa.Operation,
    images: torch.Tensor,
    labels: torch.Tensor,
    *others: torch.Tensor,
) -> torch.Tensor:
    optimiser.zero_grad()
    logits = forward(operation(images, *others))
    loss = F.cross_entropy(logits, labels)
    loss.backward()  # type: ignore[no-untyped-call]
    optimiser.step()
    return torch.stack([loss.detach(), (logits.argmax(dim=1) == labels).float().mean()])


def _sent(numbers: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Numbers from the CPU on the device. A GPU is not waited for, as it would be if they lay in ordinary memory."""
    return numbers.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else numbers


def _read(
    unread: list[tuple[int, torch.Tensor]],
    batches: list[tuple[int, Measure]],
    done: int,
    on_step: Callable[[int, Measure], None],
) -> None:
    """Waits for the measures of steps that were launched, the last of them step `done`, and hands them on."""
    if not unread:
        return
    first = done - len(unread) + 1
    for number, ((count, _), values) in enumerate(
        zip(unread, torch.stack([found for _, found in unread]).tolist(), strict=True), first
    ):
        measure = Measure(*values)
        batches.append((count, measure))
        on_step(number, measure)
    unread.clear()


@torch.no_grad()
def assess(
    net: ConvNet, images: torch.Tensor, labels: torch.Tensor, batch_size: int = BATCH_SIZE
) -> tuple[Measure, torch.Tensor]:
    """Mean loss and accuracy on the images as they are, and predictions in their order, int64 [N] on the CPU.

    Arguments are those of `train`. The order in which images are looked at is random, as the reference's is: it matters
    to the random numbers that the next run gets.
    """
    device = next(net.parameters()).device
    net.eval()
    batches = []
    predictions = torch.empty(len(images), dtype=torch.int64)
    for indices in _random_order(len(images), batch_size):
        logits, targets = net(images[indices].to(device, torch.float32)), labels[indices].to(device)
        measure = Measure(F.cross_entropy(logits, targets).item(), _accuracy(logits, targets))
        batches.append((len(indices), measure))
        predictions[indices] = logits.argmax(dim=1).cpu()
    return _mean(batches), predictions


def _random_order(images: int, batch_size: int) -> DataLoader[torch.Tensor]:
    """Batches of indices in a new random order each time it is walked through.

    A DataLoader, although only indices are loaded, because the order of the reference is its order: it takes two
    numbers from the global generator at the start of an epoch.
    """
    return DataLoader(range(images), batch_size, shuffle=True, collate_fn=torch.tensor)  # type: ignore[arg-type]


def _sgd(net: ConvNet, learning_rate: float) -> torch.optim.SGD:
    return torch.optim.SGD(net.parameters(), learning_rate, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY)


def _accuracy(logits: torch.Tensor, labels: torch.Tensor) -> float:
    return (logits.argmax(dim=1) == labels).sum().item() / len(labels)


def _mean(batches: list[tuple[int, Measure]]) -> Measure:
    """The mean over images of measures over batches, given as (images, measure)."""
    images = sum(count for count, _ in batches)
    return Measure(
        sum(count * measure.loss for count, measure in batches) / images,
        sum(count * measure.accuracy for count, measure in batches) / images,
    )
