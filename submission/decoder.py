"""Latents to target-size pixels, by the cheapest means that is good enough.

The VAE spends most of its work on pixels that are then averaged away. So there is a ladder, cheapest first: a map
fitted to what the VAE makes of a few latents, the VAE on pooled latents, and the VAE. A rung is held to its fidelity:
the signal-to-noise ratio of its pixels against the full decode's, on latents it was not fitted to.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from submission.errors import UsageError

Rung = Literal["linear", "pooled", "vae"]

# dB of peak signal-to-noise ratio that a rung must keep: a mean error of 8 levels of 256.
FIDELITY = 30.0
# Latents whose full decode the map is fitted to, and those it is then measured on.
FITTED, HELD_OUT = 16, 8
CALIBRATION = FITTED + HELD_OUT

# Random features beside the four latent channels. 32, 64, 128 and 256 of them took the fidelity to 32.6, 33.8, 33.8 and
# 33.9 dB on a trained VAE, and to 27.8, 28.7, 29.7 and 30.7 dB on one of SDXL's size with random weights at 256 px.
# (256 with the ridge below, the others with a tenth of it.) The fewer pixels to fit to, the fewer features, or the map
# would only repeat them: so many pixels for each of its columns.
FEATURES, PIXELS_A_COLUMN = 256, 7
# Ridge, as a share of the features' mean square.
RIDGE = 1e-3
NEIGHBOURHOOD = 3

# Pixels of an image to one of a pooled latent. The VAE makes eight of a latent: its canvas is four times as fine.
POOLED_SHARE = 2

# Canvas pixels decoded at a time: the VAE's activations take about a kilobyte a pixel.
PIXELS_A_PASS = 1 << 18
# Pixels of images made of them at a time: the map's features take a few kilobytes a pixel.
IMAGE_PIXELS_A_PASS = 1 << 18


@dataclass(frozen=True)
class Decoder:
    """A rung of the ladder for images of `size` pixels. `fidelity` has the dB of every rung that was measured.

    `canvas` takes latents [N, 4, h, w], float32, to float32 [N, 3, size, size], black -1 and white 1.
    """

    rung: Rung
    size: int
    canvas: Callable[[Tensor], Tensor]
    fidelity: Mapping[Rung, float]


def choose_vae_dtype(device: torch.device, dtype: torch.dtype) -> torch.dtype:
    """The UNet's dtype, but never fp16: SDXL's VAE overflows in it (its config says `force_upcast`)."""
    if dtype != torch.float16:
        return dtype
    return torch.bfloat16 if device.type != "cuda" or torch.cuda.is_bf16_supported() else torch.float32


def full_decoder(vae: Any, size: int) -> Decoder:
    """The VAE itself, its canvases shrunk with antialiasing (bicubic)."""

    def canvas(latents: Tensor) -> Tensor:
        side = latents.shape[-1] * _factor(vae)
        parts = torch.split(latents, max(1, PIXELS_A_PASS // side**2))
        return torch.cat([_resized(_vae_decode(vae, part), size) for part in parts])

    return Decoder("vae", size, canvas, {})


@torch.inference_mode()
def choose_decoder(vae: Any, latents: Tensor, size: int, wanted: Rung | Literal["auto"] = "auto") -> Decoder:
    """The cheapest rung that keeps `FIDELITY`, or the one that is wanted.

    `latents` [CALIBRATION, 4, h, w] are samples to measure on. Where their full decode is broken, nothing can be
    measured, and it is the VAE's to say so. Raises UsageError where the wanted rung cannot be had.
    """
    full = full_decoder(vae, size)
    if wanted == "vae":
        return full
    truth = full.canvas(latents)
    if not _sound(truth).all():
        return full
    canvases: dict[Rung, Callable[[Tensor], Tensor]] = {}
    if wanted != "pooled":
        canvases["linear"] = _fit_map(latents[:FITTED], truth[:FITTED])
    if latents.shape[-1] > size // POOLED_SHARE:
        canvases["pooled"] = lambda latents: full.canvas(F.adaptive_avg_pool2d(latents, size // POOLED_SHARE))
    elif wanted == "pooled":
        raise UsageError(f"--decoder pooled: latents of {latents.shape[-1]} px are not finer than it would make them")
    fidelity: dict[Rung, float] = {}
    for rung, canvas in canvases.items():
        if wanted not in (rung, "auto"):
            continue
        fidelity[rung] = psnr(canvas(latents[FITTED:]), truth[FITTED:])
        if wanted == rung or fidelity[rung] >= FIDELITY:
            return Decoder(rung, size, canvas, fidelity)
    return Decoder("vae", size, full.canvas, fidelity)


@torch.inference_mode()
def decode(decoder: Decoder, latents: Tensor) -> tuple[Tensor, Tensor]:
    """Decodes latents [N, 4, h, w] into images uint8 [N, 3, size, size] on the same device.

    The second result, bool [N], marks the images that came out sound: every value finite, and not one constant colour.
    """
    parts = torch.split(latents, max(1, IMAGE_PIXELS_A_PASS // decoder.size**2))
    pixels, sound = zip(*(_decode(decoder, part) for part in parts), strict=True)
    return torch.cat(pixels), torch.cat(sound)


def _decode(decoder: Decoder, latents: Tensor) -> tuple[Tensor, Tensor]:
    canvas = decoder.canvas(latents)
    pixels = (canvas / 2 + 0.5).nan_to_num().clamp(0, 1).mul(255).round().to(torch.uint8)
    return pixels, _sound(canvas)


def psnr(canvas: Tensor, truth: Tensor) -> float:
    """Peak signal-to-noise ratio, dB, mean over images in -1..1, as they look: what lies beyond is cut off."""
    error = (canvas.clamp(-1, 1) - truth.clamp(-1, 1)) / 2
    return (-10 * error.square().mean((1, 2, 3)).clamp_min(1e-12).log10()).mean().item()


def _fit_map(latents: Tensor, truth: Tensor) -> Callable[[Tensor], Tensor]:
    """A map from latent neighbourhoods to pixels that comes nearest to `truth` [N, 3, size, size].

    Linear in the latents and in random features of their neighbourhoods (Rahimi and Recht, 2007), so that the fit is
    one ridge regression: the same latents give the same map, with no training to go astray. Latents finer than the
    pixels are averaged first; coarser ones give a square of pixels each.
    """
    size = truth.shape[-1]
    side = math.gcd(size, latents.shape[-1]) if size > latents.shape[-1] else size
    columns = len(truth) * side**2 // PIXELS_A_COLUMN
    count = min(max(columns // NEIGHBOURHOOD**2 - latents.shape[1], 1), FEATURES)
    scale = latents.std((0, 2, 3), keepdim=True)
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randn(count, latents.shape[1] * NEIGHBOURHOOD**2 + 1, generator=generator)
    drawn[:, :-1] /= NEIGHBOURHOOD * math.sqrt(latents.shape[1])
    weights = drawn[:, :-1].view(count, latents.shape[1], NEIGHBOURHOOD, NEIGHBOURHOOD).to(latents.device)
    biases = drawn[:, -1].to(latents.device)

    def features(latents: Tensor) -> Tensor:
        """[N, 4 + count, side + 2, side + 2]."""
        grid = F.adaptive_avg_pool2d(latents, side) / scale
        return _padded(torch.cat([grid, F.silu(F.conv2d(_padded(grid), weights, biases))], 1))

    inputs = features(latents)
    neighbourhoods = F.unfold(inputs, NEIGHBOURHOOD).movedim(1, -1).flatten(0, 1).double()
    rows = F.pad(neighbourhoods, (0, 1), value=1.0)
    targets = F.pixel_unshuffle(truth, size // side).movedim(1, -1).flatten(0, 2).double()
    gram = rows.t() @ rows
    gram.diagonal().add_(RIDGE * gram.diagonal().mean())
    fitted = torch.linalg.solve(gram, rows.t() @ targets).t().float()
    kernel = fitted[:, :-1].reshape(-1, inputs.shape[1], NEIGHBOURHOOD, NEIGHBOURHOOD)
    return lambda latents: F.pixel_shuffle(F.conv2d(features(latents), kernel, fitted[:, -1]), size // side)


def _padded(grid: Tensor) -> Tensor:
    return F.pad(grid, (NEIGHBOURHOOD // 2,) * 4, mode="replicate")


def _vae_decode(vae: Any, latents: Tensor) -> Tensor:
    """Canvases float32 [N, 3, factor * h, factor * w]."""
    scaled = (latents / vae.config.scaling_factor).to(vae.dtype)
    canvas: Tensor = vae.decode(scaled, return_dict=False)[0].float()
    return canvas


def _resized(canvas: Tensor, size: int) -> Tensor:
    if canvas.shape[-1] == size:
        return canvas
    return F.interpolate(canvas, size=(size, size), mode="bicubic", antialias=True)


def _factor(vae: Any) -> int:
    """Pixels that a latent is wide."""
    return int(2 ** (len(vae.config.block_out_channels) - 1))


def _sound(canvas: Tensor) -> Tensor:
    flat = canvas.flatten(1)
    return flat.isfinite().all(1) & (flat.amax(1) > flat.amin(1))
