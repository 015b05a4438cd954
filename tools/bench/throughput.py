"""From prompt to pixels and copies: the published recipe against the job's, with what the job does added in turn.

All sides share one UNet and the same prompts, and take turns, so that a machine whose speed drifts slows all alike; the
ratio is taken turn by turn. The published recipe is as one would write it with diffusers: a prompt a call, encoded anew
each time, the VAE in float32 (SDXL's `force_upcast`), pictures shrunk by Pillow, each copy made by albumentations.
"""

import argparse
import copy
import os
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from submission.arguments import add_device, batch_size, number_from
from submission.dataset.augment import augment
from submission.log import Log
from submission.machine.device import choose_device
from submission.machine.memory import forget_peak, peak_memory
from submission.model import pipeline
from submission.model.calibration import choose_decoder
from submission.model.checkpoint import Checkpoint
from submission.model.choice import ModelRequest, choose
from submission.model.decoder import RUNGS, full_decoder
from submission.model.generator import Generator, load_generator
from submission.model.image_spec import ImageSpec
from submission.plan.batch_size import BatchSize
from submission.plan.budget import start_budget
from submission.tasks import load_task
from tools.bench.timing import fastest, gemm_flops, synchronise, unet_flop, unet_step

COPIES = 4  # of an image, as published
NEGATIVE_PROMPT = "blurry, cropped, watermark, text"  # which a guidance of 0 ignores
SETTLE_SECONDS = 600.0  # the budget that the batch size is chosen for


@dataclass(frozen=True)
class Side:
    """A way to make images: `make` those of these numbers with their copies, `count` of them per turn."""

    name: str
    count: int
    make: Callable[[NDArray[np.int64]], None]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--task", default="cifar100", help="whose prompts")
    add("--model", default="embedded", help="a checkpoint, named as for the job")
    add("--resolution", type=number_from(1), metavar="PX", help="width of the canvas (default: the checkpoint's own)")
    add("--batch-size", type=batch_size, metavar="N", help="images made at a time (default: auto, what measures best)")
    add("--decoder", choices=("auto", *RUNGS), default="auto", help="as for the job")
    add("--compile", action="store_true", help="also measure networks that are compiled, last")
    add("--turns", type=number_from(1), default=5, metavar="N", help="turns a side")
    add_device(parser)


def measure(options: argparse.Namespace) -> dict[str, object]:
    """Images per second and peak memory by side, ratios to the published recipe, and how the UNet uses the machine.

    Raises a BankoError where the job would.
    """
    log = Log("kept", start_budget(SETTLE_SECONDS, time.time()))
    device = choose_device(options.device)
    checkpoint = choose(ModelRequest(options.model), cuda=device.type == "cuda")
    image = ImageSpec(load_task(options.task), resolution=options.resolution)
    generator = load_generator(image, checkpoint, device, log, project_prompts=False)
    cheap = replace(generator)
    tiny = pipeline.load_tiny(checkpoint, device, generator.vae.dtype)
    cheap.decoder = choose_decoder(
        cheap, options.decoder, tiny, left=SETTLE_SECONDS, cap=generator.task.max_ipc, log=log
    )
    final = projected(cheap)
    batch = options.batch_size or settle(final, log)
    sides = list(all_sides(checkpoint, generator, cheap, final, batch, log))
    if options.compile:
        sides.append(compiled(final, batch, log))
    rates: dict[str, list[float]] = {side.name: [] for side in sides}
    memory: dict[str, int] = {}
    for turn in range(options.turns + 1):  # the first one warms up
        for side in sides:
            numbers = np.arange(side.count) + turn * side.count
            forget_peak()
            began = time.perf_counter()
            side.make(numbers)
            synchronise(device)
            if turn:
                rates[side.name].append(side.count / (time.perf_counter() - began))
            memory[side.name] = max(memory.get(side.name, 0), peak_memory())
    published, ours = rates[sides[0].name], rates[sides[-1].name]
    ratios = [b / a for a, b in zip(published, ours, strict=True)]
    return {
        "speedup": statistics.median(ratios),
        "speedup_least": min(ratios),
        "speedup_most": max(ratios),
        "images_per_second": {name: statistics.median(of_side) for name, of_side in rates.items()},
        "peak_memory_bytes": memory,
        "decoder": cheap.decoder.rung,
        "fidelity_db": dict(cheap.decoder.fidelity),
        "batch_size": batch,
        "resolution": generator.resolution,
        "threads": torch.get_num_threads(),
        **use_of_machine(final, batch),
    }


def table(figures: dict[str, Any]) -> str:
    rates, memory = figures["images_per_second"], figures["peak_memory_bytes"]
    first = next(iter(rates.values()))
    lines = [f"{figures['resolution']} px{'':<42}{'images/s':>10}{'ratio':>8}{'peak memory':>13}"]
    lines += [
        f"{name:<47}{rate:>10.3g}{rate / first:>8.2f}{memory[name] / 1e9:>10.2f} GB" for name, rate in rates.items()
    ]
    lines.append(
        f"ours over published, turn by turn: {figures['speedup']:.2f} "
        f"({figures['speedup_least']:.2f} to {figures['speedup_most']:.2f})"
    )
    lines.append(
        f"UNet alone: {figures['unet_images_per_second']:.3g} images/s, {figures['unet_flop'] / 1e9:,.3g} GFLOP per "
        f"image, {figures['unet_flops'] / 1e9:,.0f} of the {figures['gemm_flops'] / 1e9:,.0f} GFLOP/s of a matrix "
        f"product ({figures['unet_fraction_of_gemm_peak']:.0%}); ours takes "
        f"{figures['unet_images_per_second'] / list(rates.values())[-1]:.2f} times the UNet's time"
    )
    return "\n".join(lines)


def projected(generator: Generator) -> Generator:
    """The same that looks its prompts' projections up; other weights are shared."""
    unet = generator.sampler.unet
    unet = copy.deepcopy(unet, {id(weight): weight for weight in unet.parameters()})
    conditioning = pipeline.project_prompts(unet, generator.conditioning)
    return replace(generator, sampler=replace(generator.sampler, unet=unet), conditioning=conditioning)


def settle(generator: Generator, log: Log) -> int:
    """The batch size that the job would find."""
    sizes, made = BatchSize(), 0
    while not sizes.settled:
        began = time.perf_counter()
        generator.images(np.arange(made, made + sizes.current), log)
        made += sizes.current
        sizes.observe(time.perf_counter() - began, SETTLE_SECONDS)
    return sizes.current


def all_sides(
    checkpoint: Checkpoint, generator: Generator, cheap: Generator, final: Generator, batch: int, log: Log
) -> Iterator[Side]:
    """The published recipe, then ours, one thing after the other."""
    upcast = copy.deepcopy(generator.vae).float()
    slow = replace(generator, vae=upcast, decoder=full_decoder(upcast, generator.task.size))
    one_by_one = partial(copies_one_by_one, published_copies())
    yield Side("published recipe", 1, published(checkpoint, generator, upcast))

    def ours(generator: Generator, copies: Callable[[Tensor, NDArray[np.int64]], None]) -> Callable[..., None]:
        return lambda numbers: copies(generator.images(numbers, log), numbers)

    yield Side("prompts encoded once", 1, ours(slow, one_by_one))
    yield Side(f"+ batches of {batch}", batch, ours(slow, one_by_one))
    yield Side(f"+ VAE in {str(generator.vae.dtype).removeprefix('torch.')}", batch, ours(generator, one_by_one))
    yield Side(f"+ decoder for the size wanted: {cheap.decoder.rung}", batch, ours(cheap, one_by_one))
    classes = len(generator.task.classes)
    yield Side("+ copies in batches", batch, ours(cheap, partial(copies_in_batches, classes)))
    yield Side("+ prompts projected once", batch, ours(final, partial(copies_in_batches, classes)))


def compiled(final: Generator, batch: int, log: Log) -> Side:
    """Ours by compiled networks of its own, since the other sides share theirs."""
    ours = replace(final, sampler=replace(final.sampler, unet=copy.deepcopy(final.sampler.unet)))
    pipeline.compile_blocks(ours.sampler.unet)
    if ours.decoder.rung == "vae":
        ours.vae = copy.deepcopy(final.vae)
        pipeline.compile_vae(ours.vae)
        ours.decoder = full_decoder(ours.vae, ours.task.size)
    copies = partial(copies_in_batches, len(ours.task.classes))
    return Side("+ networks compiled", batch, lambda numbers: copies(ours.images(numbers, log), numbers))


def published(checkpoint: Checkpoint, generator: Generator, vae: Any) -> Callable[[NDArray[np.int64]], None]:
    """Makes one image a call, as a user of diffusers would, with the UNet of `generator`."""
    import diffusers  # noqa: PLC0415  # slow to import

    sampler, size = generator.sampler, generator.task.size
    kind, texts = checkpoint.configs["model_index"]["_class_name"], checkpoint.text_encoders
    parts: dict[str, Any] = {"unet": sampler.unet, "vae": vae}
    if len(texts) == 1:  # of Stable Diffusion 1 and 2: a checker of images, and what it looks at
        parts |= {"safety_checker": None, "feature_extractor": None}
    pipe = (
        getattr(diffusers, kind)
        .from_pretrained(
            checkpoint.path,
            variant=checkpoint.weights[texts[0]].variant,
            dtype=sampler.dtype,
            local_files_only=True,
            **parts,
        )
        .to(sampler.device)
    )
    pipe.set_progress_bar_config(disable=True)
    copies = published_copies()

    def make(numbers: NDArray[np.int64]) -> None:
        for number in numbers.tolist():
            latents = pipe(
                prompt=generator.task.classes[number % len(generator.task.classes)].described,
                negative_prompt=NEGATIVE_PROMPT,
                num_inference_steps=1,
                guidance_scale=0.0,
                height=generator.resolution,
                width=generator.resolution,
                output_type="latent",
            ).images
            # What the pipeline itself does under `force_upcast`, on every device.
            with torch.inference_mode():
                canvas = vae.decode(latents.float() / vae.config.scaling_factor).sample
            picture = pipe.image_processor.postprocess(canvas, output_type="pil")[0]
            copies(np.asarray(picture.resize((size, size), Image.Resampling.BICUBIC)))

    return make


def published_copies() -> Callable[[NDArray[np.uint8]], None]:
    """Makes the copies of one image, uint8 [H, W, 3], as the published PDA does."""
    os.environ["NO_ALBUMENTATIONS_UPDATE"] = "1"  # it asks the network for its newest version when imported
    import albumentations  # noqa: PLC0415

    pda = albumentations.Compose(
        [
            albumentations.HorizontalFlip(p=0.8),
            albumentations.VerticalFlip(p=0.8),
            albumentations.RandomBrightnessContrast(0.2, 0.2, p=0.5),
            albumentations.Rotate(60, p=0.8),
            albumentations.RandomGamma((80, 120), p=0.5),
        ]
    )

    def make(picture: NDArray[np.uint8]) -> None:
        for _ in range(COPIES):
            pda(image=picture)

    return make


def copies_one_by_one(copies: Callable[[NDArray[np.uint8]], None], images: Tensor, numbers: NDArray[np.int64]) -> None:
    for image in images:
        copies(image.permute(1, 2, 0).contiguous().numpy())


def copies_in_batches(classes: int, images: Tensor, numbers: NDArray[np.int64]) -> None:
    rounds, labels = np.divmod(numbers, classes)
    for number in range(COPIES):
        augment(images, np.stack([labels, rounds, np.full_like(rounds, number)], axis=1), 0, "paper")


def use_of_machine(generator: Generator, batch: int) -> dict[str, float]:
    """FLOP of the UNet per image, its FLOP/s alone, and those of a matrix product in the same dtype."""
    device, flop = generator.sampler.device, unet_flop(generator)
    seconds = fastest(unet_step(generator, batch), device)
    gemm = gemm_flops(device, generator.sampler.dtype)
    return {
        "unet_images_per_second": batch / seconds,
        "unet_flop": flop,
        "unet_flops": flop * batch / seconds,
        "gemm_flops": gemm,
        "unet_fraction_of_gemm_peak": flop * batch / seconds / gemm,
    }
