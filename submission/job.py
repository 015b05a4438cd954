"""The story, top to bottom: a task and a budget go in, a dataset file comes out before the deadline."""

import os
import threading
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from submission import checkpoint as checkpoints
from submission.augment import PdaStyle
from submission.budget import BatchSize, Budget, FinishCost, Scheduler, Shape
from submission.checkpoint import Checkpoint
from submission.contact_sheet import draw_contact_sheet
from submission.dataset_file import Recipe, write_dataset
from submission.errors import BudgetError, UsageError
from submission.generator import Generator, load_generator
from submission.manifest import Digests, machine, write_json, write_whole
from submission.progress import Log, Status
from submission.rounds import Spool
from submission.tasks import PromptStyle, Task

PROJECT = Path(__file__).resolve().parents[1]

# Until a file has been written, its cost is taken to be this, in seconds a file and a colour value: about twice what
# was measured on two CPU cores, so that a first round is not begun in vain.
GUESSED_FIXED, GUESSED_VALUE = 0.3, 5e-8
# Seconds the manifest may wait for the checkpoint's hashes, which were begun at the start.
HASH_PATIENCE = 0.5
# A change of the planned rounds by this share is worth a line in the log.
PLAN_CHANGE = 0.05


@dataclass(frozen=True)
class JobConfig:
    """What was asked for. `copies` an image at most, `cap` images a class at most, `resolution` in pixels;
    None stands for the checkpoint's own resolution, and for the batch size that measures best."""

    task: Task
    output: Path
    model: str
    resolution: int | None
    copies: int
    pda: PdaStyle
    prompts: PromptStyle
    cap: int
    seed: int
    batch_size: int | None
    dtype: str
    device: str

    @property
    def shape(self) -> Shape:
        return Shape(len(self.task.classes), 0 if self.pda == "none" else self.copies, self.cap)

    @property
    def dataset(self) -> Path:
        return self.output / f"{self.task.name}.pt"

    def recipe(self, rounds: int) -> Recipe:
        return Recipe(self.task, self.shape.ipc(rounds), self.pda, self.seed, getattr(torch, self.dtype))


@dataclass
class Production:
    """What generation leaves behind: the rounds that the file on disk holds, and the plans that were announced."""

    written: int = 0
    plans: list[dict[str, float]] = field(default_factory=list)


def run(config: JobConfig, budget: Budget, log: Log, stop: threading.Event) -> None:
    """Makes OUT/NAME.pt, .json and .png inside `budget`; setting `stop` ends generation early.

    Raises UsageError, BudgetError, CheckpointError or OutputError.
    """
    task = config.task
    log.timings["start and import"] = budget.elapsed
    device = choose_device(config.device)
    checkpoint = checkpoints.choose(config.model, cuda=device.type == "cuda", environment=os.environ, root=PROJECT)
    log.say(
        f"{task.title}: {len(task.classes)} classes at {task.size} px; model: {checkpoint.source}; device: {device}"
    )
    digests = Digests(checkpoint)
    with Spool(config.output / f".{task.name}.spool", len(task.classes), task.size) as spool:
        generator = load_generator(
            task, checkpoint, device, log, style=config.prompts, seed=config.seed, resolution=config.resolution
        )
        scheduler = start_scheduler(config, budget)
        production = generate(config, generator, spool, scheduler, log, stop)
        rounds = spool.count
        if rounds > production.written:
            with log.phase("write and verify"):
                write_dataset(config.dataset, spool.read(), config.recipe(rounds))
        with log.phase("sheet and manifest"):
            sheet = draw_contact_sheet(spool.read()[0], [c.name for c in task.classes])
            write_whole(config.dataset.with_suffix(".png"), sheet)
            manifest = describe(config, generator, checkpoint, digests, scheduler, rounds, production, log)
            write_json(config.dataset.with_suffix(".json"), manifest)
    log.say(
        f"{config.dataset}: {len(task.classes)} classes, IPC {config.shape.ipc(rounds)} ({rounds} generated, the rest "
        f"{config.pda} copies), {budget.left:.1f} s before the deadline"
    )


def choose_device(wanted: str) -> torch.device:
    """`auto` is the GPU where there is one. Raises UsageError where one is asked for and there is none."""
    available = torch.cuda.is_available()
    if wanted == "cuda" and not available:
        raise UsageError("--device cuda: PyTorch sees no CUDA device here; use --device cpu, or check the driver")
    return torch.device("cuda" if available and wanted != "cpu" else "cpu")


def start_scheduler(config: JobConfig, budget: Budget) -> Scheduler:
    """A scheduler that guesses what a file costs until one has been written."""
    guess = FinishCost(GUESSED_FIXED, GUESSED_VALUE * 3 * config.task.size**2)
    return Scheduler(budget, config.shape, guess, BatchSize(config.batch_size))


def generate(
    config: JobConfig, generator: Generator, spool: Spool, scheduler: Scheduler, log: Log, stop: threading.Event
) -> Production:
    """Adds rounds to the spool until the scheduler, asked again before every batch, says that it is time to write.

    A file is written after the first round and, as they multiply, at times that cost little: from early on a complete
    one is in place, and what the last one will cost is known. Raises BudgetError where not even one round fits.
    """
    classes, budget = scheduler.shape.classes, scheduler.budget
    pending = np.empty((0, *spool.shape[1:]), np.uint8)
    production = Production()
    while (size := scheduler.next_batch()) and not stop.is_set():
        began = budget.elapsed
        with log.phase("generate"):
            try:
                images = generator.images(scheduler.images, scheduler.images + size, log)
            except torch.OutOfMemoryError as error:
                if scheduler.batch.current == 1:
                    raise UsageError(
                        f"no memory for even one image at {generator.resolution} px: lower --resolution"
                    ) from error
                scheduler.batch.out_of_memory()
                log.warn(f"out of memory: batches of {scheduler.batch.current} from now on")
                continue
            pending = np.concatenate([pending, images.numpy()])
            while len(pending) >= classes:
                spool.append(pending[:classes])
                pending = pending[classes:]
        scheduler.observe(len(images), budget.elapsed - began)
        if scheduler.file_due(production.written):
            # The very first is slow (threads start, kernels are chosen) and small: written twice, the second counts.
            for _ in range(1 if production.written else 2):
                began = budget.elapsed
                with log.phase("write snapshots"):
                    write_dataset(config.dataset, spool.read(), config.recipe(spool.count))
            production.written = spool.count
            scheduler.cost = FinishCost(0.0, (budget.elapsed - began) / (classes * scheduler.shape.ipc(spool.count)))
        announce(scheduler, production, log)
    if spool.count == 0:
        raise BudgetError("stopped before the first round was done: there is nothing to write")
    return production


def announce(scheduler: Scheduler, production: Production, log: Log) -> None:
    """Shows progress, and says and keeps the plan whenever it is new or has changed noticeably."""
    plan, shape, pace = scheduler.plan(), scheduler.shape, 1 / scheduler.pace.mean
    planned = max(plan.rounds, 1)
    log.status(
        Status(
            rounds=scheduler.rounds,
            planned_rounds=planned,
            ipc=shape.ipc(scheduler.rounds),
            planned_ipc=shape.ipc(planned),
            images=scheduler.images,
            planned_images=planned * shape.classes,
            images_per_second=pace,
        )
    )
    if not production.written:
        return
    before = production.plans[-1]["rounds"] if production.plans else 0
    if abs(plan.rounds - before) > PLAN_CHANGE * before:
        production.plans.append(
            {
                "elapsed": round(scheduler.budget.elapsed, 2),
                "rounds": plan.rounds,
                "ipc": plan.ipc,
                "batch_size": scheduler.batch.current,
                "images_per_second": round(pace, 2),
                "generate_seconds": round(plan.generate, 2),
                "finish_seconds": round(plan.finish, 2),
            }
        )
        was = f" (was {before:.0f})" if before else ""
        log.say(
            f"plan: {plan.rounds} rounds{was}, IPC {plan.ipc}; {pace:,.1f} images/s in batches of "
            f"{scheduler.batch.current}; {plan.finish:.1f} s kept for writing"
        )


def describe(
    config: JobConfig,
    generator: Generator,
    checkpoint: Checkpoint,
    digests: Digests,
    scheduler: Scheduler,
    rounds: int,
    production: Production,
    log: Log,
) -> dict[str, object]:
    """The manifest: what was asked, what was done, how long it took, and every fallback on the way."""
    files = digests.wait(HASH_PATIENCE)
    if files is None:
        log.warn("the checkpoint's SHA-256 was not ready in time and is missing from the manifest")
    return {
        "task": config.task.name,
        "classes": len(config.task.classes),
        "size": config.task.size,
        "ipc": config.shape.ipc(rounds),
        "rounds": rounds,
        "copies_per_image": config.shape.copies,
        "pda": config.pda,
        "prompts": config.prompts,
        "seed": config.seed,
        "dtype": config.dtype,
        "budget_seconds": scheduler.budget.seconds,
        "elapsed_seconds": round(scheduler.budget.elapsed, 2),
        "phases_seconds": {name: round(seconds, 3) for name, seconds in log.timings.items()},
        "images_per_second": round(scheduler.images / log.timings["generate"], 2),
        "batch_size": scheduler.batch.current,
        "plans": production.plans,
        "resolution": generator.resolution,
        "unet_dtype": str(generator.sampler.dtype),
        "decoder": {"name": "vae", "dtype": str(generator.vae.dtype)},
        "checkpoint": {"source": checkpoint.source, "path": str(checkpoint.path), "sha256": files},
        "warnings": log.warnings,
        **machine(generator.sampler.device),
    }
