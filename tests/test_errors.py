"""Every way to go wrong, through the command line: the exit code, and the one line that is said.

A row is read as the person would who sees that line for the first time: what is wrong, and what is to be done?
"""

import importlib.util
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from submission import cli
from tests import forked
from tests.conftest import TINY_TASK
from tests.paths import ROOT
from tools import audit, evaluate, init, make_checkpoint, rehearse, reproduce
from tools.bench import __main__ as bench

RUN = ROOT / "run.sh"
TOOLS: dict[str, forked.Main] = {
    "audit": audit.main,
    "bench": bench.main,
    "evaluate": evaluate.main,
    "init": init.main,
    "make-checkpoint": make_checkpoint.main,
    "rehearse": rehearse.main,
    "reproduce": reproduce.main,
}


@dataclass(frozen=True)
class Row:
    """A command line after `./run.sh`, run in the folder made below; what it must return and say."""

    line: str
    code: int
    words: str
    fault: Callable[[], None] | None = None
    environment: dict[str, str] = field(default_factory=dict)


def make_folder(folder: Path, checkpoint: Path) -> None:
    """What the rows name."""
    (folder / "checkpoint").symlink_to(checkpoint)
    (folder / "tiny.toml").write_text(TINY_TASK)
    (folder / "broken.toml").write_text(TINY_TASK.replace("size = 16", "size = 15"))
    (folder / "large.toml").write_text(TINY_TASK.replace("size = 16", "size = 1024").replace('"tiny"', '"large"'))
    shutil.copytree(checkpoint, folder / "cut")
    (folder / "cut/text_encoder/model.fp16.safetensors").chmod(0)
    weights = folder / "cut/unet/diffusion_pytorch_model.fp16.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    shutil.copytree(checkpoint, folder / "lost")
    (folder / "lost/vae/config.json").unlink()
    shutil.copytree(checkpoint, folder / "pointers")
    pointer = folder / "pointers/vae/diffusion_pytorch_model.fp16.safetensors"
    pointer.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5135149760\n")
    shutil.copytree(checkpoint, folder / "pickled")
    weights = folder / "pickled/unet/diffusion_pytorch_model.fp16.safetensors"
    weights.rename(weights.with_name("diffusion_pytorch_model.bin"))
    (folder / "file").write_text("in the way")
    (folder / "taken/tiny.pt").mkdir(parents=True)
    (folder / "empty").mkdir()
    torch.save({"conv_in.weight": Path}, folder / "weights.bin")
    crossed = shutil.copytree(checkpoint, folder / "crossed") / "unet/config.json"
    crossed.write_text(crossed.read_text().replace('"cross_attention_dim": 32', '"cross_attention_dim": 16'))
    crossed = shutil.copytree(checkpoint, folder / "inpainting") / "unet/config.json"
    crossed.write_text(crossed.read_text().replace('"in_channels": 4', '"in_channels": 9'))
    torch.save(torch.ones(3), folder / "bare.bin")
    (folder / "deep.toml").write_text("base = " + "[" * 100_000)
    os.mkfifo(folder / "pipe.toml")
    layer = "unet.up_blocks.0.attentions.0.proj_in"
    one = {f"{layer}.lora_A.weight": torch.ones(1, 16), f"{layer}.lora_B.weight": torch.ones(16, 1)}
    loras = {
        "down": {f"{layer}.lora_A.weight": torch.ones(1, 16)},
        "bias": one | {f"{layer}.lora_B.bias": torch.ones(16)},
        "dora": one | {f"{layer}.dora_scale": torch.ones(16)},
        "third": one | {"text_encoder_3.x.lora_A.weight": torch.ones(1, 16)},
        "vector": {name: tensor.flatten() for name, tensor in one.items()},
        "block": {name.replace(".proj_in", ""): tensor for name, tensor in one.items()},
    }
    for name, factors in loras.items():
        save_file(factors, folder / f"{name}.safetensors")
        (folder / f"lora_{name}.toml").write_text(f'base = "checkpoint"\n[lora]\nfile = "{name}.safetensors"\n')
    save_file({"lora_unet_up_blocks_9_proj_in.lora_down.weight": torch.ones(1, 4)}, folder / "one_half.safetensors")
    other = {f"lora_unet_up_blocks_9_proj_in.lora_{end}.weight": torch.ones(4, 4) for end in ("down", "up")}
    save_file(other, folder / "lora.safetensors")
    for name, text in RECIPES.items():
        (folder / f"{name}.toml").write_text(f'base = "checkpoint"\n{text}\n')
    (folder / "prompts.toml").write_text('apple = ["red"]\nplum = ["blue"]\n')
    (folder / "pearl.toml").write_text('pearl = ["white"]\n')
    (folder / "cafes.toml").write_text(TINY_TASK.replace('"tiny"', '"cafes"').replace('"plum"', '"café"'), "utf-8")
    same = 'apple = ["a"]\npear = ["b"]\n"café" = ["c"]\n"cafe\N{COMBINING ACUTE ACCENT}" = ["d"]\n'
    (folder / "same.toml").write_text(same, "utf-8")
    nested = shutil.copytree(checkpoint, folder / "nested") / "unet/config.json"
    nested.write_text("[" * 100_000)
    lists = {
        "index": "index,name\n0,cat\n1,dog\n",
        "behind": "cat\t0\ndog\t1\n",
        "dressed": "(0) cat\n(1) dog\n",
        "unsorted": "1 cat\n0 dog\n",
        "yaml": "names:\n- cat\n- dog\n",
        "quoted": '"cat"\n"dog"\n',
        "wordnet": "n01440764 tench\nn01443537 goldfish\n",
        "unseen": "cat\n\u200d\n",
        "alike": "polar bear\npolar  bear\n",
        "twice": "cat\ndog\ncat\n",
        "comment": "# animals\ncat\ndog\n",
        "numbered": "0\tcat\n1\tdog\n",
        "one": "cat\n",
        "odd": "cat\nd\to\tg\n",
        "good": "cat\ndog\n",
    }
    for name, text in lists.items():
        (folder / f"{name}.txt").write_text(text, "utf-8")
    (folder / "forms.txt").write_text("café\ncafe\N{COMBINING ACUTE ACCENT}\n", "utf-8")
    (folder / "latin.txt").write_bytes("cat\ncaf\xe9\n".encode("latin-1"))
    for name in ("secret.toml", "secret.txt"):
        (folder / name).write_text(TINY_TASK)
        (folder / name).chmod(0)
    (folder / "locked").mkdir(mode=0o700)
    (folder / "submit").mkdir()
    torch.save(torch.rand(6, 3, 16, 16), folder / "submit/tiny.pt")
    torch.save([1, 2, 3], folder / "submit/cifar100.pt")
    torch.save({"images_val": torch.rand(3, 3, 16, 16), "labels_val": torch.arange(3)}, folder / "tiny_test.pt")
    for name in ("apple", "pears", "plum"):
        (folder / "photos" / name).mkdir(parents=True)
        Image.new("RGB", (20, 30), "red").save(folder / "photos" / name / "1.png")


RECIPES = {
    "key": "stepz = 4",
    "number": "[sampling]\nsteps = 0",
    "both": "[sampling]\nsteps = 1\ntimesteps = [999]",
    "scheduler": '[sampling]\nscheduler = "MagicScheduler"',
    "setting": '[sampling]\nscheduler = "LCMScheduler"\nsettings = { sharp = true }',
    "late": '[sampling]\nscheduler = "LCMScheduler"\ntimesteps = [1000]',
    "fixed": "[sampling]\ntimesteps = [999, 499]",
    "sample": '[sampling]\nprediction = "sample"',
    "prediction": '[sampling]\nprediction = "noise"',
    "odd_size": "resolution = 18",
    "part": '[unet]\nfile = "gone.safetensors"',
    "far_part": '[unet]\nrepository = "nobody/nothing"\nfile = "unet.safetensors"',
    "pickle": '[unet]\nfile = "weights.bin"',
    "other_unet": '[unet]\nfile = "lora.safetensors"',
    "other_lora": '[lora]\nfile = "lora.safetensors"',
    "half_lora": '[lora]\nfile = "one_half.safetensors"',
    "whole": 'weights = "lora.safetensors"',
    "lines": 'weights = "a\\nb"',
    "unet_weight": '[unet]\nfile = "lora.safetensors"\nweight = 0.5',
    "revision": '[unet]\nfile = "lora.safetensors"\nrevision = "main"',
    "date": '[sampling]\nscheduler = "LCMScheduler"\nsettings = { beta_schedule = 2024-01-01 }',
    "negative": '[sampling]\nscheduler = "LCMScheduler"\nsettings = { num_train_timesteps = -1 }',
    "endless": f"[sampling]\nguidance = 1{'0' * 400}",
    "eta": '[sampling]\nscheduler = "LCMScheduler"\neta = 0.5',
    "flow": '[sampling]\nscheduler = "FlowMatchEulerDiscreteScheduler"',
    "sde": '[sampling]\nscheduler = "DPMSolverSDEScheduler"',
    "nothing": 'weights = "empty"',
    "bare_unet": '[unet]\nfile = "bare.bin"',
}
USAGE = [
    Row("", 2, "the following arguments are required: TASK; ./run.sh --help says more"),
    Row("cifar10", 2, "no task is called 'cifar10' (did you mean 'cifar100'?)"),
    Row("tiny", 2, "did you mean 'tiny.toml'?"),
    Row("mnist", 2, "there are cifar100, tinyimagenet, or give the path of a .toml file"),
    Row("cifar100 --budget 10h", 2, "--budget '10h' is not a duration: write seconds or minutes, as in 600, 90s"),
    Row("cifar100 --budget ten", 2, "--budget 'ten' is not a duration"),
    Row("cifar100 --budget -1", 2, "--budget '-1' is not a duration"),
    Row("cifar100 --budget", 2, "argument --budget: expected one argument"),
    Row("cifar100 --total ten", 2, "--total 'ten' is not a duration"),
    Row("cifar100 --total 2m --budget 1m", 2, "argument --budget: not allowed with argument --total"),
    Row("cifar100", 2, "--budget 'soon' is not a duration", environment={"BANKO_BUDGET": "soon"}),
    Row("cifar100 --seeds 3", 2, "unrecognized arguments: --seeds 3"),
    Row("cifar100 --seed -1", 2, "argument --seed: '-1' is not a whole number, 0 or more"),
    Row("cifar100 --max-ipc 0", 2, "'0' is not a whole number, 1 or more"),
    Row("cifar100 --select none --pool 20", 2, "--pool is what to choose from, and --select none chooses nothing"),
    Row("cifar100 --batch-size x", 2, "argument --batch-size: 'x' is not a whole number, 1 or more"),
    pytest.param(
        Row("cifar100 --device cuda", 2, "sees no CUDA device here; use --device cpu, or check the driver"),
        marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here"),
    ),
    Row("cifar100 --device tpu", 2, "invalid choice: 'tpu' (choose from"),
    Row("cifar100 --decoder tin", 2, "argument --decoder: 'tin' is none of auto, linear, distilled, tiny, vae"),
    Row("cifar100 --devices gpu:2", 2, "argument --devices: 'gpu:2' is none of auto, a number such as 8, and cpu:2"),
    Row("cifar100 --devices 0", 2, "argument --devices: '0' is not a whole number, 1 or more"),
    Row("cifar100 --devices cpu:2 --device cuda", 2, "--devices cpu:N and --device cuda contradict each other"),
    Row("cifar100 --devices cpu:2", 2, "Ray is missing; pip install -r requirements-ray.txt brings it", forked.no_ray),
    Row("cifar100 --cluster ray://head", 2, "'ray://head' is neither auto nor HOST:PORT, such as 10.0.0.1:6379"),
    Row("cifar100 --cluster 127.0.0.1:1", 2, "--cluster 127.0.0.1:1: Ray does not start or answer (["),
    Row("cifar100", 2, "one is to drive them all", environment={"WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "4"}),
    Row("cifar100 --started-at noon", 2, "'noon' is not a moment in Unix seconds"),
    Row("cifar100", 2, "--started-at: 'noon' is not a moment", environment={"BANKO_STARTED_AT": "noon"}),
    Row("cifar100", 2, "WORLD_SIZE=two in the environment", environment={"WORLD_SIZE": "two"}),
    Row("nowhere.toml", 2, "nowhere.toml: there is no such file"),
    Row("broken.toml", 2, "broken.toml:4: size must be an even whole number of pixels, 8 to 1024"),
    Row(f"{'x' * 300}.toml", 2, "File name too long"),
    Row("tiny.toml nowhere.toml", 2, "nowhere.toml: there is no such file"),
    Row("tiny.toml --seed 0 nowhere.toml", 2, "nowhere.toml: there is no such file"),
    Row("tiny.toml cifar100 tiny.toml", 2, "tiny is asked for twice: each task has a file of its own, tiny.pt"),
    Row("cifar100 tiny.toml --model checkpoint --prompts diverse", 2, "task tiny has none: add a [phrasings] table"),
    Row("tiny.toml cifar100 --model checkpoint --resolution 18", 2, "this checkpoint needs a multiple of 4"),
    Row("tiny.toml --model checkpoint --prompts diverse", 2, "add a [phrasings] table such as"),
    Row("tiny.toml --model checkpoint --prompts nice", 2, "'nice' is none of label, described, diverse, nor the path"),
    Row("tiny.toml --model checkpoint --prompts no.toml", 2, "no.toml: there is no such file"),
    Row(
        "tiny.toml --model checkpoint --prompts prompts.toml",
        2,
        "no prompts for 1 classes of tiny, the first is",
    ),
    Row("tiny.toml --model checkpoint --prompts pearl.toml", 2, "tiny has no class 'pearl' (did you mean 'pear'?)"),
    Row("cifar100 --guidance 3:1", 2, "'3:1' is neither a number such as 2.5 nor a range such as 1:3"),
    Row("cifar100 --steps 0", 2, "argument --steps: '0' is not a whole number, 1 or more"),
    Row("tiny.toml --model key.toml", 2, "key.toml: unknown key 'stepz'; there are base, revision, weights"),
    Row("tiny.toml --model tiny.toml", 2, "tiny.toml: unknown key 'name'; there are base"),
    Row("tiny.toml --model no.toml", 2, "no.toml: cannot be read (No such file or directory)"),
    Row("tiny.toml --model number.toml", 2, "[sampling] steps must be a whole number, 1 or more, not 0"),
    Row("tiny.toml --model both.toml", 2, "[sampling] steps and timesteps contradict each other"),
    Row("tiny.toml --model prediction.toml", 2, "prediction must be one of epsilon, v_prediction, sample, not 'noise'"),
    Row("tiny.toml --model scheduler.toml", 2, "scheduler MagicScheduler: diffusers has no scheduler of that name"),
    Row("tiny.toml --model setting.toml", 2, "scheduler LCMScheduler has no setting 'sharp'"),
    Row("tiny.toml --model late.toml", 2, "timesteps reach from 0 to 999, and 1000 lies outside"),
    Row("tiny.toml --model fixed.toml", 2, "EulerAncestralDiscreteScheduler takes no timesteps, but a number"),
    Row("tiny.toml --model sample.toml", 2, "EulerAncestralDiscreteScheduler does not take {'prediction_type'"),
    Row("tiny.toml --model lines.toml", 2, "weights must be text of one line, not empty, not 'a\\nb'"),
    Row("tiny.toml --model unet_weight.toml", 2, "[unet] unknown key 'weight'; there are file, repository"),
    Row("tiny.toml --model revision.toml", 2, "[unet] revision is of a repository, and none is named"),
    Row("tiny.toml --model date.toml", 2, "settings must be a table of text, numbers, true and false"),
    Row("tiny.toml --model negative.toml", 2, "LCMScheduler does not take {'num_train_timesteps': -1}"),
    Row("tiny.toml --model endless.toml", 2, "guidance must be a number, 0 or more, or a list of two"),
    Row("tiny.toml --model deep.toml", 2, "deep.toml: not a recipe in TOML (maximum recursion depth exceeded"),
    Row("tiny.toml --model pipe.toml", 2, "pipe.toml: not a file"),
    Row("tiny.toml --model eta.toml", 2, "LCMScheduler takes no eta: TCDScheduler and DDIMScheduler do"),
    Row("tiny.toml --model flow.toml", 2, "FlowMatchEulerDiscreteScheduler does not take 1 step ("),
    Row("tiny.toml --model checkpoint --steps 1001", 2, "1001 steps, and there are 1000 timesteps"),
    pytest.param(
        Row("tiny.toml --model sde.toml", 2, "needs what is not installed: pip install torchsde"),
        marks=pytest.mark.skipif(importlib.util.find_spec("torchsde") is not None, reason="it is installed here"),
    ),
    Row(
        "cafes.toml --model checkpoint --prompts same.toml", 2, "same.toml:4: 'cafe\u0301' is there twice, in two forms"
    ),
    Row("tiny.toml cafes.toml --model checkpoint --prompts prompts.toml", 2, "no prompts for 1 classes of tiny"),
    Row("tiny.toml --model odd_size.toml", 2, "resolution 18 is no multiple of 4, which checkpoint needs"),
    Row("tiny.toml --model checkpoint --resolution 18", 2, "this checkpoint needs a multiple of 4"),
    Row("tiny.toml --model checkpoint --resolution 4194304", 2, "no memory for the model and its first images"),
    Row("tiny.toml --model checkpoint --decoder tiny", 2, "the checkpoint's folder has no AutoencoderTiny"),
]
JOB = [
    Row("tiny.toml --model checkpoint --started-at 1000", 3, "is over before the model is loaded: give a longer one"),
    Row("tiny.toml cifar100 --model nowhere", 4, "--model nowhere: there is no folder nowhere"),
    Row("tiny.toml cifar100", 4, "no SDXL-Turbo weights: ", forked.gpu_without_weights),
    Row("tiny.toml --model nowhere", 4, "--model nowhere: there is no folder nowhere"),
    Row("tiny.toml --model nowhere", 4, "there is no folder nowhere", environment={"BANKO_BUDGET": ""}),
    Row("tiny.toml --model file", 4, "--model file: one file lacks what a checkpoint needs beside weights: write a"),
    Row("tiny.toml --model sdxl-torbo", 4, "no recipe of that name (dmd2-sdxl, hyper-sd15,"),
    Row("tiny.toml --model part.toml", 4, "gone.safetensors cannot be read (No such file or directory)"),
    Row("tiny.toml --model far_part.toml", 4, "nobody/nothing is neither a folder here nor to be had", forked.offline),
    Row("tiny.toml --model pickle.toml", 4, "weights.bin is damaged or truncated (it holds other things than tensors"),
    Row("tiny.toml --model other_unet.toml", 4, "lora.safetensors: no unet that suits checkpoint"),
    Row("tiny.toml --model other_lora.toml", 4, "lora.safetensors is a LoRA for another layout: its up_blocks.9"),
    Row("tiny.toml --model half_lora.toml", 4, "one_half.safetensors is no LoRA that is understood"),
    Row("tiny.toml --model whole.toml", 4, "lora.safetensors: no text_encoder that suits checkpoint"),
    Row("tiny.toml --model lora_down.toml", 4, "down.safetensors lacks unet.up_blocks.0.attentions.0.proj_in.lora_B"),
    Row("tiny.toml --model lora_bias.toml", 4, "does more than a LoRA, and is not supported: it has unet.up_blocks.0."),
    Row("tiny.toml --model lora_dora.toml", 4, "does more than a LoRA, and is not supported: it has unet.up_blocks.0."),
    Row("tiny.toml --model lora_third.toml", 4, "another layout: there is no network for its text_encoder_3.x.lora_A"),
    Row("tiny.toml --model lora_vector.toml", 4, "is a LoRA for another layout: its up_blocks.0.attentions.0.proj_in"),
    Row("tiny.toml --model lora_block.toml", 4, "is a LoRA for another layout: its up_blocks.0.attentions.0 does not"),
    Row("tiny.toml --model bare_unet.toml", 4, "it holds other things than tensors by their names"),
    Row("tiny.toml --model nothing.toml", 4, "empty holds nothing in place of the base's: name its folders text_enc"),
    Row("tiny.toml --model crossed", 4, "crossed/unet is the UNet of another layout than crossed/text_encoder and"),
    Row("tiny.toml --model inpainting", 4, "inpainting/unet takes 9 channels, as for inpainting"),
    Row("tiny.toml --model nobody/nothing", 4, "neither a folder here nor to be had from the hub", forked.offline),
    Row(f"tiny.toml --model {'x' * 300}", 4, "cannot be looked into (File name too long)"),
    Row("tiny.toml", 4, "BANKO_MODEL=/no/where: there is no folder", environment={"BANKO_MODEL": "/no/where"}),
    Row("tiny.toml", 4, "no SDXL-Turbo weights: ", forked.gpu_without_weights),
    Row("tiny.toml", 4, "or ask for the stand-in with --model embedded", forked.gpu_without_weights),
    Row("tiny.toml --model cut", 4, "cut/unet/diffusion_pytorch_model.fp16.safetensors is damaged or truncated"),
    Row("tiny.toml --model pointers", 4, "is git-LFS's pointer to the file, and not the file: git lfs pull brings it"),
    Row("tiny.toml --model pickled", 4, "diffusion_pytorch_model.bin is a pickle, which may run code when it is read"),
    Row("tiny.toml --model lost", 4, "lost/vae/config.json is missing"),
    Row("tiny.toml --model checkpoint --output file", 5, "cannot write to file (File exists): choose another --output"),
    Row("tiny.toml --model checkpoint --output file/out", 5, "cannot write to file/out (Not a directory)"),
    Row("tiny.toml --model nested", 4, "nested/unet/config.json is damaged"),
    Row("tiny.toml --model \udcff", 4, "is not UTF-8, and not for libraries to read"),
    Row("tiny.toml --model checkpoint --output \udcff", 5, "is not UTF-8, and not for libraries to read"),
    Row("tiny.toml --model checkpoint --output taken", 5, "taken/tiny.pt is a folder: rename it, or choose another"),
    Row("cifar100 tiny.toml --model checkpoint --output taken", 5, "taken/tiny.pt is a folder: rename it, or choose"),
]
TOOLS_REFUSE = [
    Row("reproduce --tasks pets.toml", 2, "nothing was published of pets.toml: the tasks are cifar100"),
    Row("audit", 2, "the following arguments are required: FILE.pt; ./run.sh audit --help says more"),
    Row("audit submit/tiny.pt", 2, "--task is missing: no task is called 'tiny' (did you mean 'tiny.toml'?)"),
    Row("audit nowhere.pt --task tiny.toml", 6, "nowhere.pt: no such file"),
    Row("audit submit --task tiny.toml", 6, "submit: not a file"),
    Row("audit file --task tiny.toml", 6, "file: not a whole file of torch.save"),
    Row("audit submit/cifar100.pt", 6, "cifar100.pt: the file holds a list, not one tensor"),
    Row("audit submit/tiny.pt --task tiny.toml --sheet no/sheet.png", 5, "cannot write no/sheet.png (No such file"),
    Row("evaluate", 2, "the following arguments are required: --submit_dir"),
    Row("evaluate --submit_dir submit --runs 0", 2, "'0' is not a whole number, 1 or more"),
    Row("evaluate --submit_dir submit --seed 99999999999999999999", 2, "is not a whole number"),
    Row("evaluate --submit_dir submit --tasks cifar10", 2, "did you mean 'cifar100'?"),
    Row("evaluate --submit_dir submit --tasks tiny.toml tiny.toml", 2, "--tasks names a task twice"),
    Row("evaluate --submit_dir empty", 6, "holds none of cifar100.pt, tinyimagenet.pt; for a task of your own, say"),
    Row("evaluate --submit_dir empty --tasks tiny.toml", 6, "empty/tiny.pt: no such file"),
    Row("evaluate --submit_dir submit --truth_dir empty --tasks tiny.toml", 6, "nor is there a folder per class, such"),
    Row("evaluate --submit_dir submit --truth_dir photos --tasks tiny.toml", 6, "(did you mean 'pears'?)"),
    Row("evaluate --submit_dir submit --truth_dir . --tasks tiny.toml --output_dir file", 5, "cannot write into file"),
    Row("rehearse tiny.toml --limit 1d", 2, "--limit '1d' is not a duration"),
    Row("rehearse cifar10", 2, "did you mean 'cifar100'?"),
    Row("bench", 2, "the following arguments are required: NAME; ./run.sh bench --help says more"),
    Row("bench speed", 2, "invalid choice: 'speed' (choose from"),
    Row("bench scheduler --json no/figures.json", 5, "there is no folder no"),
    Row("make-checkpoint empty/../submit", 2, "is there already: name a new folder"),
    Row("make-checkpoint file/inside --size small", 5, "cannot write file/inside (Not a directory)"),
    Row("init", 2, "the following arguments are required: TASK.toml, --classes"),
    Row("init pets --classes good.txt", 2, "pets: a task's file ends in .toml: name it pets.toml"),
    Row("init 'my pets.toml' --classes good.txt", 2, "'my pets', becomes the task's name, and that must suit"),
    Row("init cifar100.toml --classes good.txt", 2, "cifar100 is the name of a task that comes along"),
    Row("init tiny.toml --classes good.txt", 2, "tiny.toml is there already: remove it, or name another"),
    Row("init pets.toml --classes good.txt --size 63", 2, "--size 63: must be an even whole number of pixels"),
    Row("init no/pets.toml --classes good.txt", 5, "cannot write no/pets.toml (No such file or directory)"),
    Row("init pets.toml --classes nowhere.txt", 6, "nowhere.txt: there is no such file"),
    Row("init pets.toml --classes empty", 6, "empty: not a file"),
    Row("init pets.toml --classes twice.txt", 6, "twice.txt:3: 'cat' asks for the same as line 1"),
    Row("init pets.toml --classes one.txt", 6, "one.txt: 1 class names, and a task has two or more"),
    Row("init pets.toml --classes odd.txt", 6, "odd.txt:2: a class name cannot hold U+0009"),
    Row("init pets.toml --classes latin.txt", 6, "latin.txt:2: not UTF-8 text (byte 0xe9); save the file as UTF-8"),
    Row("init pets.toml --classes good.txt --images empty", 6, "empty: no images there"),
    Row("init pets.toml --classes good.txt --images submit", 6, "submit: no images there"),
    Row("init pets.toml --classes numbered.txt", 6, "numbered.txt:1: its lines are numbered, as '0\\tcat'"),
    Row(
        "init pets.toml --classes comment.txt",
        6,
        "comment.txt:1: '# animals' looks like a comment or",
    ),
    *(
        Row(f"init pets.toml --classes {name}.txt", 6, "leave the names alone")
        for name in ("index", "behind", "dressed", "unsorted")
    ),
    *(
        Row(f"init pets.toml --classes {name}.txt", 6, "looks like a comment or an item of a list")
        for name in ("yaml", "quoted", "wordnet")
    ),
    Row("init pets.toml --classes unseen.txt", 6, "unseen.txt:2: a class name of nothing that can be read"),
    Row("init pets.toml --classes alike.txt", 6, "alike.txt:2: 'polar  bear' asks for the same as line 1"),
    Row("init pets.toml --classes forms.txt", 6, "asks for the same as line 1"),
    Row("init pets.toml --classes good.txt --images photos", 6, "a colour channel of its images has one value"),
]
ORDINARY = [
    Row("secret.toml", 2, "secret.toml: cannot be read: Permission denied"),
    Row("tiny.toml --model locked/sdxl", 4, "locked/sdxl cannot be looked into (Permission denied)"),
    Row("tiny.toml --model cut", 4, "model.fp16.safetensors cannot be read (Permission denied)"),
    Row("tiny.toml --model checkpoint --output locked/out", 5, "cannot write to locked/out (Permission denied)"),
    Row(
        "tiny.toml --model checkpoint --output locked/out",
        5,
        'as user 65534: run the image with --user "$(id -u):$(id -g)"',
        environment={"BANKO_CONTAINER": "1"},
    ),
    Row("init locked/pets.toml --classes good.txt", 5, "(Permission denied): choose a place that you can write to"),
    Row("init pets.toml --classes secret.txt", 6, "secret.txt: Permission denied"),
    Row("evaluate --submit_dir submit --truth_dir locked --tasks tiny.toml", 6, "locked/tiny_test.pt: Permission"),
]


@pytest.fixture(scope="module")
def folder(checkpoint_folder: Path) -> Iterator[Path]:
    """One that anyone may enter; pytest's own are closed to others."""
    made = Path(tempfile.mkdtemp())
    made.chmod(0o755)
    shutil.copytree(checkpoint_folder, made / "sdxl")
    for path in [made / "sdxl", *(made / "sdxl").rglob("*")]:
        path.chmod(0o755)
    make_folder(made, made / "sdxl")
    forked.warm_up()
    yield made
    shutil.rmtree(made)
    made.with_suffix(".log").unlink(missing_ok=True)


def refused(row: Row, folder: Path, job: forked.Main = cli.main) -> None:
    """Runs a row and holds it to what it should return and say, and to leaving nothing behind."""
    before = files_of(folder)
    words, log = shlex.split(row.line), folder.with_suffix(".log")
    main = TOOLS.get(words[0]) if words else None
    process = forked.start_command(
        main or job,
        words[1:] if main else words,
        log,
        folder=folder,
        environment=row.environment,
        fault=row.fault,
    )
    process.join(60)
    said = log.read_text()
    assert process.exitcode == row.code, said
    lines = [line for line in said.splitlines() if not line.startswith("warning: ")]
    assert len(lines) == 1 and lines[0].startswith("error: "), "one line"
    assert row.words in lines[0]
    assert files_of(folder) == before, "nothing is left behind"


def files_of(folder: Path) -> list[Path]:
    """All but hidden ones: a job that the clock ends leaves those to the next."""
    return sorted(path for path in folder.rglob("[!.]*") if path.is_file() and ".tiny.spool" not in path.parts)


@pytest.mark.parametrize("row", [*USAGE, *JOB, *TOOLS_REFUSE], ids=lambda row: f"{row.line}, {row.words}"[:80])
def test_what_is_wrong_is_said_in_one_line(row: Row, folder: Path) -> None:
    refused(row, folder)


def test_ctrl_c_before_the_first_round_is_said_in_one_line(folder: Path) -> None:
    row = Row("tiny.toml --model checkpoint", 3, "stopped before the first round was done")
    refused(row, folder, partial(cli.main, prepare=forked.interrupted_device))


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become a user whom permissions stop")
@pytest.mark.parametrize("row", ORDINARY, ids=lambda row: row.line)
def test_what_is_not_allowed_is_said_in_one_line(row: Row, folder: Path) -> None:
    refused(replace(row, fault=forked.ordinary_user), folder)


@pytest.fixture
def disk(folder: Path, request: pytest.FixtureRequest) -> Iterator[str]:
    """A file system of 64 kB, mounted with the options that the test asks for."""
    place = folder / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size=64k,{request.param}", "tmpfs", str(place)]
    mounted = subprocess.run(mount, check=False, capture_output=True, text=True)
    if mounted.returncode:
        place.rmdir()
        pytest.skip(f"a small file system cannot be mounted here: {mounted.stderr.strip()}")
    yield request.param
    subprocess.run(["umount", str(place)], check=True)
    place.rmdir()


@pytest.mark.parametrize(
    ("disk", "words"),
    [
        ("rw", "no room in disk/out: one image per class of large takes 84.93 MB there,"),
        ("ro", "cannot write to disk/out (Read-only file system): choose another --output"),
    ],
    indirect=["disk"],
)
def test_a_disk_without_room_or_for_reading_alone(disk: str, words: str, folder: Path) -> None:
    refused(Row("large.toml --model checkpoint --output disk/out", 5, words), folder)


@pytest.mark.parametrize("disk", ["rw"], indirect=True)
def test_a_disk_with_room_for_the_first_task_alone(disk: str, folder: Path) -> None:
    words = "one image per class of tiny and large takes 84.96 MB there, and"
    refused(Row("tiny.toml large.toml --model checkpoint --output disk/out", 5, words), folder)


def test_ctrl_c_while_libraries_are_imported_is_no_fault_of_theirs() -> None:
    program = """
import os, signal
from submission.errors import importing
signal.signal(signal.SIGINT, signal.default_int_handler)  # which is ignored in the background
with importing():
    pass
assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
with importing():
    os.kill(os.getpid(), signal.SIGINT)
"""
    process = subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=False, capture_output=True, text=True)
    assert process.returncode == -signal.SIGINT and not process.stderr


@pytest.mark.parametrize("words", [[], ["reading"], ["nonsense"]])
def test_a_tool_that_is_none(words: list[str]) -> None:
    command = [sys.executable, "-m", "tools", *words]
    process = subprocess.run(command, cwd=ROOT, check=False, capture_output=True, text=True)
    assert process.returncode == 2 and process.stderr.startswith("error: ") and process.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("line", "code", "words"),
    [("cifar10", 2, "did you mean 'cifar100'?"), ("init pets.toml --classes nowhere.txt", 6, "there is no such file")],
)
def test_run_sh_itself_says_it_and_hands_on_the_code(line: str, code: int, words: str, folder: Path) -> None:
    environment = os.environ | {"BANKO_PYTHON": sys.executable}
    process = subprocess.run(
        [RUN, *shlex.split(line)], cwd=folder, env=environment, check=False, capture_output=True, text=True
    )
    assert process.returncode == code and words in process.stderr
    assert len(process.stderr.splitlines()) == 1 and not process.stdout
