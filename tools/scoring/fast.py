"""How `--protocol fast` computes the network's logits: compiled, and in bfloat16 where the hardware gains by it.

Weights, the optimiser, the loss and the test stay in float32, and the random numbers drawn are those of the official
protocol: only rounding differs. Runs are trained one after the other: on a CPU, one fills the cores.
"""

import logging
import timeit
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from submission.distillation.convnet import ConvNet

# How many times as fast bfloat16 has to multiply matrices, to make up for the conversions. A processor that emulates it
# was a hundred times slower in it, one that has it four times as fast.
BF16_GAIN = 1.5


@dataclass(frozen=True)
class Arithmetic:
    """What was found to work here."""

    compiled: bool
    bf16: bool


def probe(net: ConvNet, batch_size: int) -> Arithmetic:
    """Find out what makes the network faster where it is, and compile it by the way; half a minute at most.

    Without a C++ compiler (on a GPU, without Triton) there is nothing to compile with.
    """
    # It warns of a CUDA toolkit without a GPU, which is none of a user's business here.
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    device = next(net.parameters()).device
    bf16 = _matmul_seconds(torch.bfloat16, device) * BF16_GAIN < _matmul_seconds(torch.float32, device)
    arithmetic = Arithmetic(compiled=True, bf16=bf16)
    images = torch.zeros(batch_size, 3, net.size, net.size, device=device)
    try:
        make_forward(net, batch_size, arithmetic)(images).sum().backward()  # type: ignore[no-untyped-call]
    except torch._dynamo.exc.TorchDynamoException:  # looked up late: to import it takes as long as torch
        return Arithmetic(compiled=False, bf16=bf16)
    return arithmetic


def make_forward(net: ConvNet, batch_size: int, arithmetic: Arithmetic) -> Callable[[torch.Tensor], torch.Tensor]:
    """A stand-in for calling `net` on at most `batch_size` images; gradients arrive in the net's parameters.

    A smaller batch is filled up with zeros whose logits are dropped: the code is compiled for one shape. It serves
    every net of that shape in the process, and torch keeps it on disk for later ones.
    """
    device_type = next(net.parameters()).device.type
    run = torch.compile(ConvNet.forward, dynamic=False) if arithmetic.compiled else ConvNet.forward

    def forward(images: torch.Tensor) -> torch.Tensor:
        filled = F.pad(images, (0, 0, 0, 0, 0, 0, 0, batch_size - len(images))) if len(images) < batch_size else images
        with torch.autocast(device_type, torch.bfloat16, enabled=arithmetic.bf16):
            return run(net, filled)[: len(images)].float()

    return forward


def _matmul_seconds(dtype: torch.dtype, device: torch.device) -> float:
    """The best of a few times for a product of two square matrices, large ones on a GPU, where small take no time."""
    size = 4096 if device.type == "cuda" else 512
    matrix = torch.ones(size, size, dtype=dtype, device=device)
    return min(timeit.repeat("(matrix @ matrix)[0, 0].item()", globals=locals(), number=1, repeat=5))
