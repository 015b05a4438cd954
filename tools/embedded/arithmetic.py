"""What the training computes in: bfloat16 where the processor has it, float32 elsewhere."""

import torch

# torch.cpu.get_capabilities' names for instructions that multiply in bfloat16.
HAS_BFLOAT16 = ("avx512_bf16", "amx_bf16", "bf16")


def compute_dtype() -> torch.dtype:
    """bfloat16 or float32. Emulated, bfloat16 was fifty times slower than float32.

    Asked of the processor and not timed, as the job does: a training repeats itself to the bit only in one dtype.
    """
    capabilities = torch.cpu.get_capabilities()
    return torch.bfloat16 if any(capabilities.get(name, False) for name in HAS_BFLOAT16) else torch.float32


def autocast() -> torch.autocast:
    """The context that networks run in."""
    return torch.autocast("cpu", torch.bfloat16, enabled=compute_dtype() == torch.bfloat16)
