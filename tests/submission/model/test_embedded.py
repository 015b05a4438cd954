"""The embedded checkpoint: diffusers loads it, it reads every prompt whole, its pictures look like their classes."""

import io
import zipfile
from pathlib import Path
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


@pytest.mark.parametrize("size", [32, 64])
def test_training_samples_as_diffusers_does(embedded: Any, monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    monkeypatch.setattr(arithmetic, "compute_dtype", lambda device: torch.float32)  # as the pipeline computes
    networks = networks_of(embedded)
    prompts = ["a photo of an apple", "wolf"]
    noise = torch.randn(2, *layout.latent_shape(size), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        ours = layout.one_step_latents(networks, noise, layout.encode(networks, layout.token_ids(networks, prompts)))
    torch.testing.assert_close(ours, sample(embedded, prompts, size, noise, "latent"), atol=1e-4, rtol=1e-4)


def real_means(task: Task) -> torch.Tensor:
    """The mean picture of each class's test images, in 0..1, `[classes, 3, size, size]`."""
    if task.name == "cifar100":
        grids = [pixels_of(path) for path in sorted((REAL / "cifar100" / "test_dev").glob("*.webp"))]
        return torch.stack([grid.unfold(0, 32, 32).unfold(1, 32, 32).flatten(0, 1).mean(dim=0) for grid in grids])
    sums = torch.zeros(200, 3, 64, 64)
    index = {one.wnid: one.index for one in task.classes}
    with zipfile.ZipFile(REAL / "tinyimagenet" / "val_dev.zip") as archive:
        for name in archive.namelist():
            sums[index[name.split("/")[0]]] += pixels_of(io.BytesIO(archive.read(name))).permute(2, 0, 1)
    return sums / 25


def pixels_of(file: Path | io.BytesIO) -> torch.Tensor:
    """float32 in 0..1, `[h, w, 3]`."""
    return torch.from_numpy(np.asarray(Image.open(file).convert("RGB")).copy()).float() / 255


@pytest.mark.skipif(not REAL.exists(), reason="needs the real images in ../shared/data")
@pytest.mark.parametrize("task", tasks(), ids=lambda task: task.name)
def test_embedded_images_look_like_their_classes(embedded: Any, task: Task) -> None:
    """The mean picture of a class made here is nearest to the real one's mean far more often than chance."""
    networks, each, classes = networks_of(embedded), 8192 // task.size**2, len(task.classes)
    with torch.inference_mode():
        conditioning = layout.encode(networks, layout.token_ids(networks, task.prompts("described")[0]))
        wanted = layout.Conditioning(*(part.repeat_interleave(each, dim=0) for part in conditioning))
        shape = layout.latent_shape(task.size)
        noise = torch.randn(classes * each, *shape, generator=torch.Generator().manual_seed(2))
        latents = layout.one_step_latents(networks, noise, wanted)
        made = embedded.vae.decode(latents / layout.LATENT_SCALE).sample / 2 + 0.5
    means = made.view(classes, each, -1).mean(dim=1)
    nearest = torch.cdist(means, real_means(task).flatten(1)).argmin(dim=1)
    assert (nearest == torch.arange(classes)).float().mean() > 5 / classes
