"""Every recipe against diffusers' own pipeline, run as the model's card says, on small checkpoints of its layout."""

import copy
import json
import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from submission.log import Log
from submission.model import pipeline
from submission.model.checkpoint import Checkpoint, inspect_recipe, plain
from submission.model.choice import in_folder
from submission.model.decoder import decode, full_decoder
from submission.model.generator import load_generator
from submission.model.image_spec import ImageSpec
from submission.model.recipe import Part, Recipe, Sampling, load_recipe, recipe_names
from submission.model.sampler import Draws, Sampler, draw, load_sampler, sample
from submission.plan.budget import start_budget
from submission.tasks import load_task
from tests.conftest import make_pipeline

CPU = torch.device("cpu")
PROMPTS = ["a photo of an apple", "crane", "a photo of a very long stingray under water"]
SEED, CLASSES, ROUNDS = 5, [0, 1, 2], [0, 3, 0]
UNET = "unet/diffusion_pytorch_model.safetensors"


@dataclass(frozen=True)
class Card:
    """What a model's card has people write: the pipeline's layout, the scheduler in place of its own, and the call."""

    layout: str
    scheduler: str
    settings: dict[str, Any] = field(default_factory=dict)
    timesteps: list[int] | None = None
    steps: int = 1
    more_steps: tuple[int, ...] = ()
    guidance: float = 0.0
    call: dict[str, Any] = field(default_factory=dict)


TRAILING = {"timestep_spacing": "trailing"}
CARDS = {
    "sdxl-turbo": Card("sdxl", "EulerAncestralDiscreteScheduler", TRAILING, more_steps=(2, 4)),
    "sd-turbo": Card("sd", "EulerDiscreteScheduler", TRAILING, more_steps=(2, 4)),
    "sdxl-lightning": Card("sdxl", "EulerDiscreteScheduler", {**TRAILING, "prediction_type": "sample"}),
    "hyper-sdxl": Card("sdxl", "LCMScheduler", timesteps=[800]),
    "dmd2-sdxl": Card("sdxl", "LCMScheduler", timesteps=[399]),
    "hyper-sd15": Card("sd", "TCDScheduler", call={"eta": 1.0}),
    "sd15": Card("sd", "DPMSolverMultistepScheduler", steps=10, more_steps=(4,), guidance=2.0),
    "sdxl-base": Card("sdxl", "DPMSolverMultistepScheduler", steps=10, more_steps=(4,), guidance=2.0),
}


def save_base(layout: str, folder: Path) -> None:
    """A checkpoint whose scheduler is that of a model of many steps, as a base has it."""
    base = make_pipeline(layout=layout)
    base.scheduler = diffusers.PNDMScheduler.from_config(
        base.scheduler.config, timestep_spacing="leading", steps_offset=1, skip_prk_steps=True
    )
    base.save_pretrained(folder)


def put_together(recipe: Recipe, folder: Path) -> dict[str, Tensor]:
    """Adds to a base what the recipe does, of random weights, and returns the weights that its UNet then has."""
    weights, random = load_file(folder / UNET), torch.Generator().manual_seed(1)
    if recipe.unet:
        weights = {name: one + torch.randn(one.shape, generator=random) / 8 for name, one in weights.items()}
        save = torch.save if recipe.unet.file.endswith(".bin") else save_file
        save(weights, folder / recipe.unet.file)
    if recipe.lora:
        lora: dict[str, Tensor] = {}
        for name in [name for name in weights if re.search(r"(to_[qkv]|to_out\.0|proj_in)\.weight$", name)]:
            change = add_to_lora(lora, f"unet.{name}", weights[name], random)
            weights[name] = weights[name] + change
        save_file(lora, folder / recipe.lora.file)
    return weights


def add_to_lora(lora: dict[str, Tensor], name: str, weight: Tensor, random: torch.Generator) -> Tensor:
    """Adds a layer to a LoRA in the form of kohya's trainer, and returns what it adds to the layer's weight."""
    rank, alpha, (outputs, inputs) = 2, 1.0, weight.shape
    down, up = torch.randn(rank, inputs, generator=random), torch.randn(outputs, rank, generator=random)
    stem = "lora_" + name.removesuffix(".weight").replace("text_encoder", "te_text_model").replace(".", "_")
    lora |= {f"{stem}.lora_down.weight": down, f"{stem}.lora_up.weight": up, f"{stem}.alpha": torch.tensor(alpha)}
    return alpha / rank * up @ down


def ours(checkpoint: Checkpoint) -> tuple[Tensor, Draws]:
    """Latents, and what chance decides of them, drawn anew."""
    sampler = load_sampler(checkpoint, 16, CPU, torch.float32)
    conditioning = pipeline.encode_prompts(checkpoint, PROMPTS, CPU, torch.float32)
    latents = sample(sampler, conditioning, torch.arange(3), draw(sampler, SEED, CLASSES, ROUNDS))
    return latents, draw(sampler, SEED, CLASSES, ROUNDS)


def theirs(pipe: Any, card: Card, steps: int, guidance: float, draws: Draws, output: str) -> Any:
    told = {"timesteps": card.timesteps} if card.timesteps else {"num_inference_steps": steps}
    draws = copy.deepcopy(draws)
    size = {"height": 16, "width": 16, "guidance_scale": guidance, "output_type": output}
    return pipe(PROMPTS, latents=draws.noise, generator=draws.generators or None, **size, **told, **card.call).images


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("guidance", [0.0, 2.0])
@pytest.mark.parametrize("name", CARDS)
def test_a_recipe_draws_what_its_card_says(name: str, guidance: float, tmp_path: Path) -> None:
    card, recipe = CARDS[name], load_recipe(name)
    assert (recipe.sampling.count, recipe.sampling.guidance) == (card.steps, (card.guidance, card.guidance))
    save_base(card.layout, tmp_path)
    unet = put_together(recipe, tmp_path)
    pipe = diffusers.DiffusionPipeline.from_pretrained(tmp_path)
    pipe.unet.load_state_dict(unet)
    pipe.scheduler = getattr(diffusers, card.scheduler).from_config(pipe.scheduler.config, **card.settings)
    pipe.set_progress_bar_config(disable=True)
    for steps in (card.steps, *card.more_steps):
        sampling = recipe.sampling.with_wishes(steps if steps != card.steps else None, (guidance, guidance))
        latents, draws = ours(inspect_recipe(replace(in_folder(recipe, tmp_path), sampling=sampling), "test"))
        expected = theirs(pipe, card, steps, guidance, draws, "latent")
        torch.testing.assert_close(latents, expected, atol=1e-3, rtol=1e-3)
        pixels, sound = decode(full_decoder(pipe.vae, 16), latents)
        pictures = torch.from_numpy(theirs(pipe, card, steps, guidance, draws, "np")).permute(0, 3, 1, 2)
        assert sound.all() and (pixels / 255 - pictures).abs().max() <= 0.5 / 255 + 1e-3


def test_every_recipe_is_held_to_its_card() -> None:
    assert set(CARDS) == set(recipe_names())


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("layout", ["sdxl", "sd"])
def test_a_negative_prompt_is_what_guidance_leads_away_from(layout: str, tmp_path: Path) -> None:
    save_base(layout, tmp_path)
    sampling = Sampling("EulerDiscreteScheduler", TRAILING, steps=2, guidance=(3.0, 3.0), negative="blurry")
    latents, draws = ours(inspect_recipe(plain(tmp_path, sampling), "test"))
    pipe = diffusers.DiffusionPipeline.from_pretrained(tmp_path)
    pipe.scheduler = diffusers.EulerDiscreteScheduler.from_config(pipe.scheduler.config, **TRAILING)
    card = Card(layout, "", call={"negative_prompt": ["blurry"] * 3})
    torch.testing.assert_close(latents, theirs(pipe, card, 2, 3.0, draws, "latent"), atol=1e-3, rtol=1e-3)
    without, _ = ours(inspect_recipe(plain(tmp_path, replace(sampling, negative=None)), "test"))
    assert (latents - without).abs().max() > 0.01


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_no_negative_prompt_is_one_of_zeros_where_nothing_is_said(tmp_path: Path) -> None:
    """As diffusers has it for SDXL."""
    save_base("sdxl", tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index.pop("force_zeros_for_empty_prompt")
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    sampling = Sampling("EulerDiscreteScheduler", TRAILING, steps=2, guidance=(3.0, 3.0))
    latents, draws = ours(inspect_recipe(plain(tmp_path, sampling), "test"))
    pipe = diffusers.DiffusionPipeline.from_pretrained(tmp_path)
    pipe.scheduler = diffusers.EulerDiscreteScheduler.from_config(pipe.scheduler.config, **TRAILING)
    torch.testing.assert_close(latents, theirs(pipe, Card("sdxl", ""), 2, 3.0, draws, "latent"), atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("by_root", [False, True])
@pytest.mark.parametrize("pattern", [{}, {"to_q": 8}])
def test_a_lora_has_the_alphas_that_diffusers_writes_beside_it(
    pattern: dict[str, int], by_root: bool, tmp_path: Path
) -> None:
    save_base("sd", tmp_path)
    weight, random = load_file(tmp_path / UNET), torch.Generator().manual_seed(1)
    name = next(name for name in weight if name.endswith("attn1.to_q.weight")).removesuffix(".weight")
    down, up = torch.randn(2, 16, generator=random), torch.randn(16, 2, generator=random)
    told = {"unet.r": 2, "unet.lora_alpha": 4, "unet.alpha_pattern": pattern, "unet.use_rslora": by_root}
    factors = {f"unet.{name}.lora_A.weight": down, f"unet.{name}.lora_B.weight": up}
    save_file(factors, tmp_path / "lora.safetensors", metadata={"lora_adapter_metadata": json.dumps(told)})
    recipe = replace(plain(tmp_path, Sampling(steps=1)), lora=Part(str(tmp_path / "lora.safetensors"), weight=0.5))
    unet = pipeline.load_unet(inspect_recipe(recipe, "test"), CPU, torch.float32)
    change = unet.get_submodule(name).weight - weight[f"{name}.weight"]
    torch.testing.assert_close(change, 0.5 * (pattern.get("to_q", 4) / (2**0.5 if by_root else 2)) * up @ down)


def test_a_lora_changes_text_encoders_too(tmp_path: Path) -> None:
    save_base("sd", tmp_path)
    file = tmp_path / "text_encoder/model.safetensors"
    weights, lora, random = load_file(file), dict[str, Tensor](), torch.Generator().manual_seed(1)
    unet = load_file(tmp_path / UNET)
    name = next(name for name in unet if name.endswith("attn1.to_q.weight"))
    add_to_lora(lora, f"unet.{name}", unet[name], random)
    for name in [name for name in weights if name.endswith("q_proj.weight")]:
        weights[name] += add_to_lora(lora, f"text_encoder.{name.removeprefix('text_model.')}", weights[name], random)
    save_file(lora, tmp_path / "lora.safetensors")
    recipe = plain(tmp_path, Sampling(steps=1))
    changed = inspect_recipe(replace(recipe, lora=Part(str(tmp_path / "lora.safetensors"))), "test")
    fused = pipeline.encode_prompts(changed, PROMPTS, CPU, torch.float32)
    save_file(weights, file, metadata={"format": "pt"})
    expected = pipeline.encode_prompts(inspect_recipe(recipe, "test"), PROMPTS, CPU, torch.float32)
    torch.testing.assert_close(fused.embeds, expected.embeds)


STEPPED = {
    "ancestral": Sampling("EulerAncestralDiscreteScheduler", TRAILING, steps=4),
    "lcm": Sampling("LCMScheduler", steps=4, guidance=(1.0, 3.0)),
    "tcd": Sampling("TCDScheduler", steps=4, eta=1.0),
}


@pytest.mark.parametrize("name", STEPPED)
def test_an_image_is_a_function_of_its_number_whatever_batch_it_is_in(
    name: str, checkpoint_folder: Path, task_file: Path
) -> None:
    checkpoint = inspect_recipe(plain(checkpoint_folder, STEPPED[name]), "test")
    image, log = ImageSpec(load_task(str(task_file)), seed=3), Log("kept", start_budget(60))
    generator = load_generator(image, checkpoint, CPU, log, dtype=torch.float32)
    together = generator.images(np.arange(12), log)
    batches = [generator.images(numbers, log) for numbers in np.split(np.arange(11, -1, -1), [1, 4, 9])]
    apart = torch.cat(batches).flip(0)
    assert (together.int() - apart.int()).abs().max() <= 1
    assert len({one.numpy().tobytes() for one in together}) == 12
    again = load_generator(replace(image, seed=4), checkpoint, CPU, log, dtype=torch.float32)
    assert not torch.equal(again.images(np.arange(12), log), together)


SCHEDULERS = {"EulerAncestralDiscrete": 4, "EulerDiscrete": 0, "LCM": 4, "TCD": 4, "DPMSolverMultistep": 0, "DDPM": 1}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_noise_is_drawn_where_steps_add_any(name: str, checkpoint_folder: Path) -> None:
    """None is drawn from elsewhere, which would be new each time; one step, as a rule, adds none, and draws none."""
    for steps in (1, 4):
        sampling = Sampling(f"{name}Scheduler", TRAILING, steps=steps)
        latents, draws = ours(inspect_recipe(plain(checkpoint_folder, sampling), "test"))
        assert bool(draws.generators) == (0 < SCHEDULERS[name] <= steps)
        assert torch.equal(latents, ours(inspect_recipe(plain(checkpoint_folder, sampling), "test"))[0])


def bare(side: int) -> Sampler:
    """What there is to draw for, without a UNet."""
    return Sampler(None, None, Sampling(), False, 0, side, None, torch.float32, CPU)


def test_guidance_is_drawn_from_its_range() -> None:
    sampler = replace(bare(2), sampling=Sampling(guidance=(1.0, 3.0)))
    drawn = draw(sampler, 0, list(range(100)), [1] * 100).guidance
    assert 1 <= drawn.min() < 1.2 and 2.8 < drawn.max() <= 3
    assert torch.equal(draw(sampler, 0, [7], [1]).guidance, drawn[7:8])


def test_noise_is_a_function_of_seed_class_and_round() -> None:
    together = draw(bare(4), 7, [0, 1, 0, 1], [0, 0, 5, 5]).noise
    for row, (label, round_) in enumerate([(0, 0), (1, 0), (0, 5), (1, 5)]):
        assert torch.equal(together[row : row + 1], draw(bare(4), 7, [label], [round_]).noise)
    assert not torch.equal(together, draw(bare(4), 8, [0, 1, 0, 1], [0, 0, 5, 5]).noise)
    assert len({image.numpy().tobytes() for image in together}) == 4
    many = draw(bare(16), 0, list(range(64)), [3] * 64).noise
    assert abs(many.mean()) < 0.02 and abs(many.std() - 1) < 0.02
