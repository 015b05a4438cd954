"""Latents to target-size pixels."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

# Canvas pixels decoded at a time: the VAE's activations take about a kilobyte a pixel.
PIXELS_A_PASS = 1 << 20


def choose_vae_dtype(device: torch.device, dtype: torch.dtype) -> torch.dtype:
    """The UNet's dtype, but never fp16: SDXL's VAE overflows in it (its config says `force_upcast`)."""
    if dtype != torch.float16:
        return dtype
    return torch.bfloat16 if device.type != "cuda" or torch.cuda.is_bf16_supported() else torch.float32


@torch.inference_mode()
def decode(vae: Any, latents: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Decodes latents [N, 4, h, w] into images uint8 [N, 3, size, size] on the same device.

    Canvases of another size are resized with antialiasing (bicubic). The second result, bool [N], marks the images
    that came out sound: every value finite, and not one constant colour.
    """
    dtype = vae.dtype
    images, sound = [], []
    side = latents.shape[-1] * 2 ** (len(vae.config.block_out_channels) - 1)
    for part in torch.split(latents, max(1, PIXELS_A_PASS // side**2)):
        canvas = vae.decode((part / vae.config.scaling_factor).to(dtype), return_dict=False)[0].float()
        flat = canvas.flatten(1)
        sound.append(flat.isfinite().all(1) & (flat.amax(1) > flat.amin(1)))
        if side != size:
            canvas = F.interpolate(canvas, size=(size, size), mode="bicubic", antialias=True)
        images.append((canvas / 2 + 0.5).nan_to_num().clamp(0, 1).mul(255).round().to(torch.uint8))
    return torch.cat(images), torch.cat(sound)
