"""The story, top to bottom: a task and a budget go in, a dataset file comes out before the deadline."""

import hashlib
import json
import math
import os
import signal
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from submission import checkpoint as checkpoints
from submission.batch_size import BatchSize
from submission.budget import Budget, Scheduler
from submission.checkpoint import Checkpoint
from submission.crowding import Crowding
from submission.errors import BankoError, BudgetError, OutputError, UsageError
from submission.estimates import FileCost
from submission.finish import collect_snapshot, finish, start_snapshot, write_manifest
from submission.generator import load_generator
from submission.guard import Duties, Guard
from submission.manifest import Digests
from submission.output_folder import claimed, remove_unfinished, room
from submission.progress import Log, Status
from submission.rounds import Spool
from submission.work import JobConfig, Work

PROJECT = Path(__file__).resolve().parents[1]

# Until a file has been written, its cost is taken to be this: seconds a file, and seconds a colour value of a generated
# image and of a copy. About what was measured on two CPU cores.
GUESSED_FIXED, GUESSED_VALUE, GUESSED_COPY = 0.1, 1e-8, 2e-8
# The part of a disk's free space that the job may plan to fill.
USABLE_ROOM = 0.95
# The part of what is left of the budget that looking for a cheaper decoder may take.
DECODER_SHARE = 0.2
# A change of the planned rounds by this share is worth a line in the log, and so much of the budget lies between two.
PLAN_CHANGE, PLAN_SPACING = 0.1, 0.02


def run(config: JobConfig, budget: Budget, log: Log, guard: Guard) -> None:
    """Makes OUT/NAME.pt, .json and .png inside `budget`; `guard.stop` ends generation early.

    Raises UsageError, BudgetError, CheckpointError or OutputError. Does not return where the guard takes over.
    """
    task = config.task
    log.timings["start and import"] = budget.elapsed
    device = choose_device(config.device)
    checkpoint = checkpoints.choose(config.model, cuda=device.type == "cuda", environment=os.environ, root=PROJECT)
    log.say(
        f"{task.title}: {len(task.classes)} classes at {task.size} px; model: {checkpoint.source}; device: {device}"
    )
    with claimed(config.output), open_spool(config, checkpoint, log) as spool:
        digests = Digests(checkpoint)
        generator = load_generator(
            task,
            checkpoint,
            device,
            log,
            style=config.prompts,
            seed=config.seed,
            resolution=config.resolution,
            decoder=config.decoder,
            patience=DECODER_SHARE * budget.left,
        )
        scheduler = start_scheduler(config, budget, spool, log)
        work = Work(config, checkpoint, digests, generator, spool, scheduler, log, resumed=scheduler.images)
        guard.duties = duties(work, guard)
        if guard.stop.is_set():
            scheduler.hurry()
        try:
            generate(work, guard)
            guard.finishing.acquire()  # for good; in vain where the guard has it, which ends the process
            finish(work, stopped=guard.stop.is_set())
        finally:
            work.writer.abandon()


def choose_device(wanted: str) -> torch.device:
    """`auto` is the GPU where there is one. Raises UsageError where one is asked for and there is none."""
    available = torch.cuda.is_available()
    if wanted == "cuda" and not available:
        raise UsageError("--device cuda: PyTorch sees no CUDA device here; use --device cpu, or check the driver")
    return torch.device("cuda" if available and wanted != "cpu" else "cpu")


def open_spool(config: JobConfig, checkpoint: Checkpoint, log: Log) -> Spool:
    """The job's spool, empty or with the rounds of the run to resume; what a killed run left is cleared away and said.

    Raises UsageError where that run made its rounds of something else, and OutputError.
    """
    task = config.task
    if leftovers := remove_unfinished(config.output, task.name):
        log.say(f"{leftovers} unfinished files of an interrupted run removed")
    folder = config.output / f".{task.name}.spool"
    spool = Spool(folder, len(task.classes), task.size, identity(config, checkpoint), resume=config.resume)
    if config.resume:
        log.say(
            f"resumed: {spool.count} whole rounds of an interrupted run"
            if spool.count
            else f"nothing to resume in {folder}: starting anew"
        )
    elif spool.found:
        log.warn(f"{spool.found} rounds of an interrupted run removed; --resume would have gone on from them")
    return spool


def identity(config: JobConfig, checkpoint: Checkpoint) -> dict[str, str]:
    """What decides the images of a round, by the name of what a person would have to change."""
    task = config.task
    names = [c.name for c in task.classes]
    return {
        "checkpoint": checkpoints.fingerprint(checkpoint),
        "task": f"{task.name} ({len(task.classes)} classes at {task.size} px, {_digest(names)})",
        "seed": str(config.seed),
        "resolution": f"{config.resolution or checkpoint.resolution_for(task.size)} px",
        "decoder": config.decoder,
        "prompts": f"{config.prompts} ({_digest(task.prompts(config.prompts))})",
    }


def _digest(content: object) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:12]


def start_scheduler(config: JobConfig, budget: Budget, spool: Spool, log: Log) -> Scheduler:
    """A scheduler that guesses what a file costs until one has been written, with a cap that the disk has room for."""
    shape, values = config.shape, 3 * config.task.size**2
    # The spool, the file in place and the next one, which replaces it when it is whole.
    image_bytes = values * (1 + 2 * getattr(torch, config.dtype).itemsize)
    free = room(config.output) + spool.count * shape.classes * values
    fitting = int(USABLE_ROOM * free / (image_bytes * shape.classes))
    if fitting < 1:
        raise OutputError(
            f"no room in {config.output}: one image a class needs {image_bytes * shape.classes / 1e6:,.1f} MB there, "
            f"{free / 1e6:,.1f} MB are free"
        )
    if fitting < shape.cap:
        log.say(f"{config.output} has {free / 1e9:,.1f} GB free, room for IPC {fitting} of the {shape.cap} allowed")
    cost = FileCost(shape.classes, GUESSED_FIXED, GUESSED_VALUE * values, GUESSED_COPY * values)
    scheduler = Scheduler(budget, replace(shape, cap=min(shape.cap, fitting)), cost, BatchSize(config.batch_size))
    scheduler.images = min(spool.count, scheduler.shape.cap) * shape.classes
    return scheduler


def duties(work: Work, guard: Guard) -> Duties:
    """What the guard does where the main thread cannot."""
    scheduler, log = work.scheduler, work.log

    def hurry(number: signal.Signals) -> None:
        scheduler.hurry()
        log.warn(f"told to stop ({number.name}): finishing the file with {work.spool.count} rounds")

    def take_over() -> int:
        log.warn("generation does not come back: the file is finished without it")
        try:
            finish(work, stopped=guard.stop.is_set())
        except BankoError as error:
            log.close()
            print(f"error: {error}", file=sys.stderr)
            return error.exit_code
        return 0

    def code() -> int:
        return 0 if scheduler.in_place else BudgetError.exit_code

    def last_words() -> None:
        work.placing.acquire()  # for good: from here on neither file nor manifest changes but by what follows
        extent = scheduler.in_place
        if work.finished:
            return
        if extent is None:
            if not work.spool.count:
                work.spool.remove()
            log.close()
            print(f"error: {scheduler.too_small()}", file=sys.stderr)
            return
        log.warn(
            f"time is up: the last file is not done, the one in place stays (IPC {extent.ipc}, {extent.rounds} of "
            f"{work.spool.count} rounds)"
        )
        write_manifest(work)

    return Duties(scheduler.overdue, scheduler.late, code, hurry, take_over, last_words)


def generate(work: Work, guard: Guard) -> None:
    """Adds rounds to the spool until the scheduler, asked again before every batch, says that it is time to write.

    A file is written after the first round and larger ones as rounds multiply, beside generation: from early on a
    complete one is in place, and what the last one will cost is known. Raises BudgetError where not even one round
    fits.
    """
    scheduler, spool, generator, log = work.scheduler, work.spool, work.generator, work.log
    classes, budget = scheduler.shape.classes, scheduler.budget
    pending, crowding = np.empty((0, *spool.shape[1:]), np.uint8), Crowding()
    while not guard.stop.is_set() and (size := scheduler.next_batch()):
        began, expected = budget.elapsed, size * scheduler.pace.mean
        disturbed = work.writer.busy
        with log.phase("generate"):
            try:
                images = generator.images(scheduler.images, scheduler.images + size, log)
            except (RuntimeError, MemoryError) as error:
                if not _out_of_memory(error):
                    if not spool.count:
                        raise
                    log.warn(f"generation failed, the file is finished with {spool.count} rounds: {_first_line(error)}")
                    break
                if scheduler.batch.current == 1:
                    raise UsageError(
                        f"no memory for even one image at {generator.resolution} px: lower --resolution"
                    ) from error
                scheduler.batch.out_of_memory()
                if torch.cuda.is_available():
                    torch.cuda.empty_cache()
                log.warn(f"out of memory: batches of {scheduler.batch.current} from now on")
                continue
            pending = np.concatenate([pending, images.numpy()])
            while len(pending) >= classes:
                spool.append(pending[:classes])
                pending = pending[classes:]
        took = budget.elapsed - began
        if scheduler.observe(len(images), took, disturbed=disturbed):
            log.warn(f"a batch took {took:.1f} s where {expected:.1f} s were expected (a stopped process?): new plan")
        scheduler.cost.crowding = crowding.look(count=not disturbed)
        collect_snapshot(work)
        if not work.writer.busy and (extent := scheduler.snapshot()) is not None:
            start_snapshot(work, extent)
        announce(work)
    if spool.count == 0:
        raise BudgetError("stopped before the first round was done: there is nothing to write")


def _out_of_memory(error: Exception) -> bool:
    """Whether it is an allocator's error; the one for the CPU has no class of its own."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)


def announce(work: Work) -> None:
    """Shows progress, and says and keeps the plan when it is new and whenever it has changed noticeably."""
    scheduler, log = work.scheduler, work.log
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
    # Before the first file is in place, its cost is a guess.
    if scheduler.in_place is None:
        return
    before, said = (work.plans[-1]["rounds"], work.plans[-1]["elapsed"]) if work.plans else (0, -math.inf)
    due = scheduler.budget.elapsed - said > PLAN_SPACING * scheduler.budget.seconds
    if due and abs(plan.rounds - before) > PLAN_CHANGE * before:
        work.plans.append(
            {
                "elapsed": round(scheduler.budget.elapsed, 2),
                "rounds": plan.rounds,
                "ipc": plan.ipc,
                "batch_size": scheduler.batch.current,
                "images_per_second": round(pace, 2),
                "generate_seconds": round(plan.generate, 2),
                "finish_seconds": round(plan.finish, 2),
                "crowding": round(scheduler.cost.crowding, 2),
            }
        )
        was = f" (was {before:.0f})" if before else ""
        log.say(
            f"plan: {plan.rounds} rounds{was}, IPC {plan.ipc}; {pace:,.1f} images/s in batches of "
            f"{scheduler.batch.current}; {plan.finish:.1f} s kept for writing"
        )


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).partition("\n")[0]
