"""The embedded checkpoint: diffusers loads it, it reads every prompt whole, its pictures look like their classes."""

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from submission.model.checkpoint import EMBEDDED
from submission.tasks import PromptStyle, Task, load_task
from tests.diffusers_pipeline import load_pipeline, networks_of, sample
from tests.paths import SHARED
from tools.training import arithmetic, layout

REAL = SHARED / "data"
STYLES: tuple[PromptStyle, ...] = ("label", "described", "diverse")


@pytest.fixture(scope="module")
def embedded() -> Any:
    return load_pipeline(EMBEDDED)


def tasks() -> list[Task]:
    return [load_task("cifar100"), load_task("tinyimagenet")]


def test_embedded_checkpoint_reads_every_prompt_whole(embedded: Any) -> None:
    prompts = [p for task in tasks() for style in STYLES for phrasing in task.prompts(style) for p in phrasing]
    for tokenizer in (embedded.tokenizer, embedded.tokenizer_2):
        lengths = [len(ids) for ids in tokenizer(prompts).input_ids]
        assert max(lengths) <= tokenizer.model_max_length <= embedded.text_encoder.config.max_position_embeddings


def test_embedded_tokenizer_takes_any_text(embedded: Any) -> None:
    for text in ("", "日本語 🎉 Zoë", "\x00\x7f", "a" * 1000, "naïve\tQUOTES\"'`"):
        ids = embedded.tokenizer(text, padding="max_length", truncation=True).input_ids
        assert len(ids) == embedded.tokenizer.model_max_length
        assert max(ids) < embedded.text_encoder.config.vocab_size


@pytest.mark.parametrize("task", tasks(), ids=lambda task: task.name)
def test_embedded_checkpoint_tells_classes_apart(embedded: Any, task: Task) -> None:
    networks = networks_of(embedded)
    for style in STYLES:
        for phrasing in task.prompts(style):
            with torch.no_grad():
                pooled = layout.encode(networks, layout.token_ids(networks, phrasing)).pooled
            distances = torch.cdist(pooled, pooled).fill_diagonal_(torch.inf)
            assert distances.min() > 1e-3 * pooled.norm(dim=1).mean()


@pytest.mark.parametrize("size", [32, 64])
def test_embedded_checkpoint_samples(embedded: Any, size: int) -> None:
    noise = torch.randn(4, 4, size // 4, size // 4, generator=torch.Generator().manual_seed(0))
    images = sample(embedded, ["a photo of an apple"] * 4, size, noise)
    assert images.shape == (4, 3, size, size)
    assert images.isfinite().all()
    assert (images.std(dim=(1, 2, 3)) > 0.02).all(), "constant images"
    assert (images[1:] - images[:1]).abs().mean() > 0.02, "the same image whatever the noise"


def test_training_samples_as_diffusers_does(embedded: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arithmetic, "compute_dtype", lambda device: torch.float32)  # as the pipeline computes
    networks = networks_of(embedded)
    prompts = ["a photo of an apple", "wolf"]
    noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        ours = layout.one_step_latents(networks, noise, layout.encode(networks, layout.token_ids(networks, prompts)))
    torch.testing.assert_close(ours, sample(embedded, prompts, 32, noise, "latent"), atol=1e-4, rtol=1e-4)


@pytest.mark.skipif(not REAL.exists(), reason="needs the real images in ../shared/data")
def test_embedded_images_look_like_their_classes(embedded: Any) -> None:
    """The mean picture of a class made here is nearest to the real one's mean far more often than chance, 0.01."""
    networks, task, each = networks_of(embedded), load_task("cifar100"), 8
    real = []
    for path in sorted((REAL / "cifar100" / "test_dev").glob("*.webp")):
        grid = torch.from_numpy(np.asarray(Image.open(path).convert("RGB")).copy()).float() / 255
        tiles = grid.unfold(0, 32, 32).unfold(1, 32, 32).flatten(0, 1)
        real.append(tiles.mean(dim=0).flatten())
    with torch.inference_mode():
        conditioning = layout.encode(networks, layout.token_ids(networks, task.prompts("described")[0]))
        wanted = layout.Conditioning(*(part.repeat_interleave(each, dim=0) for part in conditioning))
        noise = torch.randn(100 * each, 4, 8, 8, generator=torch.Generator().manual_seed(2))
        latents = layout.one_step_latents(networks, noise, wanted)
        made = embedded.vae.decode(latents / layout.LATENT_SCALE).sample / 2 + 0.5
    nearest = torch.cdist(made.view(100, each, -1).mean(dim=1), torch.stack(real)).argmin(dim=1)
    assert (nearest == torch.arange(100)).float().mean() > 0.05
