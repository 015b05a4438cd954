"""A checkpoint of Stable Diffusion 1 in its authors' form: one file, and names that diffusers has to translate."""

import re
from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import load_file, save_file

RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
OUTER = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
    "mid_block.resnets.0": "middle_block.0",
    "mid_block.attentions.0": "middle_block.1",
    "mid_block.resnets.1": "middle_block.2",
}
VAE = {
    "conv_norm_out": "norm_out",
    "conv_shortcut": "nin_shortcut",
    "mid_block.resnets.0": "mid.block_1",
    "mid_block.resnets.1": "mid.block_2",
    "mid_block.attentions.0": "mid.attn_1",
    "attn_1.group_norm": "attn_1.norm",
    "attn_1.to_q": "attn_1.q",
    "attn_1.to_k": "attn_1.k",
    "attn_1.to_v": "attn_1.v",
    "attn_1.to_out.0": "attn_1.proj_out",
}


def join(folder: Path, file: Path) -> None:
    """Writes the weights of a pipeline's folder, of one layer per block and two blocks, into one file."""
    unet = load_file(folder / "unet/diffusion_pytorch_model.safetensors")
    vae = load_file(folder / "vae/diffusion_pytorch_model.safetensors")
    text = load_file(folder / "text_encoder/model.safetensors")
    joined = {f"model.diffusion_model.{of_unet(name)}": weight for name, weight in unet.items()}
    for name, weight in vae.items():
        ours = of_vae(name)
        is_projection = re.search(r"attn_1\.(q|k|v|proj_out)\.weight", ours)  # by a convolution of one pixel
        joined[f"first_stage_model.{ours}"] = weight[:, :, None, None] if is_projection else weight
    for name, weight in text.items():
        joined[f"cond_stage_model.transformer.text_model.{name.removeprefix('text_model.')}"] = weight
    save_file({name: weight.contiguous() for name, weight in joined.items()}, file)


def of_unet(name: str) -> str:
    for theirs, ours in OUTER.items():
        if name.startswith(f"{theirs}."):
            name = name.replace(theirs, ours, 1)
    place = r"(down|up)_blocks\.(\d)\.(resnets|attentions|downsamplers|upsamplers)\.(\d)\.(?:conv\.)?(.*)"
    if found := re.match(place, name):
        block, kind, layer, rest = int(found[2]), found[3], int(found[4]), found[5]
        if found[1] == "down":
            number = 1 + 2 * block + (kind == "downsamplers" or layer)
            middle = {"resnets": "0", "attentions": "1", "downsamplers": "0.op"}[kind]
            name = f"input_blocks.{number}.{middle}.{rest}"
        else:  # one layer more than on the way down, and what enlarges after the last of them
            number = 2 * block + (kind == "upsamplers" or layer)
            middle = {"resnets": "0", "attentions": "1", "upsamplers": "2.conv"}[kind]
            name = f"output_blocks.{number}.{middle}.{rest}"
    resnet = re.match(r"(input_blocks\.\d|output_blocks\.\d|middle_block)\.\d\.(norm1|norm2|conv|time_emb)", name)
    return translate(name, RESNET) if resnet else name


def of_vae(name: str) -> str:
    name = re.sub(r"down_blocks\.(\d)\.resnets\.(\d)", r"down.\1.block.\2", name)
    name = re.sub(r"down_blocks\.(\d)\.downsamplers\.0", r"down.\1.downsample", name)
    name = re.sub(r"up_blocks\.(\d)\.resnets\.(\d)", lambda found: f"up.{1 - int(found[1])}.block.{found[2]}", name)
    name = re.sub(r"up_blocks\.(\d)\.upsamplers\.0", lambda found: f"up.{1 - int(found[1])}.upsample", name)
    return translate(name, VAE)


def translate(name: str, words: Mapping[str, str]) -> str:
    for theirs, ours in words.items():
        name = name.replace(theirs, ours)
    return name
