"""Is a checkpoint whole, and what is it. Everything is decided from names, headers and hashes, before any loading.

A checkpoint is a folder in the layout that diffusers saves a Stable Diffusion pipeline in. SDXL has two text encoders,
Stable Diffusion 1 and 2 have one::

    model_index.json
    scheduler/scheduler_config.json
    tokenizer/  tokenizer_2/
    text_encoder/model[.fp16].safetensors             text_encoder_2/model[.fp16].safetensors
    unet/diffusion_pytorch_model[.fp16].safetensors   vae/diffusion_pytorch_model[.fp16].safetensors
    training.json                                     optional: what it was trained for, {"resolutions": [pixels, ...],
                                                      "classes": {task: [name, ...], ...}}

A recipe may put other files or folders in the place of some of these (`submission.model.recipe`).
"""

import hashlib
import json
import math
import os
import threading
import zipfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from submission.errors import CheckpointError, UsageError, first_line
from submission.machine.disk import read_bytes
from submission.model.recipe import Recipe, Sampling

EMBEDDED = Path(__file__).resolve().parents[1] / "embedded"
# Pipelines of diffusers, and the components with weights that each has.
LAYOUTS = {
    "StableDiffusionXLPipeline": ("text_encoder", "text_encoder_2", "unet", "vae"),
    "StableDiffusionPipeline": ("text_encoder", "unet", "vae"),
}
# Names of weight files.
WEIGHTS = {
    "text_encoder": "model",
    "text_encoder_2": "model",
    "unet": "diffusion_pytorch_model",
    "vae": "diffusion_pytorch_model",
}
# Endings of weights that are Python objects.
PICKLES = (".bin", ".pt", ".pth", ".ckpt")
LATENT_CHANNELS = 4
# Tokens that CLIP's text encoders read.
CLIP_TOKENS = 77
# Pixels of a canvas's side at most: four times what the largest models draw.
MOST_PIXELS = 4096
# How what git-LFS leaves in the place of a file begins.
LFS_POINTER = b"version https://git-lfs"
# A fingerprint takes so many samples of so many bytes from every weight file, evenly spaced.
FINGERPRINT_SAMPLES, FINGERPRINT_BYTES = 16, 1 << 14
# Bytes of names and shapes in a file of torch.save at most: those of SDXL's UNet take 0.3 million.
MOST_PICKLE = 1 << 24
# Bytes of a configuration or a vocabulary at most: the largest tokenizer.json there are have 20 million.
MOST_TEXT = 1 << 26


@dataclass(frozen=True)
class Weights:
    """A component's weights: the `folder` with its configuration, and the `files`, several where they are in shards, of
    a `variant`, `"fp16"` or None. What `replaces` them is in a file of another name, or one for all components."""

    folder: Path
    files: tuple[Path, ...]
    variant: str | None = None
    replaces: bool = False


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint found whole, put together as its `recipe` says, whose files are all here.

    `source` says which rule chose it; `configs` maps each component, and `model_index`, to its parsed configuration.
    `classes` are the names of those that it was trained for, where it says so. `prompt_size` is how many numbers a
    prompt's embeddings are, and `projected_size` all keys and values that cross-attention makes of them.
    """

    recipe: Recipe
    source: str
    weights: Mapping[str, Weights]
    configs: Mapping[str, Any]
    resolutions: tuple[int, ...]
    classes: frozenset[str] | None
    prompt_size: int
    projected_size: int

    @property
    def path(self) -> Path:
        """The folder of its configurations."""
        return Path(self.recipe.base)

    def folder(self, part: str) -> Path:
        """The folder of a component, a tokenizer or the scheduler."""
        return _folder(self.recipe, part)

    @property
    def sampling(self) -> Sampling:
        return self.recipe.sampling

    @property
    def text_encoders(self) -> list[str]:
        return [component for component in self.weights if component.startswith("text_encoder")]

    @property
    def tokens(self) -> int:
        """Tokens of a prompt that its text encoders read at most."""
        return int(self.configs["text_encoder"].get("max_position_embeddings", CLIP_TOKENS))

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


def plain(path: Path, sampling: Sampling) -> Recipe:
    """The recipe of a folder that is a checkpoint by itself."""
    return Recipe(str(path), str(path), None, None, None, None, sampling, None, None, {})


def inspect(path: Path, source: str) -> Checkpoint:
    """Checks a folder that is a checkpoint by itself, as `inspect_recipe` does."""
    return inspect_recipe(plain(path, Sampling()), source)


def inspect_recipe(recipe: Recipe, source: str) -> Checkpoint:
    """Checks that all of a recipe's files are whole, reading configurations and headers only. They have to be here: its
    base a folder, its parts without a repository. A number of steps that is not said is one, if the scheduler is of the
    kind that goes with it.

    Raises CheckpointError naming the file that is missing, unreadable, truncated or of another kind, and UsageError.
    """
    path = Path(recipe.base)
    index = _read_json(path / "model_index.json")
    kind = index.get("_class_name")
    if not isinstance(kind, str) or kind not in LAYOUTS:
        raise CheckpointError(f"{path} holds a {kind}, and not one of those that are read: {', '.join(LAYOUTS)}")
    texts = [component for component in LAYOUTS[kind] if component.startswith("text_encoder")]
    tokenizers = [_tokenizer(text) for text in texts]
    _check_differing(recipe.weights, (*LAYOUTS[kind], *tokenizers, "scheduler"))
    weights = {component: _find_weights(recipe, component) for component in LAYOUTS[kind]}
    configs = {component: _read_json(found.folder / "config.json") for component, found in weights.items()}
    configs |= {"model_index": index, "scheduler": _read_json(_folder(recipe, "scheduler") / "scheduler_config.json")}
    for folder in [_folder(recipe, name) for name in tokenizers]:
        configs[folder.name] = _read_json(folder / "tokenizer_config.json")
        length = configs[folder.name].get("model_max_length")  # of one that was saved without, 1e30
        if length is not None and (not isinstance(length, int | float) or length < 1):
            raise CheckpointError(f"{folder}: model_max_length must be a number of tokens, and is {length!r:.40}")
        # Without its vocabulary a tokenizer loads all the same, and takes every word for unknown.
        vocabulary = _vocabulary(folder)
        if not {"tokenizer.json", "vocab.json"} & {file.name for file in vocabulary}:
            raise CheckpointError(f"{folder / 'vocab.json'} is missing (tokenizer.json, too)")
        for file in vocabulary:
            _check_text(file)
    for file in dict.fromkeys(chain.from_iterable(found.files for found in weights.values())):
        _check_weights(file)
    if recipe.lora:
        _check_weights(Path(recipe.lora.file))
    sampling = recipe.sampling
    if sampling.count is None:
        sampling = replace(sampling, steps=_steps_of(path, configs["scheduler"] | dict(sampling.settings)))
    for component in ("unet", "vae"):
        if not isinstance(levels := configs[component].get("block_out_channels"), list) or not levels:
            raise CheckpointError(f"{component}/config.json: block_out_channels must be a list, and is {levels!r:.40}")
    scaling = configs["vae"].get("scaling_factor", 1.0)
    if isinstance(scaling, bool) or not isinstance(scaling, int | float) or not 0 < scaling < math.inf:
        raise CheckpointError(f"vae/config.json: scaling_factor must be a number above 0, and is {scaling!r:.40}")
    own = _whole_number(configs, "unet", "sample_size") * 2 ** (len(configs["vae"]["block_out_channels"]) - 1)
    # What is not in a text encoder's configuration is as in CLIP.
    tokens = _whole_number(configs, "text_encoder", "max_position_embeddings", default=CLIP_TOKENS)
    prompt_size = tokens * _whole_number(configs, "unet", "cross_attention_dim")
    _check_fit(weights, configs, texts)
    resolutions, classes = _trained_for(path, own)
    found = Checkpoint(
        replace(recipe, sampling=sampling),
        source,
        weights,
        configs,
        (recipe.resolution,) if recipe.resolution else resolutions,
        classes,
        prompt_size,
        tokens * sum(map(_cross_attention_width, weights["unet"].files)),
    )
    if resolutions != (own,) and any(one % found.resolution_step for one in resolutions):
        raise CheckpointError(
            f"{path / 'training.json'}: resolutions {list(resolutions)} are no multiples of {found.resolution_step}, "
            "which the networks need"
        )
    if recipe.resolution and recipe.resolution % found.resolution_step:
        raise UsageError(
            f"{source}: resolution {recipe.resolution} is no multiple of {found.resolution_step}, which {path} needs"
        )
    return found


def _whole_number(configs: Mapping[str, Any], component: str, name: str, default: int | None = None) -> int:
    """A number of a component's configuration, 1 or more. Raises CheckpointError."""
    value = configs[component].get(name, default)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise CheckpointError(
            f"{component}'s configuration: {name} must be a whole number, 1 or more, and is {value!r:.40}"
        )
    return value


def _trained_for(path: Path, own: int) -> tuple[tuple[int, ...], frozenset[str] | None]:
    """The resolutions, and the names of classes, that a checkpoint says it was trained for; `own` and None where it
    says nothing. Raises CheckpointError."""
    file = path / "training.json"
    said = _read_json(file) if file.exists() else {}
    resolutions, classes = said.get("resolutions", [own]), said.get("classes")
    if not isinstance(resolutions, list) or not resolutions:
        raise CheckpointError(f"{file}: resolutions must be a list of pixel sizes")
    if resolutions != [own] and not all(type(one) is int and 0 < one <= MOST_PIXELS for one in resolutions):
        raise CheckpointError(f"{file}: resolutions must be pixel sizes, from 1 to {MOST_PIXELS}")
    if classes is None:
        return tuple(sorted(resolutions)), None
    if not isinstance(classes, dict) or not all(isinstance(names, list) for names in classes.values()):
        raise CheckpointError(f"{file}: classes must be lists of names, one for each task")
    return tuple(sorted(resolutions)), frozenset(map(str, chain.from_iterable(classes.values())))


def weight_digests(checkpoint: Checkpoint) -> dict[str, str]:
    """SHA-256 of every weight file, by its path inside the checkpoint, or all of its path where it is elsewhere: of the
    components in another folder several have the same name.

    Reads the files whole: seconds for SDXL.
    """
    digests = {}
    for file in _all_files(checkpoint):
        with file.open("rb") as stream:
            digests[_name(checkpoint, file)] = hashlib.file_digest(stream, "sha256").hexdigest()
    return digests


def not_as_published(checkpoint: Checkpoint, digests: Mapping[str, str]) -> list[str]:
    """Of weight files with these digests (`weight_digests`), those that are others than their recipe says."""
    published = published_digests(checkpoint)
    return [name for name, digest in digests.items() if published.get(name, digest) != digest]


def published_digests(checkpoint: Checkpoint) -> dict[str, str]:
    """What a recipe knows of its weight files' SHA-256, by their names as `weight_digests` has them."""
    recipe = checkpoint.recipe
    parts = [part for part in (recipe.unet, recipe.lora) if part and part.sha256]
    return {**recipe.sha256, **{_name(checkpoint, Path(part.file)): str(part.sha256) for part in parts}}


def read_ahead(checkpoint: Checkpoint) -> None:
    """Has the system read the weight files from the disk meanwhile, on a thread, where it takes such advice."""

    def advise() -> None:
        for file in _all_files(checkpoint):
            with suppress(OSError), file.open("rb") as stream:
                os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_WILLNEED)

    if hasattr(os, "posix_fadvise"):
        threading.Thread(target=advise, daemon=True).start()


def fingerprint(checkpoint: Checkpoint) -> str:
    """Which checkpoint it is, in no time: a digest of configurations and vocabularies, and of lengths and samples of
    the weight files.

    Enough to tell one training from another, as `weight_digests` does in seconds. Raises CheckpointError.
    """
    lora = checkpoint.recipe.lora
    told = {"configs": checkpoint.configs, "lora": lora and lora.weight}
    digest = hashlib.sha256(json.dumps(told, sort_keys=True).encode())
    for folder in [checkpoint.folder(_tokenizer(text)) for text in checkpoint.text_encoders]:
        for file in _vocabulary(folder):
            digest.update(hashlib.sha256(_check_text(file)).digest())
    for file in _all_files(checkpoint):
        try:
            with file.open("rb") as stream:
                size = file.stat().st_size
                for sample in range(FINGERPRINT_SAMPLES):
                    stream.seek(size * sample // FINGERPRINT_SAMPLES)
                    digest.update(stream.read(FINGERPRINT_BYTES))
        except OSError as error:
            raise CheckpointError(f"{file} cannot be read ({error.strerror})") from error
        digest.update(f"{file.name} {size}".encode())
    return digest.hexdigest()[:16]


def shapes(file: Path) -> dict[str, tuple[int, ...]]:
    """The shapes of a weight file's tensors, from its header. Raises OSError, SafetensorError, ValueError."""
    if file.suffix not in PICKLES:
        with safe_open(file, framework="numpy") as weights:  # checks that the file is as long as its header says
            return {name: tuple(weights.get_slice(name).get_shape()) for name in weights.keys()}  # noqa: SIM118
    import torch  # noqa: PLC0415  # slow to import, and few checkpoints need it here

    # What torch wrote before version 1.6 is no zip, and is read whole.
    if zipped := zipfile.is_zipfile(file):
        _check_archive(file)
    try:
        tensors = torch.load(file, map_location="meta", mmap=zipped, weights_only=True)
    except (RuntimeError, EOFError) as error:
        raise ValueError(first_line(error)) from error
    except Exception as error:  # pickle.UnpicklingError, and whatever a hostile pickle makes of the reader
        raise ValueError("it holds other things than tensors, which may run code when they are read") from error
    while isinstance(tensors, dict) and "state_dict" in tensors:  # beside what trainers keep, as libraries read it
        tensors = tensors["state_dict"]
    if not isinstance(tensors, dict) or not all(isinstance(tensor, torch.Tensor) for tensor in tensors.values()):
        raise ValueError("it holds other things than tensors by their names")
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def _check_archive(file: Path) -> None:
    """Raises ValueError where reading no more than names and shapes might take any amount of memory."""
    try:
        with zipfile.ZipFile(file) as archive:
            entries = archive.infolist()
    except (zipfile.BadZipFile, NotImplementedError) as error:
        raise ValueError(first_line(error)) from error
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
        raise ValueError("its archive is compressed, which torch.save never does")
    if any(entry.filename.endswith(".pkl") and entry.file_size > MOST_PICKLE for entry in entries):
        raise ValueError(f"names and shapes take more than {MOST_PICKLE >> 20} MiB")


def _tokenizer(text_encoder: str) -> str:
    return text_encoder.replace("text_encoder", "tokenizer")


def _vocabulary(tokenizer: Path) -> list[Path]:
    files = map(tokenizer.joinpath, ("tokenizer.json", "vocab.json", "merges.txt"))
    return [file for file in files if file.is_file()]


def _name(checkpoint: Checkpoint, file: Path) -> str:
    return str(file.relative_to(checkpoint.path) if file.is_relative_to(checkpoint.path) else file)


def _all_files(checkpoint: Checkpoint) -> list[Path]:
    files = [*chain.from_iterable(weights.files for weights in checkpoint.weights.values())]
    if checkpoint.recipe.lora:
        files.append(Path(checkpoint.recipe.lora.file))
    return list(dict.fromkeys(files))


def _check_differing(weights: Path | None, parts: Sequence[str]) -> None:
    """Raises CheckpointError where what a recipe puts in the place of the base's is not there."""
    if weights and not weights.exists():
        raise CheckpointError(f"{weights} is missing")
    if weights and weights.is_dir() and not any((weights / part).is_dir() for part in parts):
        raise CheckpointError(f"{weights} holds nothing in place of the base's: name its folders {', '.join(parts)}")


def _check_fit(weights: Mapping[str, Weights], configs: Mapping[str, Any], texts: Sequence[str]) -> None:
    """Raises CheckpointError where components are each whole and of different layouts, which would show in the first
    step."""
    unet, folder = configs["unet"], weights["unet"].folder
    widths = [configs[text].get("hidden_size") for text in texts]
    takes, told_sizes = unet["cross_attention_dim"], unet.get("addition_embed_type") == "text_time"
    known = all(isinstance(width, int) for width in widths)  # what CLIP's default is, a file may leave out
    if (known and sum(widths) != takes) or told_sizes != (len(texts) > 1):
        raise CheckpointError(
            f"{folder} is the UNet of another layout than {' and '.join(str(weights[text].folder) for text in texts)}: "
            f"it takes {takes} numbers a token, these make {' + '.join(map(str, widths))}"
        )
    if (channels := unet.get("in_channels", LATENT_CHANNELS)) != LATENT_CHANNELS:
        raise CheckpointError(
            f"{folder} takes {channels} channels, as for inpainting: text to image has {LATENT_CHANNELS}"
        )


def _folder(recipe: Recipe, part: str) -> Path:
    """Where a component, a tokenizer or the scheduler is: among what differs from the base, else in the base."""
    differing = recipe.weights and recipe.weights / part
    return differing if differing and differing.is_dir() else Path(recipe.base) / part


def _find_weights(recipe: Recipe, component: str) -> Weights:
    """Where a component's weights are. Raises CheckpointError."""
    folder = Path(recipe.base) / component
    if component == "unet" and recipe.unet:
        return Weights(folder, (Path(recipe.unet.file),), replaces=True)
    if recipe.weights and recipe.weights.is_file():
        return Weights(folder, (recipe.weights,), replaces=True)
    folder = _folder(recipe, component)
    variant = _variant(folder, component)
    return Weights(folder, tuple(_weight_files(folder, component, variant)), variant)


def _steps_of(path: Path, scheduler: Mapping[str, Any]) -> int:
    spacing = scheduler.get("timestep_spacing")
    if spacing != "trailing":
        raise CheckpointError(
            f"{path} is not a one-step checkpoint: its scheduler's timestep_spacing is {spacing!r}, one-step models "
            "such as SDXL-Turbo have 'trailing'; say how many --steps it takes, as in --steps 20 --guidance 5"
        )
    return 1


def _weight_files(folder: Path, component: str, variant: str | None) -> list[Path]:
    """A component's weights as libraries save them: one file, or an index and the shards that it names (diffusers makes
    shards above 10 GB). Raises CheckpointError where the index makes no sense."""
    name = WEIGHTS[component]
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


def _variant(folder: Path, component: str) -> str | None:
    """Which of its weights to take: in half precision where there are both. Raises CheckpointError."""
    for variant in ("fp16", None):
        files = _weight_files(folder, component, variant)
        missing = [file for file in files if not file.is_file()]
        if not missing:
            return variant
        if len(files) > 1:
            raise CheckpointError(f"{missing[0]} is missing, one of {len(files)} shards: fetch it again")
    single = _weight_files(folder, component, None)[0]
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
        empty = not shapes(file)
    except (SafetensorError, OSError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{file} is damaged or truncated ({error}): fetch it again") from error
    if empty:
        raise CheckpointError(f"{file} holds no weights")


def _cross_attention_width(file: Path) -> int:
    """Numbers that all layers of a UNet together make of one token."""
    layers = (".attn2.to_k.weight", ".attn2.to_v.weight")
    return sum(shape[0] for name, shape in shapes(file).items() if name.endswith(layers))


def _check_text(file: Path) -> bytes:
    """What is in the file. Raises CheckpointError, also where it is empty: a tokenizer would take that for one without
    merges."""
    try:
        content = read_bytes(file, MOST_TEXT)
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise CheckpointError(f"{file} is no tokenizer's: {error}") from error
    _refuse_pointer(file, content)
    if not content.strip():
        raise CheckpointError(f"{file} is empty: fetch it again")
    return content


def _refuse_pointer(file: Path, content: bytes) -> None:
    if content.startswith(LFS_POINTER):
        raise CheckpointError(f"{file} is git-LFS's pointer to the file, and not the file: git lfs pull brings it")


def _read_json(file: Path) -> dict[str, Any]:
    try:
        if file.exists() and not file.is_file():
            raise CheckpointError(f"{file} is not a file")  # a pipe would never end
        text = read_bytes(file, MOST_TEXT)
        _refuse_pointer(file, text)
        content = json.loads(text)
    except FileNotFoundError as error:
        raise CheckpointError(f"{file} is missing: not a checkpoint in diffusers' layout, or not all of it") from error
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read ({error.strerror})") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file} is damaged ({error}): fetch it again") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{file} is not a JSON object")
    return content
