"""Training the embedded checkpoint: it repeats itself, survives a kill, and what it writes is what diffusers loads."""

import io
import zipfile
from collections.abc import Iterator
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, StableDiffusionXLPipeline
from PIL import Image
from torch import Tensor

from submission.model.checkpoint import EMBEDDED
from submission.tasks import PromptStyle, Task, load_task
from tests import forked
from tests.paths import ROOT, SHARED
from tools import train_embedded
from tools.training import arithmetic, layout
from tools.training.progress import save_whole
from tools.training.vae import normalise_latents

REAL = SHARED / "data"
STYLES: tuple[PromptStyle, ...] = ("label", "described", "diverse")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random images packed as the real ones are: two a class of CIFAR-100, one of Tiny-ImageNet."""
    folder = tmp_path_factory.mktemp("data")
    random = np.random.default_rng(0)
    grids = folder / "cifar100" / "train"
    grids.mkdir(parents=True)
    for index, entry in enumerate(load_task("cifar100").classes):
        Image.fromarray(random.integers(0, 256, (32, 64, 3), dtype=np.uint8)).save(
            grids / f"{index:03d}_{entry.name}.webp", lossless=True
        )
    (folder / "tinyimagenet").mkdir()
    with zipfile.ZipFile(folder / "tinyimagenet" / "train_150_per_class.zip", "w") as archive:
        for entry in load_task("tinyimagenet").classes:
            file = io.BytesIO()
            Image.fromarray(random.integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(file, "JPEG")
            archive.writestr(f"{entry.wnid}/{entry.wnid}_0.JPEG", file.getvalue())
    return folder


def start(data: Path, output: Path, *more: str) -> ForkServerProcess:
    options = ["--vae-steps", "4", "--diffusion-steps", "4", "--distil-steps", "4", "--match-steps", "6"]
    options += ["--save-every", "3", "--threads", "1", "--seed", "5"]
    arguments = ["--data", str(data), "--output", str(output), *options, *more]
    log = output.with_suffix(".errors")
    return forked.start_command(
        train_embedded.main, arguments, log, folder=ROOT, environment={}, fault=forked.small_training
    )


def finish(process: ForkServerProcess, output: Path) -> None:
    process.join(240)
    assert process.exitcode == 0, output.with_suffix(".errors").read_text()


@pytest.fixture(scope="module")
def trained(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("trained")
    finish(start(data, output), output)
    return output


def test_a_killed_training_resumes_to_the_same_losses(data: Path, trained: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    process = start(data, output)
    log = output / "training.log"
    # Past the save of step 3 of the last stage, so that networks, optimisers and random numbers of all count.
    forked.wait_for(lambda: log.exists() and "match 4 " in log.read_text(), process)
    process.kill()
    process.join()
    assert not (output / "checkpoint").exists(), "the kill came too late to test anything"

    finish(start(data, output, "--resume"), output)

    assert log.read_text() == (trained / "training.log").read_text()
    for name in ("unet/diffusion_pytorch_model", "text_encoder_2/model", "vae/diffusion_pytorch_model"):
        file = f"checkpoint/{name}.fp16.safetensors"
        assert (output / file).read_bytes() == (trained / file).read_bytes()


def test_a_trained_checkpoint_loads_and_samples(trained: Path) -> None:
    pipeline = load_pipeline(trained / "checkpoint")
    images = sample(pipeline, ["a photo of an apple"], 32, torch.randn(1, 4, 8, 8))
    assert images.shape == (1, 3, 32, 32)
    assert images.isfinite().all()
    assert (trained / "checkpoint" / "training.log").read_text() == (trained / "training.log").read_text()


def test_refusals_say_what_to_do(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    begun = tmp_path / "begun"
    begun.mkdir()
    save_whole({"settings": {"device": "cpu", "seed": 5}}, begun / "state.pt")

    def refused(*argv: str) -> tuple[int, str]:
        return train_embedded.main(list(argv)), capsys.readouterr().err

    status, message = refused("--data", str(data), "--output", str(begun), "--threads", "1")
    assert status == 5
    assert "--resume" in message
    status, message = refused("--data", str(data), "--output", str(begun), "--device", "cpu", "--resume")
    assert status == 5
    assert "seed 5" in message
    status, message = refused("--data", str(tmp_path), "--output", str(tmp_path / "out"), "--threads", "1")
    assert status == 6
    assert "--data" in message
    with pytest.raises(SystemExit, match="2"):
        refused("--data", str(data), "--output", str(tmp_path / "out"), "--vae-steps", "0")
    assert "argument --vae-steps: '0' is not a whole number, 1 or more" in capsys.readouterr().err
    (tmp_path / "file").touch()
    status, message = refused("--data", str(data), "--output", str(tmp_path / "file"))
    assert status == 5
    assert "another --output" in message


def test_a_full_disk_is_what_it_is_called(tmp_path: Path) -> None:
    (tmp_path / "state.pt.part").symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left"):
        save_whole({"weights": torch.zeros(1 << 20)}, tmp_path / "state.pt")


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


# The parts


def test_a_tokenizer_depends_on_its_prompts_alone() -> None:
    prompts = [prompt for task in tasks() for prompt in task.prompts("described")[0]]
    vocabularies = [layout.build_tokenizer(prompts).get_vocab() for _ in range(4)]
    assert all(vocabulary == vocabularies[0] for vocabulary in vocabularies)


def test_normalised_latents_have_sdxls_scale_and_decode_the_same() -> None:
    torch.manual_seed(0)
    vae = AutoencoderKL(block_out_channels=(8, 8, 8), norm_num_groups=4, latent_channels=4, **vae_blocks())
    vae.post_quant_conv.bias.data += 0.5
    pixels = torch.rand(32, 3, 32, 32) * 2 - 1
    with torch.no_grad():
        before = vae.decode(vae.encode(pixels).latent_dist.mean).sample
        spread_before = (
            vae.encode(pixels).latent_dist.std / vae.encode(pixels).latent_dist.mean.std(dim=(0, 2, 3))[:, None, None]
        )
        normalise_latents(vae, pixels)
        posterior = vae.encode(pixels).latent_dist
        after = vae.decode(posterior.mean).sample
    means = posterior.mean * layout.LATENT_SCALE
    torch.testing.assert_close(means.mean(dim=(0, 2, 3)), torch.zeros(4), atol=1e-4, rtol=0)
    torch.testing.assert_close(means.std(dim=(0, 2, 3)), torch.ones(4), atol=1e-3, rtol=0)
    torch.testing.assert_close(posterior.std * layout.LATENT_SCALE, spread_before, atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(after, before, atol=1e-4, rtol=1e-4)


def vae_blocks() -> dict[str, Any]:
    return {"down_block_types": ("DownEncoderBlock2D",) * 3, "up_block_types": ("UpDecoderBlock2D",) * 3}


# The checkpoint in the repository


@pytest.fixture(scope="module")
def embedded() -> Any:
    return load_pipeline(EMBEDDED)


def load_pipeline(folder: Path) -> Any:
    pipeline = StableDiffusionXLPipeline.from_pretrained(folder, variant="fp16", dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def sample(pipeline: Any, prompts: list[str], size: int, noise: Tensor, kind: str = "pt") -> Tensor:
    images: Tensor = pipeline(
        prompt=prompts,
        height=size,
        width=size,
        num_inference_steps=1,
        guidance_scale=0.0,
        latents=noise.clone(),  # the pipeline scales it
        output_type=kind,
    ).images
    return images


def networks_of(pipeline: Any) -> layout.Networks:
    return layout.Networks(
        pipeline.tokenizer,
        pipeline.text_encoder,
        pipeline.text_encoder_2,
        pipeline.unet,
        pipeline.vae,
        pipeline.scheduler,
    )


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
