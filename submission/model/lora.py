"""A LoRA fused into a network: low-rank changes of its layers, added once (Hu et al., 2021, arXiv 2106.09685).

The library that does this, peft, would be imported by diffusers at every start, LoRA or not.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from textwrap import shorten
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from submission.errors import CheckpointError
from submission.model.checkpoint import PICKLES
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
# What is said of DoRA, of biases and of other methods in a LoRA's place.
MORE = "does more than a LoRA, and is not supported: it has"


@torch.no_grad()
def fuse(model: Any, component: str, lora: Part, configs: Mapping[str, Any]) -> None:
    """Adds to each layer's weights what the LoRA says of the component: weight * alpha / rank * up @ down. `configs`
    are those of all components, by their names.

    The rank is the size of the inner dimension; alpha is the rank where the file names none. Raises CheckpointError
    where the LoRA is of another layout, or the file holds more than a LoRA.
    """
    factors, alphas = _read(Path(lora.file), component, configs)
    stems = [name.removesuffix(DOWN) for name in factors if name.endswith(DOWN)]
    if component == "unet" and not stems:
        raise CheckpointError(f"{lora.file}: there is no LoRA of a UNet in it")
    understood = {stem + factor for stem in stems for factor in (DOWN, UP)}
    if odd := sorted(understood ^ factors.keys()):
        what = "lacks" if odd[0] in understood else MORE
        raise CheckpointError(f"{lora.file} {what} {component}.{odd[0]}")
    layers = dict(model.named_modules())
    for stem in stems:
        down, up = (_matrix(factors[stem + factor].float()) for factor in (DOWN, UP))
        # Newer text encoders lack a level that files have.
        layer = layers.get(stem) or layers.get(stem.removeprefix("text_model."))
        weight: Any = getattr(layer, "weight", None)
        suits = weight is not None and _matrix(weight).shape == (len(up), down.shape[1])
        if not suits or not 0 < up.shape[1] == len(down):
            raise CheckpointError(f"{lora.file} is a LoRA for another layout: its {stem} does not suit the {component}")
        scale = lora.weight * alphas.get(stem, float(len(down))) / len(down)
        weight += scale * (up @ down).reshape(weight.shape).to(weight)


def _matrix(weight: Tensor) -> Tensor:
    """What a layer multiplies with, the same for a convolution: [outputs, inputs]."""
    return weight.flatten(1) if weight.dim() > 1 else weight.reshape(1, -1)


def _read(file: Path, component: str, configs: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, float]]:
    """A component's factors, and its layers' alphas. Raises CheckpointError."""
    from diffusers.configuration_utils import FrozenDict  # noqa: PLC0415  # slow to import
    from diffusers.loaders import StableDiffusionXLLoraLoaderMixin  # noqa: PLC0415
    from diffusers.models.model_loading_utils import load_state_dict  # noqa: PLC0415

    prefix, unet_config = f"{component}.", FrozenDict(configs["unet"])
    try:
        header, weights = _header(file), load_state_dict(str(file))
        if scales := [name for name in weights if "dora_scale" in name]:  # which diffusers would leave out
            raise CheckpointError(f"{file} {MORE} {scales[0]}")
        every, of_every = StableDiffusionXLLoraLoaderMixin.lora_state_dict(weights, unet_config=unet_config)
        alpha, of_some = header.get(f"{prefix}lora_alpha"), dict(header.get(f"{prefix}alpha_pattern") or {})
        endings = [] if alpha is None else [("", float(alpha)), *((end, float(own)) for end, own in of_some.items())]
        by_root = bool(header.get(f"{prefix}use_rslora"))
    except (OSError, ValueError, KeyError, RuntimeError, TypeError) as error:
        reason = shorten(str(error), 200, placeholder=" ...")
        raise CheckpointError(f"{file} is no LoRA that is understood ({reason})") from error
    if strange := [name for name in every if name.partition(".")[0] not in configs]:
        raise CheckpointError(f"{file} is a LoRA for another layout: there is no network for its {strange[0]}")
    factors, alphas = (
        {_spelt(name.removeprefix(prefix)): value for name, value in found.items() if name.startswith(prefix)}
        for found in (every, of_every or {})
    )
    ranks = {name.removesuffix(DOWN): len(factor) for name, factor in factors.items() if name.endswith(DOWN)}
    told = {stem: value for end, value in endings for stem in ranks if stem.endswith(end)}
    if by_root:  # alpha / sqrt(rank) * up @ down (Kalajdzievski, 2023, arXiv 2312.03732)
        told = {stem: value * ranks[stem] ** 0.5 for stem, value in told.items()}
    told |= {name.removesuffix(".alpha").removesuffix(DOWN): float(value) for name, value in alphas.items()}
    return factors, told


def _header(file: Path) -> dict[str, Any]:
    """What diffusers writes of a LoRA beside its factors, such as "unet.lora_alpha". Raises ValueError."""
    if file.suffix in PICKLES:
        return {}
    with safe_open(file, framework="numpy") as weights:
        told = json.loads((weights.metadata() or {}).get("lora_adapter_metadata", "{}"))
    return told if isinstance(told, dict) else {}


def _spelt(name: str) -> str:
    for theirs, ours in SPELLINGS:
        name = re.sub(theirs, ours, name)
    return name
