"""A LoRA fused into a network: low-rank changes of its layers, added once (Hu et al., 2021, arXiv 2106.09685).

The library that does this, peft, would be imported by diffusers at every start, LoRA or not.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from submission.errors import CheckpointError, first_line
from submission.model.recipe import Part

# What a layer's two factors are called here, and what trainers and libraries have called them and their layers.
DOWN, UP = ".lora_A.weight", ".lora_B.weight"
SPELLINGS = (
    (r"\.processor\.", "."),
    (r"_lora\.|\.lora_linear_layer\.", ".lora."),
    (r"\.lora\.down\.", ".lora_A."),
    (r"\.lora\.up\.", ".lora_B."),
    (r"self_attn\.to_([qkv]|out)\.", r"self_attn.\1_proj."),
    (r"\.to_out\.lora", ".to_out.0.lora"),
)


@torch.no_grad()
def fuse(model: Any, component: str, lora: Part, unet_config: Mapping[str, Any]) -> None:
    """Adds to each layer's weights what the LoRA says of the component: weight * alpha / rank * up @ down.

    The rank is the size of the inner dimension; alpha is the rank where the file names none. Raises CheckpointError
    where the LoRA is of another layout.
    """
    factors, alphas = _read(Path(lora.file), component, unet_config)
    stems = [name.removesuffix(DOWN) for name in factors if name.endswith(DOWN)]
    if component == "unet" and not stems:
        raise CheckpointError(f"{lora.file}: there is no LoRA of a UNet in it")
    layers = dict(model.named_modules())
    for stem in stems:
        down, up = factors[stem + DOWN].float(), factors[stem + UP].float()
        # Newer text encoders lack a level that files have.
        layer = layers.get(stem) or layers.get(stem.removeprefix("text_model."))
        change = up.flatten(1) @ down.flatten(1)
        if layer is None or change.numel() != layer.weight.numel():
            raise CheckpointError(f"{lora.file} is a LoRA for another layout: its {stem} does not suit the {component}")
        scale = lora.weight * alphas.get(stem, float(len(down))) / len(down)
        layer.weight += scale * change.reshape(layer.weight.shape).to(layer.weight)


def _read(file: Path, component: str, unet_config: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, float]]:
    """A component's factors, and its layers' alphas."""
    from diffusers.configuration_utils import FrozenDict  # noqa: PLC0415  # slow to import
    from diffusers.loaders import StableDiffusionXLLoraLoaderMixin  # noqa: PLC0415
    from diffusers.models.model_loading_utils import load_state_dict  # noqa: PLC0415

    try:
        every, of_every = StableDiffusionXLLoraLoaderMixin.lora_state_dict(
            load_state_dict(str(file)), unet_config=FrozenDict(unet_config)
        )
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise CheckpointError(f"{file} is no LoRA that is understood ({first_line(error)})") from error
    factors, alphas = (
        {
            _spelt(name.removeprefix(f"{component}.")): value
            for name, value in found.items()
            if name.startswith(f"{component}.")
        }
        for found in (every, of_every or {})
    )
    return factors, {name.removesuffix(".alpha").removesuffix(DOWN): float(alpha) for name, alpha in alphas.items()}


def _spelt(name: str) -> str:
    for theirs, ours in SPELLINGS:
        name = re.sub(theirs, ours, name)
    return name
