"""Which checkpoint, is it whole, what is it. Everything is decided from names, headers and hashes, before any loading.

A checkpoint is a folder in SDXL-Turbo's layout::

    model_index.json
    scheduler/scheduler_config.json
    tokenizer/  tokenizer_2/
    text_encoder/model[.fp16].safetensors             text_encoder_2/model[.fp16].safetensors
    unet/diffusion_pytorch_model[.fp16].safetensors   vae/diffusion_pytorch_model[.fp16].safetensors
    training.json                                     optional: {"resolutions": [...]} it was trained for, in pixels
"""

import hashlib
import json
import os
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from textwrap import shorten
from typing import Any

from safetensors import SafetensorError, safe_open

from submission.errors import CheckpointError

PROJECT = Path(__file__).resolve().parents[2]
EMBEDDED = PROJECT / "submission" / "embedded"
SDXL_TURBO = "stabilityai/sdxl-turbo"
SDXL_TURBO_REVISION = "71153311d3dbb46851df1931d3ca6e939de83304"
# SHA-256 of its weights, as the hub publishes them.
SDXL_TURBO_SHA256 = {
    "text_encoder/model.fp16.safetensors": "660c6f5b1abae9dc498ac2d21e1347d2abdb0cf6c0c0c8576cd796491d9a6cdd",
    "text_encoder_2/model.fp16.safetensors": "ec310df2af79c318e24d20511b601a591ca8cd4f1fce1d8dff822a356bcdb1f4",
    "unet/diffusion_pytorch_model.fp16.safetensors": "48fa46161a745f48d4054df3fe13804ee255486bca893403b60373c188fd1bdb",
    "vae/diffusion_pytorch_model.fp16.safetensors": "02ee4bd18e5d16e7fe5fc5b85b4aefa2cba6db28897f674226c9d6ddd2f34f06",
}
WEIGHTS = {
    "text_encoder": "model",
    "text_encoder_2": "model",
    "unet": "diffusion_pytorch_model",
    "vae": "diffusion_pytorch_model",
}
# Endings of weights that are Python objects.
PICKLES = (".bin", ".pt", ".pth", ".ckpt")
# How what git-LFS leaves in the place of a file begins.
LFS_POINTER = b"version https://git-lfs"
# A fingerprint takes so many samples of so many bytes from every weight file, evenly spaced.
FINGERPRINT_SAMPLES, FINGERPRINT_BYTES = 16, 1 << 14
CONFIGS = (
    "scheduler/scheduler_config.json",
    "text_encoder/config.json",
    "text_encoder_2/config.json",
    "tokenizer/tokenizer_config.json",
    "tokenizer_2/tokenizer_config.json",
    "unet/config.json",
    "vae/config.json",
)
# What is fetched of a hub repository.
HUB_FILES = [
    "*.json",
    *(f"{part}/*" for part in ("scheduler", "tokenizer", "tokenizer_2")),
    *(f"{part}/*{kind}" for part in WEIGHTS for kind in (".json", ".fp16.safetensors", ".fp16-*.safetensors")),
]


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint folder found whole.

    `source` says which rule chose it; `variants` maps each component with weights to `"fp16"` or None, the
    variant of its file; `configs` maps each component to its parsed configuration. `prompt_size` is how many numbers
    a prompt's embeddings are, and `projected_size` all keys and values that cross-attention makes of them.
    """

    path: Path
    source: str
    variants: Mapping[str, str | None]
    configs: Mapping[str, Any]
    resolutions: tuple[int, ...]
    prompt_size: int
    projected_size: int

    @property
    def vae_factor(self) -> int:
        """Pixels of the canvas a latent pixel stands for."""
        return int(2 ** (len(self.configs["vae"]["block_out_channels"]) - 1))

    @property
    def resolution_step(self) -> int:
        """Resolutions are multiples of this many pixels: every level of VAE and UNet halves exactly."""
        return int(self.vae_factor * 2 ** (len(self.configs["unet"]["block_out_channels"]) - 1))

    def resolution_for(self, size: int) -> int:
        """Canvas in pixels for images of `size` pixels: the smallest one it was trained for that is not smaller."""
        return min((r for r in self.resolutions if r >= size), default=max(self.resolutions))

    def weight_files(self, component: str) -> Sequence[Path]:
        """One file, or shards in their order."""
        return _weight_files(self.path, component, self.variants[component])


def choose(model: str, *, cuda: bool, environment: Mapping[str, str] = os.environ, root: Path = PROJECT) -> Checkpoint:
    """Finds and checks the checkpoint that `--model` asks for.

    `model` is `auto`, `embedded`, a folder or a hub id. `auto` takes the `BANKO_MODEL` of `environment`,
    else `root`/models/sdxl-turbo, else with `cuda` SDXL-Turbo from the hub (its cache first), else the embedded
    one: a machine with a GPU never submits the stand-in by accident. Raises CheckpointError.
    """
    if model == "auto":
        local = root / "models" / "sdxl-turbo"
        if chosen := environment.get("BANKO_MODEL"):
            return _named(chosen, f"BANKO_MODEL={chosen}")
        if local.is_dir():
            return inspect(local, "models/sdxl-turbo")
        if not cuda:
            return inspect(EMBEDDED, "embedded (no CUDA device, no SDXL-Turbo in models/sdxl-turbo)")
        try:
            return _from_hub(SDXL_TURBO, f"hub {SDXL_TURBO}")
        except CheckpointError as error:
            raise CheckpointError(
                f"no SDXL-Turbo weights: {error}; put them into models/sdxl-turbo, set BANKO_MODEL, "
                "or ask for the stand-in with --model embedded"
            ) from error
    return _named(model, f"--model {model}")


def _named(model: str, source: str) -> Checkpoint:
    if model == "embedded":
        return inspect(EMBEDDED, source)
    try:
        if Path(model).is_dir():
            return inspect(Path(model), source)
    except OSError as error:
        raise CheckpointError(f"{source}: {model} cannot be looked into ({error.strerror})") from error
    if model.count("/") != 1 or model.startswith((".", "/", "~")):
        raise CheckpointError(f"{source}: there is no folder {model}, and a hub id has the form OWNER/NAME")
    return _from_hub(model, source)


def _from_hub(hub_id: str, source: str) -> Checkpoint:
    """A hub repository's files: from the hub's cache if they are there and whole, else fetched."""
    try:
        return inspect(fetch(hub_id, local_files_only=True), source)
    except CheckpointError:
        return inspect(fetch(hub_id), source)


def fetch(
    hub_id: str, *, revision: str | None = None, folder: Path | None = None, local_files_only: bool = False
) -> Path:
    """Brings the files of a hub repository into `folder`, or into the hub's cache, and returns the folder they are in.

    With `local_files_only` they have to be there already. Raises CheckpointError.
    """
    from huggingface_hub import snapshot_download  # noqa: PLC0415  # slow to import, and only needed here
    from huggingface_hub.utils import logging  # noqa: PLC0415

    logging.set_verbosity_error()  # type: ignore[no-untyped-call]  # it would tell of every try
    try:
        found = snapshot_download(
            hub_id, revision=revision, local_dir=folder, allow_patterns=HUB_FILES, local_files_only=local_files_only
        )
    except Exception as error:
        reason = shorten(str(error) or type(error).__name__, 200, placeholder=" ...")
        raise CheckpointError(
            f"{hub_id} is neither a folder here nor to be had from the hub ({reason}); what has come of it is kept for "
            "another try"
        ) from error
    return Path(found)


def inspect(path: Path, source: str) -> Checkpoint:
    """Checks that a folder is a whole SDXL-layout checkpoint, reading configurations and safetensors headers only.

    Raises CheckpointError naming the file that is missing, unreadable, truncated or of another kind.
    """
    index = _read_json(path / "model_index.json")
    kind = index.get("_class_name")
    if kind != "StableDiffusionXLPipeline":
        raise CheckpointError(
            f"{path} holds a {kind}, not the SDXL layout this needs (StableDiffusionXLPipeline, as in SDXL-Turbo)"
        )
    configs = {Path(name).parts[0]: _read_json(path / name) for name in CONFIGS}
    if configs["scheduler"].get("timestep_spacing") != "trailing":
        raise CheckpointError(
            f"{path} is not a one-step checkpoint: its scheduler's timestep_spacing is "
            f"{configs['scheduler'].get('timestep_spacing')!r}, one-step models such as SDXL-Turbo have 'trailing'"
        )
    for folder in (path / "tokenizer", path / "tokenizer_2"):
        # Without its vocabulary a tokenizer loads all the same, and takes every word for unknown.
        if not (folder / "tokenizer.json").is_file() and not (folder / "vocab.json").is_file():
            raise CheckpointError(f"{folder / 'vocab.json'} is missing (tokenizer.json, too)")
    variants = {component: _variant(path, component) for component in WEIGHTS}
    for component, variant in variants.items():
        for file in _weight_files(path, component, variant):
            _check_weights(file)
    try:
        factor = 2 ** (len(configs["vae"]["block_out_channels"]) - 1)
        own = int(configs["unet"]["sample_size"]) * factor
        # What is not in a text encoder's configuration is as in CLIP.
        tokens = int(configs["text_encoder"].get("max_position_embeddings", 77))
        prompt_size = tokens * int(configs["unet"]["cross_attention_dim"])
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: unet/config.json or vae/config.json lacks a usable {error}") from error
    training = path / "training.json"
    resolutions = _read_json(training).get("resolutions") if training.exists() else [own]
    if not isinstance(resolutions, list) or not resolutions or not all(isinstance(r, int) for r in resolutions):
        raise CheckpointError(f"{training}: resolutions must be a list of pixel sizes")
    projected_size = tokens * sum(map(_cross_attention_width, _weight_files(path, "unet", variants["unet"])))
    return Checkpoint(path, source, variants, configs, tuple(sorted(resolutions)), prompt_size, projected_size)


def weight_digests(checkpoint: Checkpoint) -> dict[str, str]:
    """SHA-256 of every weight file, by its path inside the checkpoint. Reads the files whole: seconds for SDXL."""
    digests = {}
    for component in WEIGHTS:
        for file in checkpoint.weight_files(component):
            with file.open("rb") as stream:
                digests[str(file.relative_to(checkpoint.path))] = hashlib.file_digest(stream, "sha256").hexdigest()
    return digests


def recognise(sha256: Mapping[str, str]) -> str | None:
    """The hub's name of the checkpoint whose weight files have these digests (`weight_digests`), if known."""
    return SDXL_TURBO if sha256 == SDXL_TURBO_SHA256 else None


def read_ahead(checkpoint: Checkpoint) -> None:
    """Has the system read the weight files from the disk meanwhile, on a thread, where it takes such advice."""

    def advise() -> None:
        for file in chain.from_iterable(map(checkpoint.weight_files, WEIGHTS)):
            with suppress(OSError), file.open("rb") as stream:
                os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_WILLNEED)

    if hasattr(os, "posix_fadvise"):
        threading.Thread(target=advise, daemon=True).start()


def fingerprint(checkpoint: Checkpoint) -> str:
    """Which checkpoint it is, in no time: a digest of configurations, and of lengths and samples of the weight files.

    Enough to tell one training from another, as `weight_digests` does in seconds. Raises CheckpointError.
    """
    digest = hashlib.sha256(json.dumps(dict(checkpoint.configs), sort_keys=True).encode())
    for component, file in ((part, file) for part in WEIGHTS for file in checkpoint.weight_files(part)):
        try:
            with file.open("rb") as stream:
                size = file.stat().st_size
                for sample in range(FINGERPRINT_SAMPLES):
                    stream.seek(size * sample // FINGERPRINT_SAMPLES)
                    digest.update(stream.read(FINGERPRINT_BYTES))
        except OSError as error:
            raise CheckpointError(f"{file} cannot be read ({error.strerror})") from error
        digest.update(f"{component} {size}".encode())
    return digest.hexdigest()[:16]


def _weight_files(path: Path, component: str, variant: str | None) -> list[Path]:
    """A component's weights as libraries save them: one file, or an index and the shards that it names (diffusers makes
    shards above 10 GB). Raises CheckpointError where the index makes no sense."""
    folder, name = path / component, WEIGHTS[component]
    index = folder / f"{name}.safetensors.index{f'.{variant}' if variant else ''}.json"
    single = folder / f"{name}{f'.{variant}' if variant else ''}.safetensors"
    if single.is_file() or not index.is_file():
        return [single]
    shards = _read_json(index).get("weight_map")
    if not isinstance(shards, dict) or not shards:
        raise CheckpointError(f"{index} names no weights")
    names = sorted({str(shard) for shard in shards.values()})
    if any(Path(one).name != one for one in names):
        raise CheckpointError(f"{index} names files outside of its folder")
    return [folder / one for one in names]


def _variant(path: Path, component: str) -> str | None:
    """Which of its weights to take: in half precision where there are both. Raises CheckpointError."""
    for variant in ("fp16", None):
        files = _weight_files(path, component, variant)
        missing = [file for file in files if not file.is_file()]
        if not missing:
            return variant
        if len(files) > 1:
            raise CheckpointError(f"{missing[0]} is missing, one of {len(files)} shards: fetch it again")
    single = _weight_files(path, component, None)[0]
    pickles = [file for file in single.parent.glob("*") if file.suffix in PICKLES]
    if pickles:
        raise CheckpointError(
            f"{pickles[0]} is a pickle, which may run code when it is read, and is refused: save the model as "
            "safetensors, as diffusers' save_pretrained does"
        )
    raise CheckpointError(f"{single} is missing (its .fp16.safetensors variant, too)")


def _check_weights(file: Path) -> None:
    try:
        with file.open("rb") as stream:  # whose error says why: a file that is not to be read is not a damaged one
            _refuse_pointer(file, stream.read(len(LFS_POINTER)))
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read ({error.strerror})") from error
    try:
        with safe_open(file, framework="numpy") as weights:  # checks that the file is as long as its header says
            empty = not weights.keys()
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file} is damaged or truncated ({error}): fetch it again") from error
    if empty:
        raise CheckpointError(f"{file} holds no weights")


def _cross_attention_width(file: Path) -> int:
    """Numbers that all layers of a UNet together make of one token."""
    with safe_open(file, framework="numpy") as weights:
        names = weights.keys()
        layers = [name for name in names if name.endswith((".attn2.to_k.weight", ".attn2.to_v.weight"))]
        return sum(weights.get_slice(name).get_shape()[0] for name in layers)


def _refuse_pointer(file: Path, content: bytes) -> None:
    if content.startswith(LFS_POINTER):
        raise CheckpointError(f"{file} is git-LFS's pointer to the file, and not the file: git lfs pull brings it")


def _read_json(file: Path) -> dict[str, Any]:
    try:
        text = file.read_bytes()
        _refuse_pointer(file, text)
        content = json.loads(text)
    except FileNotFoundError as error:
        raise CheckpointError(f"{file} is missing: not a checkpoint in SDXL's layout, or not all of it") from error
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise CheckpointError(f"{file} is damaged ({error}): fetch it again") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{file} is not a JSON object")
    return content
