"""Writes a checkpoint with random weights, to measure and test with where the real one is not.

    ./run.sh make-checkpoint models/random --layout sdxl --size full

`full` has the configurations of SDXL-Turbo or of Stable Diffusion 2.1 or 1.5 (`tools/sdxl_turbo/` and its neighbours),
and so their speed and memory; its pictures are noise. `small` is the same wiring, narrow. Components are made and
written one at a time.
"""

import itertools
import json
import math
import os
import shutil
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors import SafetensorError
from safetensors.torch import save_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from submission.arguments import Parser, exit_code_of, number_from
from submission.errors import OutputError, UsageError
from submission.model.checkpoint import LAYOUTS, WEIGHTS
from submission.tasks import builtin_names, load_task
from tools.training.layout import build_tokenizer, share
from tools.training.prompts import all_prompts

# A folder with configurations for each layout.
CONFIGS = {"sdxl": "sdxl_turbo", "sd21": "sd21", "sd15": "sd15"}
# What `small` changes: widths, and depths of what is deep.
SMALL: dict[str, dict[str, Any]] = {
    "text_encoder": {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "num_hidden_layers": 2},
    "text_encoder_2": {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_attention_heads": 2,
        "num_hidden_layers": 2,
        "projection_dim": 64,
    },
    "unet": {
        "block_out_channels": [32, 64, 64],
        "attention_head_dim": [1, 2, 2],
        "transformer_layers_per_block": [1, 1, 2],
        "cross_attention_dim": 32 + 64,
        "addition_time_embed_dim": 32,
        "projection_class_embeddings_input_dim": 6 * 32 + 64,
    },
    "vae": {"block_out_channels": [32, 32, 64, 64]},
}
SMALL_SD = SMALL | {
    "unet": {
        "block_out_channels": [32, 64, 64, 64],
        "attention_head_dim": [1, 2, 2, 2],
        "cross_attention_dim": 32,
    }
}
# Standard deviation of embeddings, as CLIP's are initialised.
EMBEDDING_STD = 0.02
BYTES_PER_WEIGHT = 2  # fp16


def build_parser() -> Parser:
    parser = Parser(
        prog="./run.sh make-checkpoint",
        description="Writes a checkpoint with random fp16 weights.",
        epilog="example:\n  ./run.sh make-checkpoint models/random --size small\n"
        "  ./run.sh cifar100 --model models/random --resolution 64\n\n"
        "exit codes: 0 written; 2 usage; 5 it cannot be written",
    )
    add = parser.add_argument
    add("folder", type=Path, metavar="DIR", help="a new folder")
    add("--layout", choices=tuple(CONFIGS), default="sdxl", help="of SDXL-Turbo, or of Stable Diffusion 2.1 or 1.5")
    add("--size", choices=("full", "small"), default="full", help="full: as large as these, 2 to 7 GB; small: a few MB")
    add("--seed", type=number_from(0), default=0, metavar="N", help="of the weights")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    options = build_parser().parse_args(arguments)
    return exit_code_of(lambda: make_checkpoint(options.folder, options.layout, options.size, options.seed))


def make_checkpoint(folder: Path, layout: str, size: str, seed: int) -> None:
    """Write it into a folder that does not exist yet, or is empty. Raises UsageError, OutputError."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UsageError(f"{folder} is there already: name a new folder")
    source = Path(__file__).parent / CONFIGS[layout]
    configs = {file.relative_to(source): json.loads(file.read_bytes()) for file in source.rglob("*.json")}
    components = LAYOUTS[configs[Path("model_index.json")]["_class_name"]]
    if size == "small":
        for component in components:
            configs[Path(component) / "config.json"] |= (SMALL if layout == "sdxl" else SMALL_SD)[component]
    networks = {component: on_paper(component, configs[Path(component) / "config.json"]) for component in components}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        need = BYTES_PER_WEIGHT * sum(p.numel() for network in networks.values() for p in network.state_dict().values())
        if (free := shutil.disk_usage(folder).free) < need:
            raise OutputError(f"{folder}: the weights take {need / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free")
        for file, config in configs.items():
            (folder / file).parent.mkdir(exist_ok=True)
            (folder / file).write_text(json.dumps(config, indent=2) + "\n")
        _write_tokenizers(folder, components, configs[Path("text_encoder/config.json")])
        for number, (component, network) in enumerate(networks.items()):
            file = folder / component / f"{WEIGHTS[component]}.fp16.safetensors"
            save_file(_random_weights(network, (seed, number)), file, metadata={"format": "pt"})
            share(file)
            print(f"{file}: {file.stat().st_size / 1e6:,.1f} MB", flush=True)
    except (OSError, SafetensorError) as error:
        raise OutputError(f"cannot write {folder} ({getattr(error, 'strerror', None) or error})") from error


def on_paper(component: str, config: dict[str, Any]) -> torch.nn.Module:
    """The network of a component, with shapes and no memory."""
    with torch.device("meta"):
        if component == "unet":
            return UNet2DConditionModel.from_config(config)  # type: ignore[no-any-return]
        if component == "vae":
            return AutoencoderKL.from_config(config)  # type: ignore[no-any-return]
        kind = CLIPTextModel if component == "text_encoder" else CLIPTextModelWithProjection
        return kind(CLIPTextConfig(**config))  # type: ignore[no-any-return]


def _random_weights(network: torch.nn.Module, seed: tuple[int, int]) -> dict[str, torch.Tensor]:
    """fp16 weights of the scale that torch gives a new layer: norms that do nothing, and products of a gain below one,
    so that a residual block adds to what it gets and does not drown it. They are drawn on all cores, each tensor from
    a generator of its own."""

    def draw(number: int, name: str, shape: torch.Size) -> torch.Tensor:
        if len(shape) < 2:
            return torch.full(shape, float(name.endswith("weight")), dtype=torch.float16)
        std = EMBEDDING_STD if "embedding.weight" in name else 1 / math.sqrt(3 * math.prod(shape[1:]))
        values = np.random.default_rng((*seed, number)).standard_normal(shape, dtype=np.float32)
        return torch.from_numpy(values * np.float32(std)).half()

    shapes = {name: tensor.shape for name, tensor in network.state_dict().items()}
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return dict(zip(shapes, pool.map(draw, itertools.count(), shapes, shapes.values()), strict=True))


def _write_tokenizers(folder: Path, components: Sequence[str], config: dict[str, Any]) -> None:
    """Tokenizers with merges learnt from the tasks' prompts: CLIP's are not ours to hand on, and nothing depends on
    which number a token has."""
    prompts = all_prompts([load_task(name) for name in builtin_names()])
    tokenizer = build_tokenizer(prompts, config["vocab_size"])
    tokenizer.model_max_length = config["max_position_embeddings"]
    for component in components:
        if component.startswith("text_encoder"):
            tokenizer.save_pretrained(folder / component.replace("text_encoder", "tokenizer"))


if __name__ == "__main__":
    raise SystemExit(main())
