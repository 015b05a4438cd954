"""What the training computes in: bfloat16 where the hardware has it, float32 elsewhere."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

# torch.cpu.get_capabilities' names for instructions that multiply in bfloat16.
HAS_BFLOAT16 = ("avx512_bf16", "amx_bf16", "bf16")


def compute_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 or float32. Emulated, bfloat16 was fifty times slower than float32.

    Asked of the processor and not timed, as the job does: a training repeats itself to the bit only in one dtype.
    """
    if device.type == "cuda":
        return torch.bfloat16
    capabilities = torch.cpu.get_capabilities()
    return torch.bfloat16 if any(capabilities.get(name, False) for name in HAS_BFLOAT16) else torch.float32


@contextmanager
def computing(device: torch.device) -> Iterator[None]:
    """The context that networks run in."""
    # Torch's fused attention is slow on a CPU at so few tokens: its backward pass alone took a quarter of a step.
    attention = sdpa_kernel(SDPBackend.MATH) if device.type == "cpu" else nullcontext()
    # Weights in the other dtype are not kept: a recorded step (`recorded`) would find those it was recorded with.
    enabled = compute_dtype(device) == torch.bfloat16
    with torch.autocast(device.type, torch.bfloat16, enabled=enabled, cache_enabled=False), attention:
        yield
