"""A checkpoint as diffusers' own pipeline loads and samples it, for comparison with ours."""

from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusionXLPipeline
from torch import Tensor

from tools.training import layout


def load_pipeline(folder: Path) -> Any:
    """In float32."""
    pipeline = StableDiffusionXLPipeline.from_pretrained(folder, variant="fp16", dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def sample(pipeline: Any, prompts: list[str], size: int, noise: Tensor, kind: str = "pt") -> Tensor:
    """In one step without guidance, from standard normal noise."""
    images: Tensor = pipeline(
        prompt=prompts,
        height=size,
        width=size,
        num_inference_steps=1,
        guidance_scale=0.0,
        latents=noise.clone(),  # the pipeline scales it
        output_type=kind,
    ).images
    return images


def networks_of(pipeline: Any) -> layout.Networks:
    """As the training has them."""
    parts = ("tokenizer", "text_encoder", "text_encoder_2", "unet", "vae", "scheduler")
    return layout.Networks(*(getattr(pipeline, name) for name in parts))
