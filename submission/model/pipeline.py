"""A checkpoint to prompt embeddings, and to networks that are ready to sample and to decode."""

import timeit
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from submission.errors import CheckpointError, first_line
from submission.model.checkpoint import Checkpoint, Weights
from submission.model.lora import fuse

# bf16 must win by this factor on a matrix product before a CPU uses it: where the hardware lacks it, it is hundreds of
# times slower, and where it has it, at least twice as fast, so that noise does not decide.
BF16_GAIN = 1.3
# Prompts encoded at a time, few for the sake of memory.
PROMPTS_PER_BATCH = 16
# The folder of a tiny autoencoder for its latents, by the number of text encoders: its name on the hub.
TINY = {1: "taesd", 2: "taesdxl"}
# Whether no negative prompt is one of zeros, as model_index.json says of SDXL; where it does not, it is.
ZEROS = "force_zeros_for_empty_prompt"
# What torch compiles of a UNet, and in how many shapes at most.
COMPILED_BLOCKS, SHAPES = ("BasicTransformerBlock", "ResnetBlock2D"), 64


@dataclass(frozen=True)
class Conditioning:
    """What the UNet is told of each prompt: `embeds` [P, tokens, D] and, by SDXL's, `pooled` [P, D'], in the UNet's
    dtype. Where sampling is guided, the last one is the negative prompt.

    Of a UNet that looks projections up (`project_prompts`), `embeds` are the prompts' numbers, int64 [P, 1, 1].
    """

    embeds: Tensor
    pooled: Tensor | None


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


class TextEncoders:
    """A checkpoint's tokenizers and text encoders on a device, in `dtype`. Raises CheckpointError."""

    def __init__(self, checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype) -> None:
        from transformers import CLIPTextModel, CLIPTextModelWithProjection  # noqa: PLC0415  # slow to import
        from transformers.utils import logging  # noqa: PLC0415

        logging.disable_progress_bar()
        self._device, self._dtype, self._sampling = device, dtype, checkpoint.sampling
        sdxl = len(checkpoint.text_encoders) > 1
        self._zeros = sdxl and bool(checkpoint.configs["model_index"].get(ZEROS, True))
        self._loaded = [
            (
                _load_tokenizer(checkpoint.folder(component.replace("text_encoder", "tokenizer"))),
                _load_model(
                    CLIPTextModelWithProjection if component == "text_encoder_2" else CLIPTextModel,
                    checkpoint,
                    component,
                    device,
                    dtype,
                ),
            )
            for component in checkpoint.text_encoders
        ]

    @torch.inference_mode()
    def encode(self, prompts: Sequence[str]) -> Conditioning:
        """As SDXL does: the second-to-last hidden states of both text encoders side by side, and the projected text
        embedding of the second. As Stable Diffusion 1 and 2 do: the last hidden state after its norm."""
        hidden: list[list[Tensor]] = []
        pooled: list[Tensor] = []
        for tokenizer, encoder in self._loaded:
            tokens = tokenizer(
                list(prompts),
                padding="max_length",
                # Of a tokenizer that was saved without a length it is 1e30.
                max_length=min(tokenizer.model_max_length, encoder.config.max_position_embeddings),
                truncation=True,
                return_tensors="pt",
            ).input_ids.to(self._device)
            sdxl, states = len(self._loaded) > 1, []
            for batch in tokens.split(PROMPTS_PER_BATCH):
                output = encoder(batch, output_hidden_states=sdxl)
                # The other layers' states, of thousands of prompts, would take many times as much memory.
                states.append(output.hidden_states[-2] if sdxl else output.last_hidden_state)
                if sdxl and len(hidden) == 1:
                    pooled.append(output.text_embeds)
            hidden.append(states)
        embeds = torch.cat([torch.cat(states) for states in hidden], dim=-1)
        return Conditioning(embeds.to(self._dtype), torch.cat(pooled).to(self._dtype) if pooled else None)

    @torch.inference_mode()
    def with_negative(self, conditioning: Conditioning) -> Conditioning:
        """The same and, where sampling is guided, the negative prompt."""
        if not self._sampling.guided:
            return conditioning
        negative = self.encode([self._sampling.negative or ""])
        embeds, pooled = negative.embeds, negative.pooled
        if self._sampling.negative is None and self._zeros:
            embeds, pooled = torch.zeros_like(embeds), None if pooled is None else torch.zeros_like(pooled)
        both = None if conditioning.pooled is None or pooled is None else torch.cat([conditioning.pooled, pooled])
        return Conditioning(torch.cat([conditioning.embeds, embeds]), both)


def encode_prompts(
    checkpoint: Checkpoint, prompts: Sequence[str], device: torch.device, dtype: torch.dtype
) -> Conditioning:
    """Encodes every prompt once, and the negative prompt where sampling is guided. The encoders are let go on return.
    Raises CheckpointError."""
    encoders = TextEncoders(checkpoint, device, dtype)
    return encoders.with_negative(encoders.encode(prompts))


class WaitingPrompts:
    """Prompts that are encoded when they are first asked for: of thousands, a slow device comes to need a few."""

    def __init__(self, encoders: TextEncoders, prompts: Sequence[str]) -> None:
        self._encoders, self._prompts = encoders, prompts
        self._waiting = set(range(len(prompts)))

    def __bool__(self) -> bool:
        return bool(self._waiting)

    @torch.inference_mode()
    def fill(self, conditioning: Conditioning, numbers: Sequence[int]) -> None:
        """Encodes those of these prompts that have not been, into their places."""
        if missing := sorted(self._waiting.intersection(numbers)):
            encoded = self._encoders.encode([self._prompts[number] for number in missing])
            conditioning.embeds[missing] = encoded.embeds.to(conditioning.embeds)
            if conditioning.pooled is not None and encoded.pooled is not None:
                conditioning.pooled[missing] = encoded.pooled.to(conditioning.pooled)
            self._waiting.difference_update(missing)


def encode_later(
    checkpoint: Checkpoint, prompts: Sequence[str], device: torch.device, dtype: torch.dtype
) -> tuple[Conditioning, WaitingPrompts]:
    """Room for what the UNet is told of every prompt, and what fills it. Raises CheckpointError.

    It is in the CPU's memory: a thousand classes in 32 phrasings take 10 GB in SDXL's layout.
    """
    encoders = TextEncoders(checkpoint, device, dtype)
    first = encoders.with_negative(encoders.encode(prompts[:1]))

    def room(one: Tensor) -> Tensor:
        table = torch.zeros(len(prompts) + len(one) - 1, *one.shape[1:], dtype=one.dtype)
        table[len(prompts) :] = one[1:]
        return table

    pooled = None if first.pooled is None else room(first.pooled)
    return Conditioning(room(first.embeds), pooled), WaitingPrompts(encoders, prompts)


def too_long(checkpoint: Checkpoint, prompts: Sequence[str]) -> list[str]:
    """The prompts of more tokens than the text encoders read, which would be cut. Raises CheckpointError."""
    tokenizer = _load_tokenizer(checkpoint.folder("tokenizer"))
    most = min(tokenizer.model_max_length, checkpoint.tokens)
    lengths = map(len, tokenizer(list(prompts), verbose=False).input_ids)
    return [p for p, length in zip(prompts, lengths, strict=True) if length > most]


def load_unet(checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype) -> Any:
    """The checkpoint's UNet2DConditionModel, its LoRA fused, ready to sample. Raises CheckpointError."""
    from diffusers import UNet2DConditionModel  # noqa: PLC0415  # slow to import

    return _laid_out(_load_model(UNet2DConditionModel, checkpoint, "unet", device, dtype))


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


def load_vae(checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype) -> Any:
    """The checkpoint's AutoencoderKL, ready to decode. Raises CheckpointError."""
    from diffusers import AutoencoderKL  # noqa: PLC0415  # slow to import

    return _laid_out(_load_model(AutoencoderKL, checkpoint, "vae", device, dtype))


def load_tiny(checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype) -> Any | None:
    """The AutoencoderTiny in a folder `taesdxl` (`taesd` for Stable Diffusion 1 and 2) in the checkpoint's folder or
    beside it, ready to decode; None where there is none. Raises CheckpointError."""
    name = TINY[len(checkpoint.text_encoders)]
    folders = [parent / name for parent in (checkpoint.path, checkpoint.path.parent)]
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


def _load_tokenizer(folder: Path) -> Any:
    from transformers import CLIPTokenizer  # noqa: PLC0415  # slow to import

    try:
        return CLIPTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # of no class of its own, where a tokenizer's file is damaged
        raise CheckpointError(f"{folder} cannot be loaded ({first_line(error)})") from error


def _load_model(kind: Any, checkpoint: Checkpoint, component: str, device: torch.device, dtype: torch.dtype) -> Any:
    """Loads one component of a checkpoint, its part of the LoRA fused. Raises CheckpointError."""
    weights = checkpoint.weights[component]
    if not weights.replaces:
        model = _load_folder(kind, weights.folder, weights.variant, device, dtype)
    else:
        model = _load_replacement(kind, checkpoint, component, weights, device, dtype)
    if checkpoint.recipe.lora:
        fuse(model, component, checkpoint.recipe.lora, checkpoint.configs)
    return model


def _load_replacement(
    kind: Any, checkpoint: Checkpoint, component: str, weights: Weights, device: torch.device, dtype: torch.dtype
) -> Any:
    """A component from a file with a name of its own: in diffusers' form, or in the authors', with the others in it."""
    import diffusers  # noqa: PLC0415  # slow to import
    from diffusers.loaders.single_file_utils import SingleFileComponentError  # noqa: PLC0415

    diffusers.utils.logging.disable_progress_bar()
    diffusers.utils.logging.set_verbosity_error()  # it would advise on precision, which is chosen here
    file, told = str(weights.files[0]), {"config": str(checkpoint.path), "local_files_only": True, "torch_dtype": dtype}
    try:
        if hasattr(kind, "from_single_file"):
            model = kind.from_single_file(file, subfolder=component, device=str(device), **told)
        else:  # a text encoder, which only a whole pipeline loads: the rest of it is left out
            others = dict.fromkeys({*checkpoint.weights} - {component})
            pipeline = getattr(diffusers, checkpoint.configs["model_index"]["_class_name"])
            model = getattr(pipeline.from_single_file(file, **others, **told), component).to(device)
    except (SingleFileComponentError, OSError, ValueError, TypeError, KeyError, RuntimeError) as error:
        raise CheckpointError(f"{file}: no {component} that suits {checkpoint.path} ({first_line(error)})") from error
    if missing := [name for name, parameter in model.named_parameters() if parameter.is_meta]:
        raise CheckpointError(f"{file} lacks {len(missing)} weights of {component}, the first is {missing[0]}")
    return model


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
    except (SafetensorError, OSError, ValueError, TypeError, KeyError, NotImplementedError, RuntimeError) as error:
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
