"""Latents to target-size pixels, by the means that makes the better training set in the time there is.

The VAE spends most of its work on pixels that are then averaged away. So a small network is fitted to what the VAE
makes of some latents, at the size that is wanted. It stands on a ladder, cheapest first: that network with random
hidden layers, which takes no time to fit (`linear`); trained (`distilled`); a tiny autoencoder that lies beside the
checkpoint (`tiny`); the VAE. A rung is measured by its fidelity, the signal-to-noise ratio of its pixels against the
VAE's on latents that it was not fitted to, and by its pace.
"""

import copy
import functools
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import safetensors.torch
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from torch import Tensor, nn

from submission.errors import UsageError

Rung = Literal["linear", "distilled", "tiny", "vae"]
RUNGS: tuple[Rung, ...] = get_args(Rung)

# The network: hidden channels, groups of its norms, side of its kernels in pixels. A VAE normalises whole images, which
# no local map can follow: without norms, the embedded VAE was kept to 33 dB and not 37.
WIDTH, GROUPS, KERNEL = 48, 8, 3
# Ridge of the last layer's regression, as a share of the inputs' mean square.
RIDGE = 1e-4
# Training: steps, latents per step, largest rate. From 64 images they lead to 38.9 dB on the embedded VAE at 128 px and
# to 39.6 on one of SDXL's size with random weights at 512 px (untrained 35.2 and 31.3; from 8 images 35.5 and 34.3).
STEPS, STEP_LATENTS, RATE = 300, 8, 3e-3

# Bytes that the VAE's activations take at most for each pixel of the canvas, in half precision.
PIXEL_BYTES = 3000
# Canvas pixels decoded at a time on a CPU; on a GPU, what fits into a quarter of its free memory, up to 16 canvases of
# 512 px: with eight in place of one, the VAE made 71 images/s on an H200 and not 41.
PIXELS_PER_PASS, MOST_PIXELS_PER_PASS, MEMORY_SHARE = 1 << 18, 1 << 22, 0.25
# Pixels of images made of them at a time: the network's activations take a few kilobytes a pixel.
IMAGE_PIXELS_PER_PASS = 1 << 18


class Student(nn.Module):
    """A small network from latents [N, 4, h, w] to pixels [N, 3, size, size], float32, black -1 and white 1.

    Latents finer than the pixels lie side by side as channels of a pixel, `cells` in a row; where they are no multiple
    of it, they are stretched first. The last layer sees the latents beside the hidden channels, so that the whole is
    a linear map at least.
    """

    scale: Tensor

    def __init__(self, size: int, cells: int) -> None:
        super().__init__()
        self.size, self.cells = size, cells
        inputs = 4 * cells**2
        self.register_buffer("scale", torch.ones(1, 4, 1, 1))
        self.first = nn.Conv2d(inputs, WIDTH, KERNEL, padding=KERNEL // 2)
        self.second = nn.Conv2d(WIDTH, WIDTH, KERNEL, padding=KERNEL // 2)
        self.norms = nn.ModuleList(nn.GroupNorm(GROUPS, WIDTH) for _ in range(2))
        self.last = nn.Conv2d(inputs + WIDTH, 3, KERNEL, padding=KERNEL // 2)

    def features(self, latents: Tensor) -> Tensor:
        """What the last layer sees, [N, 4 * cells^2 + WIDTH, size, size]."""
        side = self.size * self.cells
        grid = latents / self.scale
        if latents.shape[-1] != side:
            grid = F.interpolate(grid, size=(side, side), mode="bilinear")
        grid = F.pixel_unshuffle(grid, self.cells)
        hidden = self.first(grid)
        hidden = hidden + self.second(F.silu(self.norms[0](hidden)))
        return torch.cat([grid, F.silu(self.norms[1](hidden))], 1)

    def forward(self, latents: Tensor) -> Tensor:
        pixels: Tensor = self.last(self.features(latents))
        return pixels


@dataclass(frozen=True)
class Decoder:
    """A rung of the ladder for images of `size` pixels. `fidelity` has the dB of every rung that was measured.

    `canvas` takes latents [N, 4, h, w], float32, to float32 [N, 3, size, size], black -1 and white 1. `student` is the
    network that was fitted, if one was, and `fitted_to` says to how many images.
    """

    rung: Rung
    size: int
    canvas: Callable[[Tensor], Tensor]
    fidelity: Mapping[Rung, float]
    fitted_to: int = 0
    student: Student | None = None


def ladder(wanted: Rung | Literal["auto"], tiny: Any | None, latents: Tensor, pixels: Tensor) -> Iterator[Decoder]:
    """The rungs below the VAE that are wanted, cheapest first, those that are fitted being fitted to latents
    [n, 4, h, w] and the VAE's pixels for them [n, 3, size, size]. `tiny` is the tiny autoencoder, if there is one."""
    if wanted in ("auto", "linear", "distilled"):
        linear = fit_student(latents, pixels, 0)
        if wanted != "distilled":
            yield student_decoder("linear", linear)
        if wanted != "linear":
            yield student_decoder("distilled", distil(linear, latents, pixels))
    if tiny is not None and wanted in ("auto", "tiny"):
        yield tiny_decoder(tiny, pixels.shape[-1])


def choose_vae_dtype(device: torch.device, dtype: torch.dtype) -> torch.dtype:
    """The UNet's dtype, but never fp16: SDXL's VAE overflows in it (its config says `force_upcast`)."""
    if dtype != torch.float16:
        return dtype
    return torch.bfloat16 if device.type != "cuda" or torch.cuda.is_bf16_supported() else torch.float32


def full_decoder(vae: Any, size: int) -> Decoder:
    """The VAE itself, its canvases shrunk with antialiasing (bicubic)."""
    factor = 2 ** (len(vae.config.block_out_channels) - 1)
    return _autoencoder("vae", vae, size, factor, vae.config.scaling_factor)


def tiny_decoder(tiny: Any, size: int) -> Decoder:
    """A tiny autoencoder (diffusers' AutoencoderTiny), whose latents are the UNet's as they are."""
    return _autoencoder("tiny", tiny, size, 8, 1.0)


def _autoencoder(rung: Rung, network: Any, size: int, factor: int, scaling: float) -> Decoder:
    """A network that makes canvases `factor` times as wide as its latents, which are the UNet's over `scaling`."""

    def canvas(latents: Tensor) -> Tensor:
        parts = torch.split(latents, canvases_per_pass(latents.device, factor * latents.shape[-1]))
        return torch.cat([shrunk(part / scaling) for part in parts])

    def shrunk(latents: Tensor) -> Tensor:
        made: Tensor = network.decode(latents.to(network.dtype), return_dict=False)[0].float()
        if made.shape[-1] == size:
            return made
        return F.interpolate(made, size=(size, size), mode="bicubic", antialias=True)

    return Decoder(rung, size, canvas, {})


def student_decoder(rung: Rung, student: Student) -> Decoder:
    """A fitted network, which is not trained any further."""
    student.requires_grad_(False)
    return Decoder(rung, student.size, student, {}, student=student)


def save_student(decoder: Decoder) -> bytes | None:
    """The weights of the decoder's network, for another process; None where it has none."""
    return safetensors.torch.save(decoder.student.state_dict()) if decoder.student else None


def load_student(network: bytes, rung: Rung, size: int, device: torch.device) -> Decoder:
    """The decoder for images of `size` pixels whose network `save_student` has saved.

    Raises UsageError where it is damaged: a run that is resumed reads it from the disk.
    """
    try:
        weights = safetensors.torch.load(network)
        student = Student(size, math.isqrt(weights["first.weight"].shape[1] // 4))
        student.load_state_dict(weights)
    except (SafetensorError, KeyError, IndexError, RuntimeError) as error:
        raise UsageError(
            "--resume: the decoder's network in the spool is damaged; start anew without --resume"
        ) from error
    return student_decoder(rung, student.to(device))


@functools.cache
def canvases_per_pass(device: torch.device, side: int) -> int:
    """How many canvases of that many pixels a side the VAE decodes at a time: a power of two, and always the same,
    since other sizes would be compiled anew."""
    pixels = PIXELS_PER_PASS
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
        free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        pixels = min(MOST_PIXELS_PER_PASS, max(PIXELS_PER_PASS, int(MEMORY_SHARE * free / PIXEL_BYTES)))
    return 1 << (max(1, pixels // side**2).bit_length() - 1)


def fit_student(latents: Tensor, truth: Tensor, steps: int = STEPS) -> Student:
    """The network that comes nearest to `truth` [n, 3, size, size] from `latents` [n, 4, h, w], both float32.

    Hidden layers are drawn at random and trained for so many steps; the last layer is a ridge regression, before and
    after (with no steps: on random features, Rahimi and Recht, 2007). The same latents give the same network.
    """
    student = random_student(latents, truth.shape[-1])
    _solve_last(student, latents, truth)
    return distil(student, latents, truth, steps) if steps else student


def distil(student: Student, latents: Tensor, truth: Tensor, steps: int = STEPS) -> Student:
    """A copy of a network with a fitted last layer, trained for so many steps, its last layer fitted anew."""
    trained = copy.deepcopy(student).requires_grad_(True)
    train_student(trained, latents, truth, steps)
    _solve_last(trained, latents, truth)
    return trained


def random_student(latents: Tensor, size: int) -> Student:
    """The network for images of `size` pixels from such latents, as it is before anything is fitted."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        student = Student(size, -(-latents.shape[-1] // size)).to(latents.device)
    student.scale.copy_(latents.std((0, 2, 3), keepdim=True))
    return student


def train_student(student: Student, latents: Tensor, truth: Tensor, steps: int) -> None:
    """Trains all of the network in place."""
    order = torch.Generator().manual_seed(0)
    optimiser = torch.optim.Adam(student.parameters(), RATE, betas=(0.9, 0.99))
    rate = torch.optim.lr_scheduler.OneCycleLR(optimiser, RATE, steps, pct_start=0.1)
    with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True):
        for _ in range(steps):
            drawn = torch.randint(len(latents), (STEP_LATENTS,), generator=order).to(latents.device)
            loss = F.mse_loss(student(latents[drawn]), truth[drawn])
            optimiser.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimiser.step()
            rate.step()


@torch.no_grad()
def _solve_last(student: Student, latents: Tensor, truth: Tensor) -> None:
    """Sets the last layer to the ridge regression of `truth` on what it sees."""
    gram, product = torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    for part, pixels in zip(torch.split(latents, STEP_LATENTS), torch.split(truth, STEP_LATENTS), strict=True):
        rows = F.unfold(student.features(part), KERNEL, padding=KERNEL // 2).movedim(1, -1).flatten(0, 1)
        rows = F.pad(rows, (0, 1), value=1.0)
        gram = gram + (rows.t() @ rows).double().cpu()
        product = product + (rows.t() @ pixels.movedim(1, -1).flatten(0, 2)).double().cpu()
    gram.diagonal().add_(RIDGE * gram.diagonal().mean())
    solved = torch.linalg.solve(gram, product).t().float().to(latents.device)
    fitted = torch.cat([solved[:, :-1].flatten(), solved[:, -1]])
    torch.nn.utils.vector_to_parameters(fitted, student.last.parameters())


@torch.inference_mode()
def decode(decoder: Decoder, latents: Tensor) -> tuple[Tensor, Tensor]:
    """Decodes latents [N, 4, h, w] into images uint8 [N, 3, size, size] on the same device.

    The second result, bool [N], marks the images that came out sound: every value finite, and not one constant colour.
    """
    parts = torch.split(latents, max(1, IMAGE_PIXELS_PER_PASS // decoder.size**2))
    pixels, sound = zip(*(_decode(decoder, part) for part in parts), strict=True)
    return torch.cat(pixels), torch.cat(sound)


@torch.no_grad()
def canvases(decoder: Decoder, latents: Tensor) -> Tensor:
    """Canvases float32 [N, 3, size, size], done by the time this returns: a GPU is waited for."""
    made = decoder.canvas(latents)
    if made.device.type == "cuda":
        torch.cuda.synchronize(made.device)
    return made


def _decode(decoder: Decoder, latents: Tensor) -> tuple[Tensor, Tensor]:
    canvas = decoder.canvas(latents)
    pixels = (canvas / 2 + 0.5).nan_to_num().clamp(0, 1).mul(255).round().to(torch.uint8)
    return pixels, is_sound(canvas)


def psnr(canvas: Tensor, truth: Tensor) -> float:
    """Peak signal-to-noise ratio, dB, mean over images in -1..1, as they look: what lies beyond is cut off."""
    error = (canvas.clamp(-1, 1) - truth.clamp(-1, 1)) / 2
    return (-10 * error.square().mean((1, 2, 3)).clamp_min(1e-12).log10()).mean().item()


def is_sound(canvas: Tensor) -> Tensor:
    """Which canvases [N, 3, size, size] have finite values and more than one colour: bool [N]."""
    flat = canvas.flatten(1)
    return flat.isfinite().all(1) & (flat.amax(1) > flat.amin(1))
