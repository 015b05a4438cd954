"""Training as the organisers' script does it, against `evaluate --protocol fast`, on the same images.

Each side is a process of its own, since ours changes how the C library gives memory back. They train in turns, one
waiting while the other works, so that a machine whose speed drifts slows both alike; the ratio is taken turn by turn.
"""

import argparse
import multiprocessing
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from itertools import chain, islice, repeat
from multiprocessing.connection import Connection
from typing import Any

import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, TensorDataset

from submission.arguments import add_device, number_from
from submission.distillation import dsa
from submission.distillation.convnet import ConvNet
from submission.machine.device import choose_device
from submission.machine.memory import keep_freed_memory
from tools.scoring.fast import make_forward, probe
from tools.scoring.training import BATCH_SIZE, Schedule, train

CLASSES = 100
# SGD steps per turn, and those of an epoch of CIFAR-100 with 500 images per class.
CPU_STEPS, GPU_STEPS, EPOCH_STEPS = 6, 1000, 195
FULL_RECIPE = 1001 * 50_000  # images of a run on CIFAR-100 with 500 per class


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--size", type=number_from(16), default=32, metavar="PX", help="of the images, pixels")
    add("--steps", type=number_from(1), metavar="N", help="SGD steps per turn (default: 6, on a GPU 1,000)")
    add("--turns", type=number_from(1), default=7, metavar="N", help="turns a side")
    add_device(parser)


def measure(options: argparse.Namespace) -> dict[str, object]:
    """Images a second of both sides, median over turns, and the median, least and largest ratio of a turn."""
    sides = {"published": _published, "fast": _fast}
    device = choose_device(options.device)
    steps = options.steps or (GPU_STEPS if device.type == "cuda" else CPU_STEPS)
    images = steps * BATCH_SIZE
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    context = multiprocessing.get_context("spawn")
    connections, processes = {}, []
    for name, side in sides.items():
        connections[name], theirs = context.Pipe()
        process = context.Process(target=_work, args=(side, steps, options.size, device, theirs), daemon=True)
        process.start()
        theirs.close()  # so that reading ends, should the process die
        processes.append(process)
        connections[name].recv()  # warm
    for _ in range(options.turns):
        for name, connection in connections.items():
            connection.send("go")
            seconds[name].append(connection.recv())
    for connection, process in zip(connections.values(), processes, strict=True):
        connection.close()  # ends it
        process.join()
    ratios = [published / fast for published, fast in zip(seconds["published"], seconds["fast"], strict=True)]
    return {
        "speedup": statistics.median(ratios),
        "speedup_least": min(ratios),
        "speedup_most": max(ratios),
        "images_per_second": {name: images / statistics.median(times) for name, times in seconds.items()},
        "full_recipe_seconds": {name: FULL_RECIPE / images * statistics.median(s) for name, s in seconds.items()},
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "threads": torch.get_num_threads(),
    }


def table(figures: dict[str, Any]) -> str:
    rates = figures["images_per_second"]
    minutes = figures["full_recipe_seconds"]["fast"] / 60
    return "\n".join(
        [
            f"{'training loop':<44}{'images/s':>9}{'ratio':>7}   spread over turns",
            f"{'published: eager, fp32, collated by image':<44}{rates['published']:>9.0f}{1:>7.2f}",
            f"{'evaluate --protocol fast':<44}{rates['fast']:>9.0f}{figures['speedup']:>7.2f}"
            f"   {figures['speedup_least']:.2f} to {figures['speedup_most']:.2f}",
            f"1,001 epochs of 50,000 images, by fast: {minutes:,.1f} min (estimate) on {figures['device']}",
        ]
    )


def _work(
    side: Callable[[torch.Tensor, torch.Tensor, int], Iterator[None]],
    steps: int,
    size: int,
    device: torch.device,
    connection: Connection,
) -> None:
    """A side's process: the first turn warms up; then one, timed, whenever it is told to."""
    torch.manual_seed(0)
    count = min(steps, EPOCH_STEPS) * BATCH_SIZE
    turns = side(torch.randn(count, 3, size, size).to(device), (torch.arange(count) % CLASSES).to(device), steps)
    next(turns)
    connection.send("warm")
    with suppress(EOFError):  # the other end is closed when enough is measured
        while connection.recv():
            started = time.perf_counter()
            next(turns)
            connection.send(time.perf_counter() - started)


def _published(images: torch.Tensor, labels: torch.Tensor, steps: int) -> Iterator[None]:
    """Turns of the published recipe: batches put together image by image, everything eager and in float32."""
    net = ConvNet(CLASSES, images.shape[-1]).to(images.device)
    optimiser = torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9, weight_decay=0.0005)
    loader = DataLoader(TensorDataset(images, labels), batch_size=BATCH_SIZE, shuffle=True)
    while True:
        loss_sum, right = 0.0, 0
        for inputs, targets in islice(chain.from_iterable(repeat(loader)), steps):
            logits = net(dsa.augment(inputs))
            loss = F.cross_entropy(logits, targets)
            loss_sum += loss.item() * len(targets)
            right += int((logits.argmax(dim=1) == targets).sum())
            optimiser.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimiser.step()
        yield


def _fast(images: torch.Tensor, labels: torch.Tensor, steps: int) -> Iterator[None]:
    """Turns of ours, each a training of its own."""
    keep_freed_memory()
    net = ConvNet(CLASSES, images.shape[-1]).to(images.device)
    forward = make_forward(net, BATCH_SIZE, probe(net, BATCH_SIZE))
    while True:
        train(net, images, labels, Schedule(epochs=steps, max_steps=steps), forward=forward, record=True)
        yield
