"""The networks that are trained."""

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from submission.model.checkpoint import EMBEDDED
from submission.tasks import load_task
from tests.diffusers_pipeline import load_pipeline
from tools.training import layout
from tools.training.prompts import all_prompts


def test_a_tokenizer_depends_on_its_prompts_alone() -> None:
    prompts = [prompt for task in ("cifar100", "tinyimagenet") for prompt in load_task(task).prompts("described")[0]]
    vocabularies = [layout.build_tokenizer(prompts).get_vocab() for _ in range(4)]
    assert all(vocabulary == vocabularies[0] for vocabulary in vocabularies)


@pytest.mark.parametrize(("size", "canvas"), [(8, 32), (32, 32), (50, 64), (64, 64), (96, 96), (100, 128), (224, 128)])
def test_images_are_drawn_on_the_smallest_canvas_that_holds_them(size: int, canvas: int) -> None:
    assert layout.canvas_for(size) == canvas


@pytest.mark.parametrize("size", layout.UNET_WIDTHS)
@pytest.mark.parametrize("canvas", layout.CANVASES)
def test_every_size_of_unet_takes_every_canvas(size: str, canvas: int) -> None:
    torch.manual_seed(0)
    networks = layout.build_networks(["a photo of an apple"], size, canvas)
    noise = torch.randn(1, *layout.latent_shape(canvas))
    with torch.no_grad():
        conditioning = layout.encode(networks, layout.token_ids(networks, ["a photo of an apple"]))
        latents = layout.one_step_latents(networks, noise, conditioning)
        assert networks.vae.decode(latents / layout.LATENT_SCALE).sample.shape == (1, 3, canvas, canvas)
    assert networks.unet.config.sample_size * layout.LATENT_SHRINK == canvas


def test_what_fits_begins_as_the_embedded_checkpoint_s() -> None:
    embedded = load_pipeline(EMBEDDED).components
    kept = {name: embedded[name].state_dict() for name in layout.TRAINED}

    def begun(words: Sequence[str], size: str) -> set[str]:
        networks = layout.build_networks(words, size, 32)
        return {
            name
            for name in layout.TRAINED
            if all(
                weight.shape == kept[name][key].shape and torch.equal(weight, kept[name][key])
                for key, weight in getattr(networks, name).state_dict().items()
            )
        }

    words = all_prompts([load_task("cifar100"), load_task("tinyimagenet")])
    assert begun(words, "base") == set(layout.TRAINED)
    assert begun(words, "small") == {"text_encoder", "text_encoder_2", "vae"}
    assert begun(["a photo of an apple"], "base") == {"unet", "vae"}


def test_a_checkpoint_can_be_handed_on(tmp_path: Path) -> None:
    """Others may read it, and it does not say where it was made."""
    layout.save_networks(layout.build_networks(["a photo of an apple"], "small", 32), tmp_path)
    files = sorted(tmp_path.rglob("*.json"))
    assert tmp_path / "vae" / "config.json" in files
    for file in files:
        assert str(EMBEDDED) not in file.read_text() and str(tmp_path) not in file.read_text(), file
    assert len(weights := list(tmp_path.rglob("*.safetensors"))) == len(layout.TRAINED)
    assert {file.stat().st_mode for file in weights} == {files[0].stat().st_mode}
