"""The one-step sampler against diffusers' own pipeline, and its independence of batches."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from safetensors.torch import load_file, save_file

from submission.errors import CheckpointError
from submission.model import pipeline
from submission.model.checkpoint import inspect
from submission.model.decoder import decode, full_decoder
from tests.conftest import make_pipeline

CPU = torch.device("cpu")
PROMPTS = ["a photo of an apple", "crane", "a photo of a very long stingray under water"]


@pytest.fixture(scope="module", params=["epsilon", "v_prediction"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    path = tmp_path_factory.mktemp(request.param)
    make_pipeline(request.param).save_pretrained(path)
    yield path


def reference(folder: Path) -> StableDiffusionXLPipeline:
    return StableDiffusionXLPipeline.from_pretrained(folder)


def test_prompts_are_encoded_as_diffusers_does(folder: Path) -> None:
    ours = pipeline.encode_prompts(inspect(folder, "test"), PROMPTS, CPU, torch.float32)
    with torch.no_grad():
        embeds, _, pooled, _ = reference(folder).encode_prompt(PROMPTS, do_classifier_free_guidance=False)
    torch.testing.assert_close(ours.embeds, embeds)
    torch.testing.assert_close(ours.pooled, pooled)


def test_one_step_and_decoding_are_diffusers_own(folder: Path) -> None:
    """Same noise in, same latents and images out as StableDiffusionXLPipeline with one step and no guidance."""
    checkpoint, theirs = inspect(folder, "test"), reference(folder)
    sampler = pipeline.load_sampler(checkpoint, 16, CPU, torch.float32)
    conditioning = pipeline.encode_prompts(checkpoint, PROMPTS, CPU, torch.float32)
    noise = pipeline.draw_noise(3, [0, 1, 2], [0, 0, 0], sampler.side)
    latents = pipeline.sample(sampler, conditioning, torch.arange(3), noise)
    call = {"num_inference_steps": 1, "guidance_scale": 0.0, "height": 16, "width": 16, "latents": noise}
    expected = theirs(PROMPTS, output_type="latent", **call).images
    torch.testing.assert_close(latents, expected, atol=1e-3, rtol=1e-4)
    pixels, sound = decode(full_decoder(theirs.vae, 16), latents)
    expected_pixels = torch.from_numpy(theirs(PROMPTS, output_type="np", **call).images).permute(0, 3, 1, 2)
    assert sound.all()
    assert (pixels / 255 - expected_pixels).abs().max() <= 0.5 / 255 + 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_projections_looked_up_are_those_made_anew(folder: Path, dtype: torch.dtype) -> None:
    """Whatever prompts are asked for, in whatever order, and after a change to float32, too."""
    checkpoint = inspect(folder, "test")
    sampler = pipeline.load_sampler(checkpoint, 16, CPU, dtype)
    conditioning = pipeline.encode_prompts(checkpoint, PROMPTS, CPU, dtype)
    prompts = torch.tensor([2, 0, 2, 1, 0])
    noise = pipeline.draw_noise(3, [0] * 5, [0, 1, 2, 3, 4], sampler.side)
    expected = pipeline.sample(sampler, conditioning, prompts, noise)
    weights = sum(p.numel() for p in sampler.unet.parameters())
    conditioning = pipeline.project_prompts(sampler.unet, conditioning)
    assert sum(p.numel() for p in sampler.unet.parameters()) < weights, "the projections' weights are let go"
    tables = [buffer.numel() for name, buffer in sampler.unet.named_buffers() if name.endswith(".table")]
    assert sum(tables) == len(PROMPTS) * checkpoint.projected_size
    torch.testing.assert_close(pipeline.sample(sampler, conditioning, prompts, noise), expected, atol=1e-4, rtol=1e-4)
    sampler, conditioning = pipeline.in_float32(sampler, conditioning)
    exact = pipeline.sample(sampler, conditioning, prompts, noise)
    torch.testing.assert_close(exact, expected, atol=0.2, rtol=0.05)


def test_noise_is_a_function_of_seed_class_and_round() -> None:
    together = pipeline.draw_noise(7, [0, 1, 0, 1], [0, 0, 5, 5], 4)
    for row, (label, round_) in enumerate([(0, 0), (1, 0), (0, 5), (1, 5)]):
        assert torch.equal(together[row : row + 1], pipeline.draw_noise(7, [label], [round_], 4))
    assert not torch.equal(together, pipeline.draw_noise(8, [0, 1, 0, 1], [0, 0, 5, 5], 4))
    assert len({image.numpy().tobytes() for image in together}) == 4
    many = pipeline.draw_noise(0, list(range(64)), [3] * 64, 16)
    assert abs(many.mean()) < 0.02 and abs(many.std() - 1) < 0.02


def test_the_precision_on_a_cpu_is_the_faster_one(monkeypatch: pytest.MonkeyPatch) -> None:
    assert pipeline.choose_dtype(torch.device("cuda")) == torch.float16
    for factor, expected in [(0.1, torch.bfloat16), (0.9, torch.float32), (50.0, torch.float32)]:
        times = iter([[1.0, 3.0], [factor, 60.0]])
        monkeypatch.setattr("timeit.repeat", lambda *_, times=times, **__: next(times))
        assert pipeline.choose_dtype(CPU) == expected


@pytest.mark.parametrize("component", ["unet", "vae", "text_encoder"])
def test_weights_that_do_not_match_the_configuration_are_refused(folder: Path, tmp_path: Path, component: str) -> None:
    """The libraries would fill what is missing with random numbers."""
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    file = next((copy / component).glob("*.safetensors"))
    weights = load_file(file)
    weights.pop(sorted(weights)[0])
    save_file(weights, file, metadata={"format": "pt"})
    checkpoint = inspect(copy, "test")
    with pytest.raises(CheckpointError, match=component):
        if component == "unet":
            pipeline.load_sampler(checkpoint, 16, CPU, torch.float32)
        elif component == "vae":
            pipeline.load_vae(checkpoint, CPU, torch.float32)
        else:
            pipeline.encode_prompts(checkpoint, PROMPTS, CPU, torch.float32)


def test_both_forms_of_vocabulary_are_read_alike(folder: Path, tmp_path: Path) -> None:
    """SDXL-Turbo has vocab.json and merges.txt, newer libraries save tokenizer.json."""
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    before = pipeline.encode_prompts(inspect(copy, "test"), PROMPTS, CPU, torch.float32)
    for part in (copy / "tokenizer", copy / "tokenizer_2"):
        vocabulary = json.loads((part / "tokenizer.json").read_text())["model"]["vocab"]
        (part / "tokenizer.json").unlink()
        with pytest.raises(CheckpointError, match=r"vocab\.json is missing"):
            inspect(copy, "test")
        (part / "vocab.json").write_text(json.dumps(vocabulary))
        (part / "merges.txt").write_text("#version: 0.2\n")
    after = pipeline.encode_prompts(inspect(copy, "test"), PROMPTS, CPU, torch.float32)
    assert torch.equal(before.embeds, after.embeds)
