"""Which checkpoint is chosen, and which are refused, on real folders of the SDXL layout."""

import json
import math
import os
import shutil
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from submission.errors import CheckpointError, UsageError
from submission.log import Log
from submission.model import checkpoint
from submission.model.checkpoint import fingerprint, inspect, inspect_recipe, plain, shapes, weight_digests
from submission.model.choice import ModelRequest, choose, recognise
from submission.model.generator import load_generator
from submission.model.image_spec import ImageSpec
from submission.model.pipeline import encode_prompts, too_long
from submission.model.recipe import Sampling, load_recipe
from submission.model.sampler import load_scheduler
from submission.plan.budget import start_budget
from submission.tasks import load_task
from tests.conftest import make_pipeline

NOWHERE = Path("/nonexistent")


@pytest.fixture
def copy(checkpoint_folder: Path, tmp_path: Path) -> Path:
    """A checkpoint to damage."""
    return Path(shutil.copytree(checkpoint_folder, tmp_path / "copy"))


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """An empty hub cache and no network, through the hub library's own switches."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))


def test_a_saved_pipeline_is_accepted(checkpoint_folder: Path) -> None:
    found = inspect(checkpoint_folder, "test")
    assert {one.variant for one in found.weights.values()} == {"fp16"}
    assert (found.vae_factor, found.resolution_step, found.resolutions) == (2, 4, (16,))


def test_full_precision_files_are_accepted_where_there_is_no_variant(copy: Path) -> None:
    for file in copy.rglob("*.fp16.safetensors"):
        file.rename(file.with_name(file.name.replace(".fp16", "")))
    assert {one.variant for one in inspect(copy, "test").weights.values()} == {None}


@pytest.fixture(params=["fp16", None], ids=str)
def sharded(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A checkpoint in shards, as libraries save a large one."""
    dtype = torch.float16 if request.param else torch.float32
    make_pipeline().to(dtype).save_pretrained(tmp_path / "sharded", variant=request.param, max_shard_size="40KB")
    return tmp_path / "sharded"


def test_shards_are_read_as_one_file(sharded: Path, checkpoint_folder: Path, task_file: Path) -> None:
    found, whole = inspect(sharded, "test"), inspect(checkpoint_folder, "test")
    assert len(found.weights["unet"].files) > 1 and len(weight_digests(found)) > 4
    assert found.projected_size == whole.projected_size
    image, log, numbers = ImageSpec(load_task(str(task_file))), Log("kept", start_budget(60)), np.arange(3)
    made = [
        load_generator(image, one, torch.device("cpu"), log, dtype=torch.float32).images(numbers, log)
        for one in (found, whole)
    ]
    assert (made[0].int() - made[1].int()).abs().max() <= 3, "but for half precision"


def test_a_missing_shard_is_named_and_none_is_looked_for_elsewhere(sharded: Path) -> None:
    index = next((sharded / "unet").glob("*.index*.json"))
    shard = inspect(sharded, "test").weights["unet"].files[1]
    shard.rename(sharded / "shard.safetensors")
    with pytest.raises(CheckpointError, match=rf"{shard.name} is missing, one of \d+ shards"):
        inspect(sharded, "test")
    index.write_text(index.read_text().replace(shard.name, "../shard.safetensors"))
    with pytest.raises(CheckpointError, match="names files outside of its folder"):
        inspect(sharded, "test")


def test_half_precision_is_taken_where_there_are_both(copy: Path) -> None:
    for file in list(copy.rglob("*.fp16.safetensors")):
        shutil.copy(file, file.with_name(file.name.replace(".fp16", "")))
    assert {one.variant for one in inspect(copy, "test").weights.values()} == {"fp16"}


@pytest.mark.parametrize(
    "name",
    [
        "model_index.json",
        "unet/config.json",
        "scheduler/scheduler_config.json",
        "text_encoder_2/model.fp16.safetensors",
        "vae/diffusion_pytorch_model.fp16.safetensors",
    ],
)
def test_a_missing_file_is_named(copy: Path, name: str) -> None:
    (copy / name).unlink()
    with pytest.raises(CheckpointError, match=rf"{name.replace('.fp16', '')} is missing"):
        inspect(copy, "test")


@pytest.mark.parametrize("keep", [0, 4, 100, -1])
def test_a_truncated_weight_file_is_named(copy: Path, keep: int) -> None:
    file = copy / "unet/diffusion_pytorch_model.fp16.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=r"unet/diffusion_pytorch_model.fp16.safetensors is damaged or truncated"):
        inspect(copy, "test")


@pytest.mark.parametrize("content", ["{", "[]", "\xff"])
def test_a_damaged_configuration_is_named(copy: Path, content: str) -> None:
    (copy / "vae/config.json").write_text(content, encoding="latin-1")
    with pytest.raises(CheckpointError, match=r"vae/config.json"):
        inspect(copy, "test")


@pytest.mark.parametrize("name", ["tokenizer/tokenizer.json", "tokenizer_2/tokenizer.json"])
@pytest.mark.parametrize("content", ["", "version https://git-lfs.github.com/spec/v1\noid sha256:00\n"])
def test_a_tokenizer_of_nothing_is_named(copy: Path, name: str, content: str) -> None:
    """It would load, and take every letter for a word."""
    (copy / name).write_text(content)
    with pytest.raises(CheckpointError, match=rf"{name} is (empty|git-LFS's pointer)"):
        inspect(copy, "test")


def test_a_damaged_tokenizer_is_said(copy: Path) -> None:
    (copy / "tokenizer/tokenizer.json").unlink()
    (copy / "tokenizer/vocab.json").write_text("{}")
    (copy / "tokenizer/merges.txt").write_text("#version: 0.2\na b\n")
    with pytest.raises(CheckpointError, match=r"tokenizer cannot be loaded"):
        encode_prompts(inspect(copy, "test"), ["a"], torch.device("cpu"), torch.float32)


@pytest.mark.parametrize(
    ("file", "name", "value"),
    [
        ("tokenizer/tokenizer_config.json", "model_max_length", 0),
        ("tokenizer_2/tokenizer_config.json", "model_max_length", "x"),
        ("training.json", "resolutions", [0]),
        ("training.json", "resolutions", [-8]),
        ("training.json", "resolutions", [33]),
        ("training.json", "resolutions", [100_000]),
        ("vae/config.json", "scaling_factor", "x"),
        ("vae/config.json", "scaling_factor", math.inf),
        ("vae/config.json", "block_out_channels", 8),
        ("unet/config.json", "sample_size", math.inf),
        ("unet/config.json", "cross_attention_dim", [16, 16]),
        ("text_encoder/config.json", "max_position_embeddings", math.inf),
    ],
)
def test_what_a_configuration_cannot_say_is_named(file: str, name: str, value: object, copy: Path) -> None:
    before = json.loads((copy / file).read_text()) if (copy / file).exists() else {}
    (copy / file).write_text(json.dumps(before | {name: value}))
    with pytest.raises(CheckpointError, match=name):
        inspect(copy, "test")


@pytest.mark.parametrize("kind", [["x"], {}, None])
def test_a_pipeline_of_no_name_is_refused(kind: object, copy: Path) -> None:
    (copy / "model_index.json").write_text(json.dumps({"_class_name": kind}))
    with pytest.raises(CheckpointError, match="and not one of those that are read"):
        inspect(copy, "test")


def test_a_pipe_in_the_place_of_a_configuration_is_not_waited_for(copy: Path) -> None:
    (copy / "unet/config.json").unlink()
    os.mkfifo(copy / "unet/config.json")
    with pytest.raises(CheckpointError, match="is not a file"):
        inspect(copy, "test")


def test_a_tokenizer_saved_without_a_length_reads_what_the_encoder_does(copy: Path, checkpoint_folder: Path) -> None:
    for folder in ("tokenizer", "tokenizer_2"):
        file = copy / folder / "tokenizer_config.json"
        length = int(1e30) if folder == "tokenizer" else 1e30
        file.write_text(json.dumps(json.loads(file.read_text()) | {"model_max_length": length}))
    prompts = ["apple", "a" * 100]
    made = [
        encode_prompts(inspect(folder, "test"), prompts, torch.device("cpu"), torch.float32).embeds
        for folder in (copy, checkpoint_folder)
    ]
    assert torch.equal(*made)
    assert too_long(inspect(copy, "test"), prompts) == prompts[1:]


def test_a_scheduler_of_the_checkpoint_that_there_is_not_is_its_fault(copy: Path) -> None:
    file = copy / "scheduler/scheduler_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"beta_start": "x"}))
    with pytest.raises(CheckpointError, match=r"does not take its scheduler_config.json"):
        load_scheduler(inspect(copy, "test"))
    file.write_text(json.dumps(json.loads(file.read_text()) | {"_class_name": "NoScheduler", "beta_start": 0.1}))
    with pytest.raises(CheckpointError, match="no scheduler of that name"):
        load_scheduler(inspect(copy, "test"))


def test_another_pipeline_is_refused(copy: Path) -> None:
    index = json.loads((copy / "model_index.json").read_text())
    (copy / "model_index.json").write_text(json.dumps(index | {"_class_name": "FluxPipeline"}))
    with pytest.raises(CheckpointError, match=r"holds a FluxPipeline, and not one of those that are read"):
        inspect(copy, "test")


def test_a_many_step_model_is_refused(copy: Path) -> None:
    file = copy / "scheduler/scheduler_config.json"
    file.write_text(file.read_text().replace("trailing", "leading"))
    with pytest.raises(CheckpointError, match="not a one-step checkpoint"):
        inspect(copy, "test")


def test_trained_resolutions_decide_the_canvas(copy: Path) -> None:
    (copy / "training.json").write_text('{"resolutions": [64, 32]}')
    found = inspect(copy, "test")
    assert [found.resolution_for(size) for size in (16, 32, 48, 64, 224)] == [32, 32, 64, 64, 64]
    (copy / "training.json").write_text('{"resolutions": []}')
    with pytest.raises(CheckpointError, match="resolutions"):
        inspect(copy, "test")


def test_the_identity_follows_the_weights(copy: Path) -> None:
    before = weight_digests(inspect(copy, "test"))
    assert set(before) == {
        "text_encoder/model.fp16.safetensors",
        "text_encoder_2/model.fp16.safetensors",
        "unet/diffusion_pytorch_model.fp16.safetensors",
        "vae/diffusion_pytorch_model.fp16.safetensors",
    }
    file = copy / "vae/diffusion_pytorch_model.fp16.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    after = weight_digests(inspect(copy, "test"))
    assert {name for name in before if before[name] != after[name]} == {"vae/diffusion_pytorch_model.fp16.safetensors"}


def test_another_vocabulary_makes_another_checkpoint(copy: Path) -> None:
    before = fingerprint(inspect(copy, "test"))
    assert fingerprint(inspect(copy, "test")) == before
    file = copy / "tokenizer/tokenizer.json"
    file.write_text(file.read_text() + "\n")
    assert fingerprint(inspect(copy, "test")) != before


@pytest.mark.parametrize("fault", ["compressed", "long", "newer"])
def test_a_pickle_that_would_take_any_memory_is_refused(
    fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "unet.bin"
    torch.save({f"layer.{number}.weight": torch.ones(1) for number in range(100)}, file)
    assert len(shapes(file)) == 100
    if fault == "newer":
        file.write_bytes(file.read_bytes().replace(b"PK\x01\x02\x00\x00\x00\x00", b"PK\x01\x02\x00\x00\x63\x00"))
    elif fault == "long":
        monkeypatch.setattr(checkpoint, "MOST_PICKLE", 1000)
    else:
        with zipfile.ZipFile(file) as stored:
            content = {name: stored.read(name) for name in stored.namelist()}
        with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, data in content.items():
                archive.writestr(name, data)
    with pytest.raises(
        ValueError, match={"compressed": "compressed", "long": "take more than"}.get(fault, "version 9.9")
    ):
        shapes(file)


def test_a_configuration_without_end_is_not_read_whole(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "MOST_TEXT", 1 << 20)
    (copy / "unet/config.json").write_text(" " * (1 << 20) + "{}")
    with pytest.raises(CheckpointError, match="larger than 1 MiB"):
        inspect(copy, "test")


def test_files_of_one_name_are_told_apart(copy: Path, checkpoint_folder: Path) -> None:
    """Those of both text encoders, in a folder of what differs from a base."""
    for component in ("unet", "vae"):
        shutil.rmtree(copy / component)
    found = inspect_recipe(replace(plain(checkpoint_folder, Sampling()), weights=copy), "test")
    assert set(weight_digests(found)) == {
        str(copy / "text_encoder/model.fp16.safetensors"),
        str(copy / "text_encoder_2/model.fp16.safetensors"),
        "unet/diffusion_pytorch_model.fp16.safetensors",
        "vae/diffusion_pytorch_model.fp16.safetensors",
    }


def test_another_recipe_of_a_known_name_does_not_take_its_files(checkpoint_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "models").mkdir()
    (tmp_path / "models/sd-turbo").symlink_to(checkpoint_folder)
    file = tmp_path / "sd-turbo.toml"
    file.write_text('base = "someone/other"\n')
    with pytest.raises(UsageError, match="models/sd-turbo is for the recipe of that name that comes along: rename it"):
        choose(ModelRequest(str(file)), cuda=False, environment={}, root=tmp_path)
    file.write_text(f'base = "{checkpoint_folder}"\n')
    assert choose(ModelRequest(str(file)), cuda=False, environment={}, root=tmp_path).path == checkpoint_folder


def test_sdxl_turbo_is_recognised_by_all_of_its_weights() -> None:
    published = load_recipe("sdxl-turbo").sha256
    assert recognise(dict(published)) == "stabilityai/sdxl-turbo"
    assert recognise({**published, "vae/diffusion_pytorch_model.fp16.safetensors": "0" * 64}) is None
    assert recognise(weight_digests(inspect(checkpoint.EMBEDDED, "test"))) is None


def test_auto_prefers_the_environment(checkpoint_folder: Path) -> None:
    found = choose(ModelRequest(), cuda=True, environment={"BANKO_MODEL": str(checkpoint_folder)}, root=NOWHERE)
    assert found.path == checkpoint_folder and "BANKO_MODEL" in found.source


def test_the_embedded_checkpoint_is_known_by_any_path(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(checkpoint.EMBEDDED)
    for name in ("embedded", str(tmp_path / "link"), os.path.relpath(checkpoint.EMBEDDED)):
        assert choose(ModelRequest(name), cuda=True, environment={}, root=NOWHERE).path == checkpoint.EMBEDDED


def test_auto_takes_the_local_folder_next(checkpoint_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "models").mkdir()
    (tmp_path / "models/sdxl-turbo").symlink_to(checkpoint_folder)
    for cuda in (False, True):
        found = choose(ModelRequest(), cuda=cuda, environment={}, root=tmp_path)
        assert found.path.resolve() == checkpoint_folder.resolve() and found.source == "models/sdxl-turbo"


@pytest.mark.parametrize("cuda", [False, True])
def test_a_local_folder_that_leads_nowhere_is_an_error(cuda: bool, tmp_path: Path) -> None:
    (tmp_path / "models").mkdir()
    (tmp_path / "models/sdxl-turbo").symlink_to(tmp_path / "scratch")
    with pytest.raises(CheckpointError, match="is no folder, or a link that leads nowhere"):
        choose(ModelRequest(), cuda=cuda, environment={}, root=tmp_path)


def test_a_damaged_local_folder_is_an_error_not_a_reason_to_look_on(copy: Path, tmp_path: Path) -> None:
    (tmp_path / "models").mkdir()
    (tmp_path / "models/sdxl-turbo").symlink_to(copy)
    (copy / "unet/config.json").unlink()
    with pytest.raises(CheckpointError, match=r"unet/config\.json"):
        choose(ModelRequest(), cuda=False, environment={}, root=tmp_path)


def test_auto_without_a_gpu_takes_the_embedded_one_and_says_so(tmp_path: Path) -> None:
    found = choose(ModelRequest(), cuda=False, environment={}, root=tmp_path)
    assert found.path == checkpoint.EMBEDDED and found.source.startswith("embedded")
    assert choose(ModelRequest("embedded"), cuda=True, environment={}, root=tmp_path).path == checkpoint.EMBEDDED


@pytest.mark.usefixtures("offline")
def test_auto_with_a_gpu_never_takes_the_embedded_one(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no SDXL-Turbo weights.*--model embedded"):
        choose(ModelRequest(), cuda=True, environment={}, root=tmp_path)


def test_auto_with_a_gpu_takes_the_hub_cache(
    monkeypatch: pytest.MonkeyPatch, checkpoint_folder: Path, tmp_path: Path
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    repository = tmp_path / "models--stabilityai--sdxl-turbo"
    (repository / "refs").mkdir(parents=True)
    shutil.copytree(checkpoint_folder, repository / "snapshots" / str(load_recipe("sdxl-turbo").revision))
    found = choose(ModelRequest(), cuda=True, environment={}, root=NOWHERE)
    assert tmp_path in found.path.parents and found.source == "hub stabilityai/sdxl-turbo"


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize("model", ["./nowhere", "/no/where", "nowhere", "nobody/nothing"])
def test_a_model_that_is_nowhere_is_refused(model: str) -> None:
    with pytest.raises(CheckpointError, match=model):
        choose(ModelRequest(model), cuda=False, environment={}, root=NOWHERE)
