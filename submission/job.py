"""The story, top to bottom: a task and a budget go in, a dataset file comes out before the deadline."""

import hashlib
import json
import math
import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np
import torch

from submission import checkpoint as checkpoints
from submission.batch_size import BatchSize
from submission.budget import Budget, Scheduler, Shape
from submission.calibration import choose_decoder
from submission.checkpoint import Checkpoint
from submission.crew import Crew
from submission.crowding import Crowding
from submission.dataset_file import AbandonedError
from submission.device import choose_device, share_out
from submission.errors import BankoError, BudgetError, OutputError, UsageError
from submission.estimates import FileCost
from submission.finish import (
    REPORT_SHARE,
    collect_snapshot,
    finish,
    report_seconds,
    start_snapshot,
    write_manifest,
)
from submission.generator import load_generator
from submission.guard import Duties, Guard
from submission.manifest import Digests, job_of
from submission.needs import room_for_projections, shape_that_fits
from submission.output_folder import claimed, release, remove_unfinished
from submission.pipeline import choose_dtype, load_tiny
from submission.progress import Log, Status
from submission.ranks import Place
from submission.rounds import Spool, prepare_spool, remove_if_empty, share_of_rounds
from submission.tasks import builtin_names
from submission.work import JobConfig, Work

PROJECT = Path(__file__).resolve().parents[1]

# Until a file has been written, its cost is taken to be this: seconds a file, and seconds a colour value of a generated
# image and of a copy. About what was measured on two CPU cores.
GUESSED_FIXED, GUESSED_VALUE, GUESSED_COPY = 0.1, 1e-8, 2e-8
# A change of the planned rounds by this share is worth a line in the log, and so much of the budget lies between two.
PLAN_CHANGE, PLAN_SPACING = 0.1, 0.02
# So much of the budget lies between two points of the progress that the manifest tells of, which bounds its length.
PROGRESS_SPACING = 0.005
# Seconds between two looks of a rank that has made its share at how far the others are.
WAIT = 0.1


def run(config: JobConfig, place: Place, budget: Budget, log: Log, guard: Guard) -> None:
    """Makes OUT/NAME.pt, .json, .png and .html inside `budget`; `guard.stop` ends generation early.

    Of several ranks, each makes its share of the rounds, and one, the writer, the files.

    Raises UsageError, BudgetError, CheckpointError or OutputError. Does not return where the guard takes over.
    """
    task = config.task
    log.timings["start and import"] = budget.elapsed
    log.spans["start and import"] = (0.0, budget.elapsed)
    device = choose_device(config.device, place.local_rank)
    share_out(device, place, log)
    checkpoint = checkpoints.choose(config.model, cuda=device.type == "cuda", environment=os.environ, root=PROJECT)
    log.say(
        f"{task.title}: {len(task.classes)} classes at {task.size} px; model: {checkpoint.source}; device: {device}"
    )
    if checkpoint.path == checkpoints.EMBEDDED and task.name not in builtin_names():
        log.warn(
            f"the embedded model knows the classes of {' and '.join(builtin_names())} alone, and its pictures of "
            "others do not look like them: use SDXL-Turbo for a task of your own"
        )
    with open_spool(config, checkpoint, place, budget, log) as spool:
        dtype, shape = choose_dtype(device), shape_that_fits(config, spool, log)
        project_prompts = room_for_projections(config, checkpoint, device, dtype, place, log)
        crew = Crew(place, config.output, task.name, spool, log)
        crew.start()
        digests = Digests(checkpoint)
        if place.rank == 0:
            digests.begin()
        with lack_of_memory_said(config):
            generator = load_generator(
                task,
                checkpoint,
                device,
                log,
                style=config.prompts,
                seed=config.seed,
                resolution=config.resolution,
                dtype=dtype,
                project_prompts=project_prompts,
            )
            with log.phase("choose decoder"):
                tiny = load_tiny(checkpoint, device, generator.vae.dtype)
                generator.decoder = choose_decoder(
                    generator, config.decoder, tiny, left=budget.left, cap=shape.cap, log=log
                )
        scheduler = start_scheduler(config, shape, budget, spool)
        crew.follow(scheduler)
        numbers = share_of_rounds(scheduler.shape.cap, spool.before, place)
        scheduler.share = len(numbers)
        work = Work(config, checkpoint, digests, generator, spool, scheduler, log, crew, numbers)
        guard.duties = duties(work, guard)
        if guard.stop.is_set():
            scheduler.hurry()
        try:
            generate(work, guard)
            guard.finishing.acquire()  # for good; in vain where the guard has it, which ends the process
            conclude(work, guard)
        finally:
            crew.over.set()
            work.writer.abandon()


@contextmanager
def open_spool(config: JobConfig, checkpoint: Checkpoint, place: Place, budget: Budget, log: Log) -> Iterator[Spool]:
    """The spool, in an output folder that is this job's while the context lasts.

    Its first process makes it anew, or keeps the rounds of the run to resume; what a killed run left is cleared away
    and said. The others go by the first one's clock. Raises UsageError where that run made its rounds of something
    else, and OutputError.
    """
    task = config.task
    folder = config.output / f".{task.name}.spool"

    epoch = time.time() - budget.elapsed

    def prepare() -> None:
        manifest = config.dataset.with_suffix(".json")
        finished = not folder.exists() and job_of(manifest) == place.job
        if finished and manifest.stat().st_mtime > epoch:
            raise OutputError(f"{manifest} was finished by other processes of this job before this one came")
        if config.dataset.is_dir():
            raise OutputError(f"{config.dataset} is a folder: rename it, or choose another --output")
        if config.dataset.exists():
            log.say(f"{config.dataset} is there already, and is replaced once a round is done")
        if leftovers := remove_unfinished(config.output, task.name):
            log.say(f"{leftovers} unfinished files of an interrupted run removed")
        label = identity(config, checkpoint)
        found = prepare_spool(folder, len(task.classes), task.size, label, resume=config.resume)
        if config.resume and not found:
            log.say(f"nothing to resume in {folder}: starting anew")
        elif found and not config.resume:
            log.warn(f"{found} rounds of an interrupted run removed; --resume would have gone on from them")

    with claimed(config.output, place.job, epoch, prepare, partial(remove_if_empty, folder)) as began:
        if began is not None:
            budget.began(began)
        with Spool(folder, len(task.classes), task.size, place.rank) as spool:
            if len(spool.before):
                log.say(f"resumed: {len(spool.before)} whole rounds of an interrupted run")
            yield spool


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


@contextmanager
def lack_of_memory_said(config: JobConfig) -> Iterator[None]:
    """Raises UsageError where the model does not fit into memory."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not _out_of_memory(error):
            raise
        wish = f" at {config.resolution} px" if config.resolution else ""
        raise UsageError(f"no memory for the model and its first images{wish}: lower --resolution") from error


def start_scheduler(config: JobConfig, shape: Shape, budget: Budget, spool: Spool) -> Scheduler:
    """A scheduler that guesses what a file costs until one has been written."""
    values = 3 * config.task.size**2
    cost = FileCost(shape.classes, GUESSED_FIXED, GUESSED_VALUE * values, GUESSED_COPY * values)
    scheduler = Scheduler(budget, shape, cost, BatchSize(config.batch_size))
    scheduler.elsewhere = len(spool.before)
    if (seconds := report_seconds(shape.classes)) <= REPORT_SHARE * budget.seconds:
        scheduler.afterwards = seconds
    return scheduler


def duties(work: Work, guard: Guard) -> Duties:
    """What the guard does where the main thread cannot."""
    scheduler, log, crew = work.scheduler, work.log, work.crew

    def overdue() -> bool:
        return scheduler.overdue() if crew.writing else crew.over.is_set()

    def hurry(number: signal.Signals) -> None:
        scheduler.hurry()
        if crew.writing and not work.finished:
            log.warn(f"told to stop ({number.name}): finishing the file with {scheduler.rounds} rounds")

    def take_over() -> int:
        if crew.writing:
            log.warn("generation does not come back: the file is finished without it")
        try:
            conclude(work, guard)
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
        if work.finished or not crew.writing:
            return
        if extent is None:
            if not work.spool.count:
                work.spool.remove()
                release(work.config.output)
            log.close()
            print(f"error: {scheduler.too_small()}", file=sys.stderr)
            return
        log.warn(
            f"time is up: the last file is not done, the one in place stays (IPC {extent.ipc}, {extent.rounds} of "
            f"{work.spool.count} rounds)"
        )
        write_manifest(work)

    return Duties(overdue, scheduler.late, code, hurry, take_over, last_words)


def generate(work: Work, guard: Guard) -> None:
    """Adds rounds to the spool until the scheduler, asked again before every batch, says that it is time to write.

    A file is written after the first round and larger ones as rounds multiply, beside generation: from early on a
    complete one is in place, and what the last one will cost is known. A rank that has made its share stays while
    others have not: it may have to go on in the writer's place. Raises BudgetError where not even one round fits.
    """
    scheduler, spool, generator, log = work.scheduler, work.spool, work.generator, work.log
    classes, budget = scheduler.shape.classes, scheduler.budget
    current, crowding = np.empty(spool.shape, np.uint8), Crowding()
    on_cpu = generator.sampler.device.type == "cpu"
    while not guard.stop.is_set() and not work.crew.over.is_set():
        note_progress(work)
        size = scheduler.next_batch()
        work.crew.done = not size
        if not size:
            if work.crew.writing and not (work.crew.at_work and scheduler.can_wait()):
                break
            time.sleep(WAIT)
            keep_up(work)
            continue
        began, expected = budget.elapsed, size * scheduler.pace.mean
        disturbed = work.writer.busy
        with log.phase("generate"):
            try:
                places = np.arange(scheduler.images, scheduler.images + size)
                images = generator.images(work.numbers[places // classes] * classes + places % classes, log)
            except (RuntimeError, MemoryError) as error:
                if not _out_of_memory(error):
                    if not scheduler.rounds:
                        raise
                    log.warn(
                        f"generation failed, the file is finished with {scheduler.rounds} rounds: {_first_line(error)}"
                    )
                    scheduler.share = 0
                    continue
                if scheduler.batch.current == 1:
                    raise UsageError(
                        f"no memory for even one image at {generator.resolution} px: lower --resolution"
                    ) from error
                scheduler.batch.out_of_memory()
                if torch.cuda.is_available():
                    torch.cuda.empty_cache()
                log.warn(f"out of memory: batches of {scheduler.batch.current} from now on")
                continue
            for place, image in zip(places.tolist(), images.numpy(), strict=True):
                current[place % classes] = image
                if place % classes == classes - 1:
                    spool.append(current, int(work.numbers[place // classes]))
        took = budget.elapsed - began
        if on_cpu and not work.memory.allows_more():
            scheduler.batch.limit = scheduler.batch.current
        if scheduler.observe(len(images), took, disturbed=disturbed):
            log.warn(f"a batch took {took:.1f} s where {expected:.1f} s were expected (a stopped process?): new plan")
        scheduler.cost.crowding = crowding.look(count=not disturbed)
        keep_up(work)
    if scheduler.rounds == 0 and not work.crew.over.is_set():
        raise BudgetError("stopped before the first round was done: there is nothing to write")


def note_progress(work: Work) -> None:
    """Keeps how far generation is, unless that was kept a moment ago."""
    scheduler, elapsed = work.scheduler, work.scheduler.budget.elapsed
    if not work.progress or elapsed - work.progress[-1][0] >= PROGRESS_SPACING * scheduler.budget.seconds:
        work.progress.append((round(elapsed, 3), scheduler.total_images, scheduler.batch.current))


def keep_up(work: Work) -> None:
    """What the writer does between batches: snapshots as they are due, and a word on how it goes."""
    if work.crew.writing:
        collect_snapshot(work)
        if not work.writer.busy and (extent := work.scheduler.snapshot()) is not None:
            start_snapshot(work, extent)
        announce(work)


def conclude(work: Work, guard: Guard) -> None:
    """The end of a rank: the writer finishes the file; another stands by until that is done, or becomes the writer.

    Raises BudgetError or OutputError.
    """
    work.crew.done = True
    while not work.crew.over.is_set():
        if not work.crew.writing:
            time.sleep(WAIT)
            continue
        try:
            finish(work, stopped=guard.stop.is_set())
            return
        except (AbandonedError, OutputError) as error:
            if isinstance(error, OutputError) and not work.crew.replaced():
                raise
    if not work.config.dataset.exists():
        raise OutputError(f"{work.config.output} was removed while the job ran")


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
            images=scheduler.total_images,
            planned_images=planned * shape.classes,
            images_per_second=pace * scheduler.ranks,
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
                "images_per_second": round(scheduler.ranks * pace, 2),
                "generate_seconds": round(plan.generate, 2),
                "finish_seconds": round(plan.finish, 2),
                "crowding": round(scheduler.cost.crowding, 2),
            }
        )
        was = f" (was {before:.0f})" if before else ""
        log.say(
            f"plan: {plan.rounds} rounds{was}, IPC {plan.ipc}; {scheduler.ranks * pace:,.1f} images/s in batches of "
            f"{scheduler.batch.current}; {plan.finish:.1f} s kept for writing"
        )


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).partition("\n")[0]
