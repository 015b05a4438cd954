"""How fast a device is: work timed to its end, and the matrix product that everything else is held against."""

import time
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from submission.model.generator import Generator
from submission.model.sampler import draw, sample

GEMM_SIZE, TRIALS = 4096, 5


def synchronise(device: torch.device) -> None:
    """Waits for what the device has been given to do."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def fastest(work: Callable[[], object], device: torch.device, trials: int = TRIALS) -> float:
    """Seconds that the work takes on the device, the least of a few trials."""
    seconds = []
    for _ in range(trials):
        synchronise(device)
        began = time.perf_counter()
        work()
        synchronise(device)
        seconds.append(time.perf_counter() - began)
    return min(seconds)


def gemm_flops(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a product of two square matrices of `GEMM_SIZE`."""
    matrix = torch.randn(GEMM_SIZE, GEMM_SIZE).to(device, dtype)
    return 2 * GEMM_SIZE**3 / fastest(lambda: torch.mm(matrix, matrix), device)


def unet_step(generator: Generator, batch: int) -> Callable[[], Tensor]:
    """The UNet's work for a batch of the generator's images, beside which nothing is done."""
    sampler = generator.sampler
    classes = torch.arange(batch) % len(generator.task.classes)
    draws = draw(sampler, 0, classes.tolist(), [0] * batch)
    prompts = generator.prompt_of[0, classes]
    return partial(sample, sampler, generator.conditioning, prompts, draws)


def unet_flop(generator: Generator) -> float:
    """FLOP that the UNet takes per image."""
    with FlopCounterMode(display=False) as counter:
        unet_step(generator, 1)()
    return float(counter.get_total_flops())
