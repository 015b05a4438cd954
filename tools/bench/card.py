"""A new card: what the UNet and each decoder reach on it, and what ten minutes of the job would give.

With a checkpoint's weights, or with random ones from `./run.sh make-checkpoint`, which take as long. All of it is taken
on the device that the job would choose; the time to the first image is that of a job of its own.
"""

import argparse
import sys
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from submission.arguments import add_device, number_from, parse_seconds
from submission.errors import UsageError, first_line
from submission.log import Log
from submission.machine.device import choose_device
from submission.machine.memory import peak_memory
from submission.model import pipeline
from submission.model.calibration import SAMPLES, draw, gather, worth
from submission.model.choice import ModelRequest, choose
from submission.model.decoder import canvases, decode, full_decoder, ladder, psnr
from submission.model.generator import Generator, load_generator
from submission.model.image_spec import ImageSpec
from submission.model.sampler import at_resolution
from submission.plan.budget import Budget, start_budget
from submission.tasks import builtin_names, load_task
from tools.bench.jobs import run_job
from tools.bench.timing import fastest, gemm_flops, unet_flop, unet_step

# A larger batch is tried where the last one was faster by this factor, up to so many images.
BATCH_GAIN, LARGEST_BATCH = 1.02, 1024
# Trials of each timing, and images decoded at a time.
TRIALS, DECODED = 3, 64
# Parts of the limit that compilation and a decoder's samples may take, and seconds of it kept for a job of its own.
COMPILING_SHARE, SAMPLING_SHARE, JOB_LIMIT = 0.5, 0.1, 60.0
# The budget that images per class are worked out for, and seconds of it that the job keeps for file and report.
BUDGET, KEPT = 600.0, 15.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--task", default="cifar100", help="whose prompts, and size of images")
    add("--model", default="auto", help="a checkpoint, named as for the job; random weights do")
    add("--resolution", type=number_from(1), nargs="+", metavar="PX", help="canvases (default: its own, half of it)")
    add("--limit", default="6m", metavar="TIME", help="what would exceed it is left out")
    add_device(parser)


def measure(options: argparse.Namespace) -> dict[str, object]:
    """Rates in images/s by resolution, fidelities in dB, seconds, FLOP/s, bytes, and images per class of ten minutes.

    Raises a BankoError where the job would.
    """
    limit = parse_seconds(options.limit, "--limit")
    budget = start_budget(limit)
    log = Log("kept", budget)
    task, device = load_task(options.task), choose_device(options.device)
    checkpoint = choose(ModelRequest(options.model), cuda=device.type == "cuda")
    first_image = time_to_first_image(options) if budget.left > 2 * JOB_LIMIT else None
    own = checkpoint.resolution_for(task.size)
    resolutions = options.resolution or ([own, own // 2] if own >= 256 else [own])
    generator = load_generator(ImageSpec(task, resolution=resolutions[0]), checkpoint, device, log)
    tiny = pipeline.load_tiny(checkpoint, device, generator.vae.dtype)
    gemm = gemm_flops(device, generator.sampler.dtype)
    rows = []
    for resolution in resolutions:
        sampler = at_resolution(generator.sampler, checkpoint, resolution)
        at = replace(generator, sampler=sampler)
        rows.append(measure_resolution(at, tiny, gemm, budget, log))
    for row in rows:
        if budget.left > (1 - COMPILING_SHARE) * limit:
            sampler = at_resolution(generator.sampler, checkpoint, row["resolution"])
            row.update(measure_compiled(replace(generator, sampler=sampler), row, gemm))
        row["ten_minutes"] = ten_minutes(row, first_image or KEPT)
    cuda = device.type == "cuda"
    return {
        "card": torch.cuda.get_device_name(device) if cuda else f"{device.type}, {torch.get_num_threads()} threads",
        "torch": torch.__version__,
        "model": checkpoint.source,
        "dtype": str(generator.sampler.dtype).removeprefix("torch."),
        "gemm_flops": gemm,
        "first_image_seconds": first_image,
        "resolutions": rows,
        "peak_memory_bytes": torch.cuda.max_memory_allocated(device) if cuda else peak_memory(),
        "took_seconds": budget.elapsed,
    }


def time_to_first_image(options: argparse.Namespace) -> float | None:
    """Seconds from the start of a job on one device to its first image; None where there is none in `JOB_LIMIT`.

    Raises InputFileError where the job fails.
    """
    of_job = ["--budget", f"{JOB_LIMIT:g}s", "--model", options.model, "--device", options.device, "--devices", "1"]
    manifest = run_job(options.task, of_job)
    return None if manifest is None else float(manifest["first_image_seconds"])


def measure_resolution(generator: Generator, tiny: Any | None, gemm: float, budget: Budget, log: Log) -> dict[str, Any]:
    """What the UNet makes in batches that double while that pays and there is time, and what each rung keeps and makes.

    Raises UsageError where not even one image fits into memory.
    """
    rates: dict[int, float] = {}
    batch, flop = 1, unet_flop(generator)
    while batch <= LARGEST_BATCH:
        step = unet_step(generator, batch)
        try:
            step()
            rates[batch] = batch / fastest(step, generator.sampler.device, TRIALS)
        except torch.OutOfMemoryError as error:
            if not rates:
                raise UsageError(f"no memory for even one image at {generator.resolution} px") from error
            torch.cuda.empty_cache()
            break
        slower = batch > 1 and rates[batch] < BATCH_GAIN * rates[batch // 2]
        if slower or 2 * TRIALS * 2 * batch / rates[batch] > SAMPLING_SHARE * budget.left:
            break
        batch *= 2
    best = max(rates, key=lambda size: rates[size])
    return {
        "resolution": generator.resolution,
        "unet_flop": flop,
        "unet_images_per_second": rates,
        "batch_size": best,
        "unet_fraction_of_gemm": rates[best] * flop / gemm,
        "decoders": measure_decoders(generator, tiny, budget.seconds, log),
    }


def measure_decoders(
    generator: Generator, tiny: Any | None, limit: float, log: Log
) -> dict[str, dict[str, float | None]]:
    """Images/s and dB of each rung, the VAE's dB being infinite. Rungs are fitted to as many images as there is time
    for, or left out."""
    full = full_decoder(generator.vae, generator.task.size)
    generator = replace(generator, decoder=full)
    drawing = draw(generator, log)
    samples = [next(drawing), next(drawing)]
    each = samples[1].sampling + samples[1].decoding
    fitted, held_out = next((n for n in SAMPLES if sum(n) * each <= SAMPLING_SHARE * limit), (0, 0))
    latents, pixels = gather(samples, drawing, fitted + held_out)
    found = [full, *(ladder("auto", tiny, latents[:fitted], pixels[:fitted]) if fitted else ())]
    many = latents.repeat(-(-DECODED // len(latents)), 1, 1, 1)[:DECODED] if fitted else latents
    figures = {}
    for rung in found:
        decibels = psnr(canvases(rung, latents[fitted:]), pixels[fitted:]) if rung is not full else None
        rate = len(many) / fastest(lambda rung=rung: decode(rung, many), latents.device, TRIALS)  # type: ignore[misc]
        figures[rung.rung] = {"images_per_second": rate, "decibels": decibels, "fitted_to": fitted}
    return figures


def measure_compiled(generator: Generator, row: Mapping[str, Any], gemm: float) -> dict[str, Any]:
    """What compiling the UNet, and the VAE's decoder, costs in seconds and comes to; nothing where it fails."""
    device, batch = generator.sampler.device, row["batch_size"]
    step = unet_step(generator, batch)
    full = full_decoder(generator.vae, generator.task.size)
    latents = torch.randn(DECODED, 4, *step().shape[2:]).to(device)
    try:
        pipeline.compile_blocks(generator.sampler.unet)
        took = fastest(step, device, 1)
        rate = batch / fastest(step, device, TRIALS)
        pipeline.compile_vae(generator.vae)
        decoder_took = fastest(lambda: decode(full, latents), device, 1)
        decoder_rate = len(latents) / fastest(lambda: decode(full, latents), device, TRIALS)
    except Exception as error:  # noqa: BLE001  of many classes: the compiler's, and of what tunes kernels
        print(f"warning: torch cannot compile here ({first_line(error)})", file=sys.stderr)
        return {}
    finally:
        pipeline.undo_compilation(generator.sampler.unet)
        pipeline.undo_compilation(generator.vae)
    return {
        "compiled_unet_images_per_second": rate,
        "compiled_unet_fraction_of_gemm": rate * row["unet_flop"] / gemm,
        "compiling_unet_seconds": took,
        "compiled_vae_images_per_second": decoder_rate,
        "compiling_vae_seconds": decoder_took,
    }


def ten_minutes(row: Mapping[str, Any], first_image: float) -> dict[str, Any]:
    """The rung that is worth most, images/s with it, and the images per class of both tasks."""
    unet = max(*row["unet_images_per_second"].values(), row.get("compiled_unet_images_per_second", 0.0))
    seconds = BUDGET - KEPT - first_image - row.get("compiling_unet_seconds", 0.0)
    found = {}
    for name, figures in row["decoders"].items():
        rate = 1 / (1 / unet + 1 / figures["images_per_second"])
        decibels = figures["decibels"]
        found[name] = (worth(seconds * rate / 100, 500, np.inf if decibels is None else decibels), rate)
    best = max(found, key=lambda name: found[name])
    tasks = [load_task(name) for name in builtin_names()]
    return {
        "decoder": best,
        "images_per_second": found[best][1],
        "ipc": {task.name: min(task.max_ipc, int(seconds * found[best][1] / len(task.classes))) for task in tasks},
    }


def table(figures: dict[str, Any]) -> str:
    """Figures for a person, and a line for the table in docs/gpu.md."""
    gemm, first = figures["gemm_flops"], figures["first_image_seconds"]
    lines = [
        f"{figures['card']}, torch {figures['torch']}, {figures['model']}",
        f"matrix product in {figures['dtype']}: {gemm / 1e12:,.3g} TFLOP/s",
        f"{'':<36}{'images/s':>10}{'of the product':>16}",
    ]

    def add(what: str, rate: float, share: float | None = None, note: str = "") -> None:
        lines.append(f"{what:<36}{rate:>10.4g}{'' if share is None else f'{share:.0%}':>16}   {note}".rstrip())

    for row in figures["resolutions"]:
        px = f"{row['resolution']} px"
        for batch, rate in row["unet_images_per_second"].items():
            add(f"{px}, UNet, batches of {batch}", rate, rate * row["unet_flop"] / gemm)
        if (rate := row.get("compiled_unet_images_per_second")) is not None:
            took = f"compiled in {row['compiling_unet_seconds']:.0f} s"
            add(f"{px}, UNet, compiled", rate, row["compiled_unet_fraction_of_gemm"], took)
        for name, rung in row["decoders"].items():
            kept = rung["decibels"] and f"{rung['decibels']:.1f} dB, fitted to {rung['fitted_to']} images"
            add(f"{px}, decoder {name}", rung["images_per_second"], None, kept or "")
        if (rate := row.get("compiled_vae_images_per_second")) is not None:
            add(f"{px}, decoder vae, compiled", rate, None, f"compiled in {row['compiling_vae_seconds']:.0f} s")
        plan = row["ten_minutes"]
        ipc = ", ".join(f"{name} {count}" for name, count in plan["ipc"].items())
        add(f"{px}, ten minutes by {plan['decoder']}", plan["images_per_second"], None, f"images per class: {ipc}")
    lines.append(f"first image after {'?' if first is None else f'{first:.1f}'} s of a job of its own")
    lines.append(f"peak memory {figures['peak_memory_bytes'] / 1e9:.1f} GB; took {figures['took_seconds']:.0f} s")
    lines.append(table_row(figures))
    return "\n".join(lines)


def table_row(figures: Mapping[str, Any]) -> str:
    """A line for the table of cards."""
    rows, first = figures["resolutions"], figures["first_image_seconds"]
    shares = [row.get("compiled_unet_fraction_of_gemm", row["unet_fraction_of_gemm"]) for row in rows]
    cells = [
        figures["card"],
        figures["torch"],
        f"{figures['gemm_flops'] / 1e12:,.3g}",
        ", ".join(str(row["resolution"]) for row in rows),
        ", ".join(f"{row['ten_minutes']['images_per_second']:,.4g}" for row in rows),
        ", ".join(f"{share:.0%}" for share in shares),
        "?" if first is None else f"{first:.1f} s",
        *(", ".join(str(row["ten_minutes"]["ipc"][name]) for row in rows) for name in builtin_names()),
    ]
    return f"| {' | '.join(cells)} |"
