"""The networks of a checkpoint that is trained here: SDXL-Turbo's layout, small enough to sample fast on two CPU cores.

Every component is the class SDXL-Turbo names in its `model_index.json`, with the same wiring (conditioning by the last
but one hidden state of both text encoders, pooled embedding and time ids of the second); only the widths differ, the
VAE shrinks images by 4 instead of 8, and the UNet is trained to predict v (see `one_step_latents`).
"""

import copy
import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from diffusers import AutoencoderKL, EulerAncestralDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from submission.model.checkpoint import EMBEDDED
from tools.training.arithmetic import computing

BEGIN, END = "<|startoftext|>", "<|endoftext|>"
WORD_END = "</w>"
PRIVATE_USE = 0xE000  # the first of 6,400 characters that mean nothing (Unicode)

VOCABULARY = 2048  # 512 for bytes inside and at the end of words, 2 for begin and end, the rest merges
MAX_TOKENS = 48  # the longest prompt of the built-in tasks has 44 tokens; every one more costs cross-attention
TEXT_WIDTHS = (64, 64)
POOLED_WIDTH = 128
# Channels of the UNet at full and at half the latents' width, for each `--size`: 3.8 and 6.2 million weights.
UNET_WIDTHS = {"small": (96, 96), "base": (64, 160)}
TIME_ID_WIDTH = 16

CANVASES = (32, 64, 96, 128)  # pixels of the side of the pictures that can be made
LATENT_CHANNELS = 4
LATENT_SHRINK = 4  # pixels a latent is wide: two halvings in a VAE of three blocks
LATENT_SCALE = 0.13025  # SDXL's scaling_factor: 1 / std of its raw latents; ours are normalised to have the same

# The components that have weights.
TRAINED = ("text_encoder", "text_encoder_2", "unet", "vae")


def canvas_for(size: int) -> int:
    """The pixels of the side of the canvas on which images of `size` pixels are made, the largest where none suits."""
    return next((canvas for canvas in CANVASES if canvas >= size), CANVASES[-1])


def latent_shape(canvas: int) -> tuple[int, int, int]:
    """Channels, height and width of a canvas's latents."""
    return LATENT_CHANNELS, canvas // LATENT_SHRINK, canvas // LATENT_SHRINK


@dataclass(frozen=True)
class Networks:
    """The components of one checkpoint."""

    tokenizer: Any
    text_encoder: Any
    text_encoder_2: Any
    unet: Any
    vae: Any
    scheduler: Any


class Conditioning(NamedTuple):
    """What the UNet is told of a batch of prompts, as SDXL computes it."""

    tokens: Tensor  # [B, MAX_TOKENS, sum(TEXT_WIDTHS)]
    pooled: Tensor  # [B, POOLED_WIDTH]

    def of(self, rows: Tensor) -> "Conditioning":
        """Of the prompts numbered `rows`, int64 `[N]`."""
        return Conditioning(self.tokens[rows], self.pooled[rows])


def build_tokenizer(prompts: Sequence[str], vocabulary: int = VOCABULARY) -> Any:
    """A CLIP tokenizer whose byte-pair merges are learnt from `prompts`; any text tokenises, byte by byte at worst.

    CLIP's order of ids: the 256 bytes, the 256 bytes at the end of a word, the merges, begin, end.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    symbols = [*alphabet, *(byte + WORD_END for byte in alphabet)]
    # The library's trainer numbers what ends a word as it comes, by hash, and breaks ties by that number: another
    # tokenizer in every process. So it gets one character for each of the symbols.
    characters = {symbol: chr(PRIVATE_USE + i) for i, symbol in enumerate(symbols)}
    clip = CLIPTokenizer().backend_tokenizer  # for CLIP's own cleaning and word splitting
    words = [
        "".join(characters[byte] for byte in word[:-1]) + characters[word[-1] + WORD_END]
        for prompt in prompts
        for word, _ in clip.pre_tokenizer.pre_tokenize_str(clip.normalizer.normalize_str(prompt))
    ]
    learner = Tokenizer(models.BPE())
    learner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    learner.train_from_iterator(words, trainers.BpeTrainer(vocab_size=vocabulary, show_progress=False))
    back = str.maketrans({character: symbol for symbol, character in characters.items()})
    learnt = [
        (left.translate(back), right.translate(back)) for left, right in json.loads(learner.to_str())["model"]["merges"]
    ]
    ids = {symbol: i for i, symbol in enumerate(symbols)}
    merges = learnt[: vocabulary - len(ids) - 2]
    for left, right in merges:
        ids.setdefault(left + right, len(ids))
    for special in (BEGIN, END):
        ids[special] = len(ids)
    return CLIPTokenizer(vocab=ids, merges=merges, model_max_length=MAX_TOKENS)


def build_networks(prompts: Sequence[str], size: str, canvas: int) -> Networks:
    """Networks in float32, with a tokenizer learnt from `prompts`. What fits begins as the embedded checkpoint's: the
    VAE, a UNet of its size, text encoders of its words; all else untrained, with weights from torch's global generator.
    `canvas` is what the checkpoint draws on unless told."""
    widths = UNET_WIDTHS[size]
    tokenizer = build_tokenizer(prompts)
    text_encoder, text_encoder_2 = (
        kind(_text_config(tokenizer, width, activation)).eval()
        for kind, width, activation in (
            (CLIPTextModel, TEXT_WIDTHS[0], "quick_gelu"),
            (CLIPTextModelWithProjection, TEXT_WIDTHS[1], "gelu"),
        )
    )
    unet = UNet2DConditionModel(
        sample_size=canvas // LATENT_SHRINK,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        block_out_channels=widths,
        # Attention at the coarser scale alone: the class is told by the pooled embedding for the most part.
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        mid_block_type="UNetMidBlock2DCrossAttn",
        layers_per_block=1,
        transformer_layers_per_block=1,
        attention_head_dim=tuple(width // 32 for width in widths),  # diffusers' name for the number of heads
        cross_attention_dim=sum(TEXT_WIDTHS),
        use_linear_projection=True,
        # Over all channels: groups of a few, in maps as small as 4x4, would normalise away what they are to carry.
        norm_num_groups=1,
        # The class reaches every block as a scale and a shift of each channel; a shift alone learns more slowly.
        resnet_time_scale_shift="scale_shift",
        addition_embed_type="text_time",
        addition_time_embed_dim=TIME_ID_WIDTH,
        projection_class_embeddings_input_dim=6 * TIME_ID_WIDTH + POOLED_WIDTH,
    ).eval()
    # What it learnt of photographs holds for others, on canvases of all sizes, for it has no attention. On two cores,
    # one that began from nothing came to 19 dB in 150 seconds, beside other work; this one came to 27 in 83.
    # Not by `from_pretrained`, which writes the folder that it read into every checkpoint.
    vae = AutoencoderKL.from_config(AutoencoderKL.load_config(EMBEDDED / "vae")).eval()
    vae.load_state_dict(_embedded_weights("vae"))
    # After 100 steps of 256 images of CIFAR-100, one that began so came to an error of 0.75, from nothing to 0.85.
    if unet.config.block_out_channels == tuple(unet.load_config(EMBEDDED / "unet")["block_out_channels"]):
        unet.load_state_dict(_embedded_weights("unet"))
    if CLIPTokenizer.from_pretrained(EMBEDDED / "tokenizer").get_vocab() == tokenizer.get_vocab():
        text_encoder.load_state_dict(_embedded_weights("text_encoder"))
        text_encoder_2.load_state_dict(_embedded_weights("text_encoder_2"))
    scheduler = EulerAncestralDiscreteScheduler(
        num_train_timesteps=1000,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        steps_offset=1,
        timestep_spacing="trailing",
        # At t=999 an epsilon prediction would magnify every error of the UNet by sigma, 14.6.
        prediction_type="v_prediction",
    )
    return Networks(tokenizer, text_encoder, text_encoder_2, unet, vae, scheduler)


def _embedded_weights(component: str) -> dict[str, Tensor]:
    (file,) = (EMBEDDED / component).glob("*.safetensors")
    weights: dict[str, Tensor] = load_file(file)
    return weights


def _text_config(tokenizer: Any, width: int, activation: str) -> Any:
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=4 * width,
        projection_dim=POOLED_WIDTH,
        num_hidden_layers=2,
        num_attention_heads=width // 32,
        max_position_embeddings=MAX_TOKENS,
        hidden_act=activation,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def token_ids(networks: Networks, prompts: Sequence[str]) -> Tensor:
    """int64 `[B, MAX_TOKENS]`: the prompts between begin and end, padded, cut where too long."""
    encoded = networks.tokenizer(
        list(prompts), padding="max_length", max_length=MAX_TOKENS, truncation=True, return_tensors="pt"
    )
    ids: Tensor = encoded.input_ids
    return ids


def encode(networks: Networks, ids: Tensor) -> Conditioning:
    """Conditioning of token ids `[B, MAX_TOKENS]`, with gradients to both text encoders."""
    first = networks.text_encoder(ids, output_hidden_states=True)
    second = networks.text_encoder_2(ids, output_hidden_states=True)
    return Conditioning(torch.cat([first.hidden_states[-2], second.hidden_states[-2]], dim=-1), second.text_embeds)


def predict_v(unet: Any, noisy: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
    """v, as the UNet sees it in latents with noise in them, `[B, 4, h, w]` of variance 1, at timesteps `[B]`; float32.

    The canvas it is told of is that of the latents.
    """
    size = torch.full((len(noisy), 2), float(noisy.shape[-1] * LATENT_SHRINK), device=noisy.device)
    with computing(noisy.device):
        v: Tensor = unet(
            noisy,
            timesteps,
            encoder_hidden_states=conditioning.tokens,
            added_cond_kwargs={
                "text_embeds": conditioning.pooled,
                "time_ids": torch.cat([size, torch.zeros_like(size), size], dim=1),
            },
        ).sample
    return v.float()


def one_step_latents(networks: Networks, noise: Tensor, conditioning: Conditioning) -> Tensor:
    """Latents `[B, 4, h, w]` of unit scale from standard normal noise of that shape, in one UNet pass.

    The single step of `StableDiffusionXLPipeline(num_inference_steps=1, guidance_scale=0)`: the scheduler starts from
    x = sigma n, hands the UNet x / sqrt(sigma^2 + 1), and takes x0 = x / (sigma^2 + 1) - v sigma / sqrt(sigma^2 + 1)
    (Salimans & Ho 2022, progressive distillation, in the scheduler's variance-exploding form).
    """
    final = networks.scheduler.alphas_cumprod[-1].item()
    sigma = ((1 - final) / final) ** 0.5
    x = noise * sigma
    last = torch.full((len(noise),), networks.scheduler.config.num_train_timesteps - 1, device=noise.device)
    v = predict_v(networks.unet, x / (sigma**2 + 1) ** 0.5, last, conditioning)
    latents: Tensor = x / (sigma**2 + 1) - v * sigma / (sigma**2 + 1) ** 0.5
    return latents


def save_networks(networks: Networks, folder: Path) -> None:
    """Write the checkpoint as `StableDiffusionXLPipeline.save_pretrained(variant="fp16")` does, weights in fp16.

    The networks themselves stay as they are. fp16 is not diffusers' doing: it only names the files so.
    """
    half = {name: copy.deepcopy(getattr(networks, name)).half() for name in TRAINED}
    StableDiffusionXLPipeline(
        tokenizer=networks.tokenizer,
        tokenizer_2=networks.tokenizer,
        scheduler=networks.scheduler,
        add_watermarker=False,
        **half,
    ).save_pretrained(folder, variant="fp16")
    for weights in folder.rglob("*.safetensors"):
        share(weights)


def share(weights: Path) -> None:
    """Let those read weights who may read the `config.json` beside them: safetensors' files are their owner's alone."""
    shutil.copymode(weights.with_name("config.json"), weights)
