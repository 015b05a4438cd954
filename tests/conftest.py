"""Real checkpoints of the SDXL layout with a few random weights, and a task small enough to run in seconds."""

import os
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    EulerAncestralDiscreteScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

# Networks this small gain nothing from a second thread, and waiting for one on a busy machine costs a lot.
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"  # and so for the processes that tests start

TINY_TASK = """
name = "tiny"
title = "Tiny"
size = 16
mean = [0.5, 0.4, 0.3]
std = [0.2, 0.25, 0.3]
max_ipc = 12
classes = [
  { index = 0, name = "apple", described = "a photo of an apple" },
  { index = 1, name = "pear", described = "a photo of a pear" },
  { index = 2, name = "plum", described = "a photo of a plum" },
]
"""


def make_tokenizer() -> CLIPTokenizer:
    """A CLIP tokenizer of single characters: no merges, so that it needs no training."""
    characters = [chr(c) for c in range(33, 127)]
    words = [*characters, *(c + "</w>" for c in characters), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={word: i for i, word in enumerate(words)}, merges=[], model_max_length=24)


def make_pipeline(prediction_type: str = "epsilon", layout: str = "sdxl") -> Any:
    """A pipeline of diffusers, `sdxl` or `sd`, with two or one text encoders and a few random weights."""
    torch.manual_seed(0)
    tokenizer = make_tokenizer()
    text = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=24,
        projection_dim=24,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    told_sizes = {
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 4,
        "projection_class_embeddings_input_dim": 24 + 6 * 4,
    }
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=32 if layout == "sdxl" else 16,
        attention_head_dim=(1, 2),
        norm_num_groups=4,
        use_linear_projection=True,
        **(told_sizes if layout == "sdxl" else {}),
    )
    vae = AutoencoderKL(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
        scaling_factor=0.5 if layout == "sdxl" else 0.18215,
        force_upcast=True,
    )
    scheduler = EulerAncestralDiscreteScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        timestep_spacing="trailing",
        steps_offset=1,
        prediction_type=prediction_type,
    )
    encoder = CLIPTextModel(text)
    if layout == "sd":
        return StableDiffusionPipeline(
            vae, encoder, tokenizer, unet, scheduler, None, None, requires_safety_checker=False
        )
    second = CLIPTextModelWithProjection(text)
    return StableDiffusionXLPipeline(vae, encoder, second, tokenizer, make_tokenizer(), unet, scheduler)


# Its deadline for an example is an absolute time, which a busy machine misses.
hypothesis.settings.register_profile("banko", deadline=None)
hypothesis.settings.load_profile("banko")


@pytest.fixture(autouse=True)
def _no_job_ends_the_tests(monkeypatch: pytest.MonkeyPatch) -> None:
    # A job past its deadline ends its process at once. Where that is pytest's own, it must not look like success.
    end = os._exit
    monkeypatch.setattr(os, "_exit", lambda code: end(1))


@pytest.fixture(scope="session")
def checkpoint_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint as a user of diffusers would save it, in fp16. Shared by all tests: not to be written to."""
    folder = tmp_path_factory.mktemp("checkpoint")
    make_pipeline().to(torch.float16).save_pretrained(folder, variant="fp16")
    return folder


@pytest.fixture
def task_file(tmp_path: Path) -> Path:
    file = tmp_path / "tiny.toml"
    file.write_text(TINY_TASK)
    return file
