"""A checkpoint to prompt embeddings and a one-step sampler.

One step without guidance, as SDXL-Turbo was distilled for: from noise at t = 999 the UNet's prediction gives the clean
latent directly. With no guidance a negative prompt has no effect, so there is none.
"""

import math
import timeit
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from submission.errors import CheckpointError, first_line
from submission.model.checkpoint import Checkpoint

# bf16 must win by this factor on a matrix product before a CPU uses it: where the hardware lacks it, it is hundreds of
# times slower, and where it has it, at least twice as fast, so that noise does not decide.
BF16_GAIN = 1.3
# Separates the random numbers drawn for noise from those drawn for augmentation.
NOISE_STREAM = 0
# Prompts encoded at a time, few for the sake of memory.
PROMPTS_PER_BATCH = 16
# The folder of a tiny autoencoder, by the name under which the hub has it for SDXL.
TINY = "taesdxl"
# What torch compiles of a UNet, and in how many shapes at most.
COMPILED_BLOCKS, SHAPES = ("BasicTransformerBlock", "ResnetBlock2D"), 64


@dataclass(frozen=True)
class Conditioning:
    """What the UNet is told of each prompt: `embeds` [P, tokens, D] and `pooled` [P, D'], in the UNet's dtype.

    Of a UNet that looks projections up (`project_prompts`), `embeds` are the prompts' numbers, int64 [P, 1, 1].
    """

    embeds: Tensor
    pooled: Tensor


@dataclass(frozen=True)
class Sampler:
    """A UNet with the constants of its single step, for canvases of `resolution` pixels. Latents are [4, side, side];
    `sigma` is the noise level."""

    unet: Any
    resolution: int
    side: int
    timestep: Tensor
    sigma: float
    prediction: str
    time_ids: Tensor
    dtype: torch.dtype
    device: torch.device


def choose_dtype(device: torch.device) -> torch.dtype:
    """Half precision on CUDA; on a CPU bf16 or float32, whichever multiplies matrices faster here."""
    if device.type == "cuda":
        return torch.float16
    seconds = {}
    for dtype in (torch.float32, torch.bfloat16):
        matrix = torch.ones(256, 256, dtype=dtype)
        # The best of several: the first is slow (threads start, kernels are chosen), others may be disturbed.
        seconds[dtype] = min(timeit.repeat(partial(torch.mm, matrix, matrix), number=1, repeat=5))
    return torch.bfloat16 if seconds[torch.float32] > BF16_GAIN * seconds[torch.bfloat16] else torch.float32


def encode_prompts(
    checkpoint: Checkpoint, prompts: Sequence[str], device: torch.device, dtype: torch.dtype
) -> Conditioning:
    """Encodes every prompt once, as SDXL does: the second-to-last hidden states of both text encoders side by side,
    and the projected text embedding of the second. The encoders are let go on return. Raises CheckpointError."""
    from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer  # noqa: PLC0415  # slow
    from transformers.utils import logging  # noqa: PLC0415

    logging.disable_progress_bar()
    hidden: list[Tensor] = []
    pooled: list[Tensor] = []
    for suffix, kind in (("", CLIPTextModel), ("_2", CLIPTextModelWithProjection)):
        tokenizer = _load_part(CLIPTokenizer, checkpoint.path, f"tokenizer{suffix}")
        encoder = _load_model(kind, checkpoint, f"text_encoder{suffix}", device, dtype)
        tokens = tokenizer(
            list(prompts),
            padding="max_length",
            max_length=tokenizer.model_max_length,
            truncation=True,
            return_tensors="pt",
        ).input_ids.to(device)
        states: list[Tensor] = []
        with torch.inference_mode():
            for batch in tokens.split(PROMPTS_PER_BATCH):
                output = encoder(batch, output_hidden_states=True)
                # The other layers' states, of thousands of prompts, would take many times as much memory.
                states.append(output.hidden_states[-2])
                if suffix:
                    pooled.append(output.text_embeds)
        hidden.append(torch.cat(states))
    return Conditioning(torch.cat(hidden, dim=-1).to(dtype), torch.cat(pooled).to(dtype))


def too_long(checkpoint: Checkpoint, prompts: Sequence[str]) -> list[str]:
    """The prompts of more tokens than the text encoders read, which would be cut. Raises CheckpointError."""
    from transformers import CLIPTokenizer  # noqa: PLC0415  # slow to import

    tokenizer = _load_part(CLIPTokenizer, checkpoint.path, "tokenizer")
    lengths = map(len, tokenizer(list(prompts), verbose=False).input_ids)
    return [p for p, length in zip(prompts, lengths, strict=True) if length > tokenizer.model_max_length]


def load_sampler(checkpoint: Checkpoint, resolution: int, device: torch.device, dtype: torch.dtype) -> Sampler:
    """Loads the UNet and works out its single step for canvases of `resolution` pixels. Raises CheckpointError."""
    from diffusers import EulerAncestralDiscreteScheduler, UNet2DConditionModel  # noqa: PLC0415  # slow to import

    unet = _laid_out(_load_model(UNet2DConditionModel, checkpoint, "unet", device, dtype))
    scheduler = _load_part(EulerAncestralDiscreteScheduler, checkpoint.path, "scheduler")
    prediction = scheduler.config.prediction_type
    if prediction not in ("epsilon", "v_prediction"):
        raise CheckpointError(
            f"{checkpoint.path}: prediction_type {prediction!r} is not supported (epsilon, v_prediction)"
        )
    scheduler.set_timesteps(1)
    timestep, sigma = scheduler.timesteps[0].to(device), float(scheduler.sigmas[0])
    sampler = Sampler(unet, 0, 0, timestep, sigma, prediction, torch.empty(0), dtype, device)
    return at_resolution(sampler, checkpoint, resolution)


def at_resolution(sampler: Sampler, checkpoint: Checkpoint, resolution: int) -> Sampler:
    """The same UNet and step for canvases of `resolution` pixels."""
    size = [resolution, resolution, 0, 0, resolution, resolution]
    time_ids = torch.tensor(size, device=sampler.device, dtype=sampler.dtype)
    side = resolution // checkpoint.vae_factor
    return replace(sampler, resolution=resolution, side=side, time_ids=time_ids)


class Projections(torch.nn.Module):
    """What a linear layer makes of every prompt, [P, tokens, D], in place of the layer; takes prompts' numbers."""

    table: Tensor

    def __init__(self, layer: torch.nn.Module, embeds: Tensor) -> None:
        super().__init__()
        self.register_buffer("table", torch.cat([layer(batch) for batch in torch.split(embeds, PROMPTS_PER_BATCH)]))

    def forward(self, numbers: Tensor) -> Tensor:
        return self.table[numbers.flatten()]


@torch.inference_mode()
def project_prompts(unet: Any, conditioning: Conditioning) -> Conditioning:
    """Has the UNet, which is changed, look up keys and values of its cross-attention instead of projecting prompts anew
    for every image (0.05 TFLOP of SDXL-Turbo's 0.43 at 256 px, of 1.59 at 512). Returns the conditioning for it."""
    for name, module in unet.named_modules():
        if name.endswith(".attn2"):
            module.to_k = Projections(module.to_k, conditioning.embeds)
            module.to_v = Projections(module.to_v, conditioning.embeds)
    numbers = torch.arange(len(conditioning.embeds), device=conditioning.embeds.device)
    return replace(conditioning, embeds=numbers.view(-1, 1, 1))


def in_float32(sampler: Sampler, conditioning: Conditioning) -> tuple[Sampler, Conditioning]:
    """The same UNet, which is changed, and its step in float32."""
    embeds, pooled = conditioning.embeds, conditioning.pooled.float()
    return (
        replace(sampler, unet=sampler.unet.float(), time_ids=sampler.time_ids.float(), dtype=torch.float32),
        Conditioning(embeds.float() if embeds.is_floating_point() else embeds, pooled),
    )


def load_vae(checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype) -> Any:
    """The checkpoint's AutoencoderKL, ready to decode. Raises CheckpointError."""
    from diffusers import AutoencoderKL  # noqa: PLC0415  # slow to import

    return _laid_out(_load_model(AutoencoderKL, checkpoint, "vae", device, dtype))


def load_tiny(checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype) -> Any | None:
    """The AutoencoderTiny in a folder `taesdxl` in the checkpoint's folder or beside it, ready to decode; None where
    there is none. Raises CheckpointError."""
    folders = [parent / TINY for parent in (checkpoint.path, checkpoint.path.parent)]
    folder = next((folder for folder in folders if (folder / "config.json").is_file()), None)
    if folder is None:
        return None
    from diffusers import AutoencoderTiny  # noqa: PLC0415  # slow to import

    return _laid_out(_load_folder(AutoencoderTiny, folder, None, device, dtype))


def compile_blocks(unet: Any) -> None:
    """Has torch compile the blocks that a UNet repeats, each when it is first called with another shape.

    In this order, on an H200 at 512 px: 249 images/s as it is, 268 with residual blocks compiled, 299 with transformer
    blocks as well. Channels-last weights made it slower (219), fused projections of self-attention faster by 1%.
    """
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, SHAPES)
    for module in unet.modules():
        if type(module).__name__ in COMPILED_BLOCKS:
            _compile(module)


def compile_vae(vae: Any) -> None:
    """Has torch compile the whole decoder, channels-last: 174 images/s at 512 px on an H200, where it made 77 as it is
    and 147 with its residual blocks compiled."""
    vae.decoder.to(memory_format=torch.channels_last)
    _compile(vae.decoder)


def _compile(module: Any) -> None:
    warnings.filterwarnings("ignore", "Dynamo detected a call to a `functools.lru_cache`")  # diffusers asks a version
    module.forward = torch.compile(module.forward, dynamic=False)


def undo_compilation(network: Any) -> None:
    """Has a network's modules computed as they are again, on a GPU with channels first."""
    for module in network.modules():
        vars(module).pop("forward", None)
    if network.device.type == "cuda":
        network.to(memory_format=torch.contiguous_format)


def draw_noise(seed: int, classes: Sequence[int], rounds: Sequence[int], side: int) -> Tensor:
    """Standard normal noise [N, 4, side, side], float32: image by image a function of (seed, class, round) alone."""
    draws = [
        np.random.default_rng((seed, NOISE_STREAM, c, r)).standard_normal((4, side, side), dtype=np.float32)
        for c, r in zip(classes, rounds, strict=True)
    ]
    return torch.from_numpy(np.stack(draws))


@torch.inference_mode()
def sample(sampler: Sampler, conditioning: Conditioning, prompts: Tensor, noise: Tensor) -> Tensor:
    """Clean latents [N, 4, side, side] float32 from `noise` (float32, same shape) in one step.

    `prompts` [N] indexes `conditioning`. With x = sigma * noise, the UNet sees x / sqrt(sigma^2 + 1), and its
    output gives the clean latent by the definition of its prediction: epsilon, x - sigma * epsilon; v (Salimans & Ho
    2022 in the scheduler's scaling), x / (sigma^2 + 1) - v * sigma / sqrt(sigma^2 + 1).
    """
    noisy = noise.to(sampler.device) * sampler.sigma
    scale = math.hypot(sampler.sigma, 1)
    output: Tensor = sampler.unet(
        (noisy / scale).to(sampler.dtype),
        sampler.timestep,
        encoder_hidden_states=conditioning.embeds[prompts],
        added_cond_kwargs={
            "text_embeds": conditioning.pooled[prompts],
            "time_ids": sampler.time_ids.expand(len(noise), -1),
        },
        return_dict=False,
    )[0].float()
    if sampler.prediction == "epsilon":
        return noisy - sampler.sigma * output
    return noisy / scale**2 - output * sampler.sigma / scale


def _load_part(kind: Any, path: Path, part: str) -> Any:
    try:
        return kind.from_pretrained(path / part, local_files_only=True)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise CheckpointError(f"{path / part} cannot be loaded ({first_line(error)})") from error


def _load_model(kind: Any, checkpoint: Checkpoint, component: str, device: torch.device, dtype: torch.dtype) -> Any:
    """Loads one component of a checkpoint. Raises CheckpointError."""
    return _load_folder(kind, checkpoint.path / component, checkpoint.variants[component], device, dtype)


def _load_folder(kind: Any, folder: Path, variant: str | None, device: torch.device, dtype: torch.dtype) -> Any:
    """Loads a model straight to the device, and refuses one whose weights do not match its configuration: the libraries
    would fill the gaps with random numbers."""
    try:
        model, loading = kind.from_pretrained(
            folder,
            variant=variant,
            use_safetensors=True,
            local_files_only=True,
            output_loading_info=True,
            device_map=str(device),
            **{"dtype" if kind.__module__.startswith("transformers") else "torch_dtype": dtype},
        )
    except (OSError, ValueError, TypeError, KeyError, RuntimeError) as error:
        raise CheckpointError(f"{folder} cannot be loaded ({first_line(error)})") from error
    wrong = sorted(map(str, [*loading["missing_keys"], *loading["mismatched_keys"]]))
    if wrong:
        raise CheckpointError(f"{folder}: {len(wrong)} weights do not match config.json, the first is {wrong[0]}")
    return model


def _laid_out(model: Any) -> Any:
    """The model, ready to sample. A CPU convolves channels-last what is loaded in float32: so the job made 208 and 198
    images per second with the embedded model on two AVX2 cores, 162 and 150 without. Its UNet in bfloat16 was no
    faster."""
    if model.device.type == "cpu" and model.dtype == torch.float32:
        model.to(memory_format=torch.channels_last)
    return model.eval()
