"""Prompts encoded as diffusers does, and networks loaded whole or not at all."""

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from safetensors.torch import load_file, save_file

from submission.errors import CheckpointError
from submission.model import pipeline
from submission.model.checkpoint import inspect, inspect_recipe, plain
from submission.model.recipe import Part, Sampling
from submission.model.sampler import draw, in_float32, load_sampler, sample
from tests.conftest import make_pipeline
from tests.single_file import join

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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_projections_looked_up_are_those_made_anew(folder: Path, dtype: torch.dtype) -> None:
    """Whatever prompts are asked for, in whatever order, and after a change to float32, too."""
    checkpoint = inspect(folder, "test")
    sampler = load_sampler(checkpoint, 16, CPU, dtype)
    conditioning = pipeline.encode_prompts(checkpoint, PROMPTS, CPU, dtype)
    prompts = torch.tensor([2, 0, 2, 1, 0])
    noise = draw(sampler, 3, [0] * 5, [0, 1, 2, 3, 4])
    expected = sample(sampler, conditioning, prompts, noise)
    weights = sum(p.numel() for p in sampler.unet.parameters())
    conditioning = pipeline.project_prompts(sampler.unet, conditioning)
    assert sum(p.numel() for p in sampler.unet.parameters()) < weights, "the projections' weights are let go"
    tables = [buffer.numel() for name, buffer in sampler.unet.named_buffers() if name.endswith(".table")]
    assert sum(tables) == len(PROMPTS) * checkpoint.projected_size
    torch.testing.assert_close(sample(sampler, conditioning, prompts, noise), expected, atol=1e-4, rtol=1e-4)
    sampler, conditioning = in_float32(sampler, conditioning)
    exact = sample(sampler, conditioning, prompts, noise)
    torch.testing.assert_close(exact, expected, atol=0.2, rtol=0.05)


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
            load_sampler(checkpoint, 16, CPU, torch.float32)
        elif component == "vae":
            pipeline.load_vae(checkpoint, CPU, torch.float32)
        else:
            pipeline.encode_prompts(checkpoint, PROMPTS, CPU, torch.float32)


def test_one_file_for_all_weights_in_the_authors_form(tmp_path: Path) -> None:
    """Its configurations and tokenizers come from a folder, which may lack weights."""
    make_pipeline(layout="sd").save_pretrained(tmp_path / "base")
    recipe = plain(tmp_path / "base", Sampling(steps=1))
    loaded = []
    for one in (recipe, replace(recipe, weights=tmp_path / "model.safetensors")):
        if one.weights:
            join(tmp_path / "base", one.weights)
            for file in (tmp_path / "base").rglob("*.safetensors"):
                file.unlink()
        checkpoint = inspect_recipe(one, "test")
        networks = [load(checkpoint, CPU, torch.float32) for load in (pipeline.load_unet, pipeline.load_vae)]
        embeds = pipeline.encode_prompts(checkpoint, PROMPTS, CPU, torch.float32).embeds
        loaded.append((embeds, *(network.state_dict() for network in networks)))
    (embeds, *networks), (embeds_of_one, *networks_of_one) = loaded
    assert torch.equal(embeds, embeds_of_one)
    for network, of_one in zip(networks, networks_of_one, strict=True):
        assert network.keys() == of_one.keys() and all(torch.equal(network[name], of_one[name]) for name in network)


def test_a_folder_of_what_differs_from_a_base(folder: Path, tmp_path: Path) -> None:
    another = make_pipeline()
    another.unet.conv_in.weight.data *= 2
    another.unet.save_pretrained(tmp_path / "unet")
    shutil.copytree(folder, tmp_path / "base")
    shutil.rmtree(tmp_path / "base/unet")
    recipe = replace(plain(tmp_path / "base", Sampling(steps=1)), weights=tmp_path)
    unet = pipeline.load_unet(inspect_recipe(recipe, "test"), CPU, torch.float32)
    assert torch.equal(unet.conv_in.weight, another.unet.conv_in.weight)


def test_a_scheduler_and_tokenizers_may_differ_too(folder: Path, tmp_path: Path) -> None:
    make_pipeline(prediction_type="v_prediction").scheduler.save_pretrained(tmp_path / "scheduler")
    tokenizer = make_pipeline().tokenizer
    tokenizer.model_max_length = 12
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    recipe = replace(plain(folder, Sampling(steps=1)), weights=tmp_path)
    found = inspect_recipe(recipe, "test")
    assert found.configs["scheduler"]["prediction_type"] == "v_prediction"
    assert pipeline.too_long(found, ["four words it is"]) and not pipeline.too_long(
        inspect(folder, "t"), ["four words it is"]
    )


@pytest.mark.parametrize("form", ["nested", "older"])
def test_a_unet_as_trainers_save_it(form: str, folder: Path, tmp_path: Path) -> None:
    """Beside what else they keep, or as torch saved it before 1.6."""
    weights = {name: weight + 1 for name, weight in make_pipeline().unet.state_dict().items()}
    content = {"state_dict": weights, "epoch": 3} if form == "nested" else weights
    torch.save(content, tmp_path / "unet.bin", _use_new_zipfile_serialization=form == "nested")
    recipe = replace(plain(folder, Sampling(steps=1)), unet=Part(str(tmp_path / "unet.bin")))
    unet = pipeline.load_unet(inspect_recipe(recipe, "test"), CPU, torch.float32)
    assert all(torch.equal(weight, weights[name]) for name, weight in unet.state_dict().items())


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
