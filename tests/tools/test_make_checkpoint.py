"""Random checkpoints of SDXL-Turbo's layout: diffusers and the job read them; full size means its bytes."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionXLPipeline

from submission.model import checkpoint
from submission.model.recipe import load_recipe
from tests.paths import ROOT, SHARED
from tools import make_checkpoint

FACTS = SHARED / "reference" / "sdxl-turbo.json"


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made") / "small"
    assert make_checkpoint.main([str(folder), "--size", "small"]) == 0
    return folder


def test_diffusers_makes_pictures_with_it(small: Path) -> None:
    pipeline = StableDiffusionXLPipeline.from_pretrained(small, variant="fp16", dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    prompts = ["a photo of an apple", "a photo of a bus"]
    pictures = pipeline(
        prompts, num_inference_steps=1, guidance_scale=0.0, height=64, width=64, output_type="np"
    ).images
    assert pictures.shape == (2, 64, 64, 3)
    assert np.isfinite(pictures).all()
    assert pictures.std(axis=(1, 2, 3)).min() > 0.01
    assert np.abs(pictures[0] - pictures[1]).max() > 0.01


def test_the_job_takes_it_for_what_it_is(small: Path) -> None:
    found = checkpoint.inspect(small, "test")
    assert {one.variant for one in found.weights.values()} == {"fp16"}
    assert (found.vae_factor, found.resolutions) == (8, (512,))
    assert len({file.stat().st_mode for file in (small / "unet").iterdir()}) == 1, "some may be read by few"


def test_a_seed_gives_the_same_weights_again(small: Path, tmp_path: Path) -> None:
    digests = []
    for seed in ("0", "1"):
        assert make_checkpoint.main([str(tmp_path / seed), "--size", "small", "--seed", seed]) == 0
        file = tmp_path / seed / "unet" / "diffusion_pytorch_model.fp16.safetensors"
        digests.append(hashlib.sha256(file.read_bytes()).hexdigest())
    first = hashlib.sha256((small / "unet" / "diffusion_pytorch_model.fp16.safetensors").read_bytes()).hexdigest()
    assert digests[0] == first != digests[1]


@pytest.mark.skipif(not FACTS.exists(), reason="needs SDXL-Turbo's configurations in ../shared/reference")
def test_full_size_is_sdxl_turbo_s() -> None:
    facts = json.loads(FACTS.read_text())
    folder = ROOT / "tools" / make_checkpoint.CONFIGS["sdxl"]
    for file in folder.rglob("*.json"):
        assert json.loads(file.read_text()) == facts[str(file.relative_to(folder))], file
    for file_name, fact in facts["_weights_fp16"].items():
        component = Path(file_name).parts[0]
        network = make_checkpoint.on_paper(component, facts[f"{component}/config.json"])
        size = make_checkpoint.BYTES_PER_WEIGHT * sum(p.numel() for p in network.state_dict().values())
        assert 0 < fact["bytes"] - size < 1e6, file_name  # what is left over is the file's header
        assert load_recipe("sdxl-turbo").sha256[file_name] == fact["sha256"]
