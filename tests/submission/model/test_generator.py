"""What the generator does with a decoder that overflows, as SDXL's does in half precision."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from submission.errors import CheckpointError
from submission.log import Log
from submission.model.checkpoint import inspect, inspect_recipe, plain
from submission.model.decoder import Decoder
from submission.model.generator import Generator, load_generator
from submission.model.image_spec import ImageSpec
from submission.model.recipe import Sampling
from submission.model.sampler import in_float32
from submission.plan.budget import start_budget
from submission.tasks import load_task


@pytest.fixture
def log() -> Log:
    return Log("plain", start_budget(60))


@pytest.fixture
def generator(checkpoint_folder: Path, task_file: Path, log: Log) -> Generator:
    task, checkpoint = load_task(str(task_file)), inspect(checkpoint_folder, "test")
    return load_generator(ImageSpec(task), checkpoint, torch.device("cpu"), log)


def test_an_overflowing_decoder_is_replaced_by_a_more_precise_one_and_said(generator: Generator, log: Log) -> None:
    """Activations beyond fp16's 65,504, which the next normalisation would have brought back."""
    generator.vae.decoder.conv_in.weight.data *= 3e4
    expected = generator.images(np.arange(0, 6), log)
    assert log.warnings == []
    generator.vae.half()
    images = generator.images(np.arange(0, 6), log)
    assert "broken images" in log.warnings[0] and generator.vae.dtype == torch.float32
    assert generator.regenerated == 6
    assert (images.int() - expected.int()).abs().float().mean() < 2, "fp16 has rounded the weights, no more"


def test_an_overflowing_unet_is_replaced_by_a_more_precise_one_and_counted(generator: Generator, log: Log) -> None:
    """Activations beyond fp16's 65,504, which the next normalisation would have brought back."""
    generator.sampler, generator.conditioning = in_float32(generator.sampler, generator.conditioning)
    generator.sampler.unet.conv_in.weight.data *= 1e5
    expected = generator.images(np.arange(0, 6), log)
    assert log.warnings == [] and generator.regenerated == 0
    half = torch.float16
    generator.sampler = replace(
        generator.sampler,
        unet=generator.sampler.unet.half(),
        time_ids=torch.tensor([16, 16, 0, 0, 16, 16], dtype=half),
        dtype=half,
    )
    assert generator.conditioning.pooled is not None
    generator.conditioning = replace(generator.conditioning, pooled=generator.conditioning.pooled.half())
    images = generator.images(np.arange(0, 6), log)
    assert "broken images from the UNet in float16" in log.warnings[0] and generator.regenerated == 6
    assert (images.int() - expected.int()).abs().float().mean() < 2


def test_where_a_cheap_decoder_breaks_the_vae_takes_over_and_it_is_said(generator: Generator, log: Log) -> None:
    expected = generator.images(np.arange(0, 3), log)
    generator.decoder = Decoder("distilled", 16, lambda latents: latents.new_zeros(len(latents), 3, 16, 16), {})
    assert torch.equal(generator.images(np.arange(0, 3), log), expected)
    assert "the decoder distilled: the VAE decodes from now on" in log.warnings[0] and generator.regenerated == 3


def test_images_broken_in_full_precision_are_an_error(generator: Generator, log: Log) -> None:
    generator.vae.decoder.conv_out.weight.data.fill_(torch.nan)
    with pytest.raises(CheckpointError, match="broken images at 16 px"):
        generator.images(np.arange(0, 3), log)


def test_a_prompt_longer_than_the_model_reads_is_said(checkpoint_folder: Path, task_file: Path, log: Log) -> None:
    task_file.write_text(task_file.read_text().replace("a photo of a plum", "a photo of a plum, dark blue, on a plate"))
    task, checkpoint = load_task(str(task_file)), inspect(checkpoint_folder, "test")
    load_generator(ImageSpec(task), checkpoint, torch.device("cpu"), log)
    assert len(log.warnings) == 1 and "1 of 3 prompts" in log.warnings[0] and "on a plate" in log.warnings[0]


def test_any_range_of_images_is_a_part_of_the_whole(generator: Generator, log: Log) -> None:
    whole = generator.images(np.arange(0, 12), log)
    for start, stop in [(0, 1), (2, 5), (5, 12)]:
        part = generator.images(np.arange(start, stop), log)
        assert (part.int() - whole[start:stop].int()).abs().max() <= 1


@pytest.mark.parametrize("guidance", [0.0, 2.0])
def test_prompts_that_wait_make_the_images_of_those_encoded_at_once(
    checkpoint_folder: Path, task_file: Path, log: Log, guidance: float
) -> None:
    """Whatever is asked for first; with the last prompt the encoders are let go."""
    task = load_task(str(task_file))
    own = {c.name: tuple(f"a {style} of {c.name}" for style in ("photo", "sketch", "stamp")) for c in task.classes}
    image = ImageSpec(replace(task, own_prompts=own), prompts="own")
    checkpoint = inspect_recipe(plain(checkpoint_folder, Sampling(steps=1, guidance=(guidance, guidance))), "test")
    at_once, later = (
        load_generator(image, checkpoint, torch.device("cpu"), log, project_prompts=projected)
        for projected in (True, False)
    )
    expected = at_once.images(np.arange(18), log)
    for numbers, encoded in ([7, 2], 2), (range(2, 6), 5), (range(18), 9):
        images = later.images(np.array(numbers), log)
        assert (images.int() - expected[list(numbers)].int()).abs().max() <= 1
        assert later.conditioning.embeds[:9].flatten(1).any(1).sum() == encoded, "no more than were asked for"
    assert later.waiting is None and at_once.waiting is None
