"""The story, top to bottom: a task and a budget go in, a dataset file comes out before the deadline."""

import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch

from submission.dataset.dataset_file import write_dataset
from submission.dataset.image_queue import ImageQueue
from submission.dataset.rounds import Chosen, Rounds, Spool, prepare_spool, remove_if_empty
from submission.distillation import sharpening
from submission.distillation.selection import Selector
from submission.engine import Engine, Load
from submission.engine.alone import Alone
from submission.engine.fleet import Fleet
from submission.engine.maker import Loading, load_elsewhere, load_maker
from submission.errors import OutputError
from submission.job.checks import file_in_place
from submission.job.ending import REPORT_SHARE, Ending, idle_time, report_seconds
from submission.job.files import Choice, JobFiles, check_place, composition_that_fits
from submission.job.generate import Generation
from submission.job.history import History
from submission.log import Log
from submission.machine.device import choose_devices, unseen_gpu
from submission.machine.disk import claimed, goes_with_the_container, offer_temporary, remove_unfinished
from submission.machine.memory import peak_memory
from submission.model.checkpoint import EMBEDDED, Checkpoint, fingerprint
from submission.model.choice import choose
from submission.plan.budget import Budget
from submission.plan.estimates import Composition, Extent, FileCost
from submission.plan.file_plan import FilePlan
from submission.plan.guard import HUB_IS_LATE, Guard
from submission.plan.planner import Planner
from submission.report.manifest import Digests, machine
from submission.request import DeviceRequest, JobRequest

# Until a file has been written, its cost is taken to be this: seconds per file, and seconds per colour value of a
# generated image and of a copy. About what was measured on two CPU cores.
GUESSED_FIXED, GUESSED_VALUE, GUESSED_COPY = 0.1, 1e-8, 2e-8
# Seconds that ending other processes may take where this one is about to go.
EXIT_PATIENCE = 0.1
# Images are sharpened on a GPU, where that takes no more than this share of the time left once the model is there, and
# up to so many per class: whether it helps larger sets was not measured. On a CPU, one step for ten images of each of
# 100 classes took 36 seconds on two busy cores.
SHARPENING_SHARE, MOST_SHARPENED = 0.4, 10

Prepare = Callable[[JobRequest, Checkpoint, Engine, Spool], Load]


def run(request: JobRequest, budget: Budget, log: Log, guard: Guard, prepare: Prepare | None = None) -> Extent:
    """Makes OUT/NAME.pt, .json, .png and .html inside `budget`, and returns what is in the file; `guard.stop` ends
    generation early.

    `prepare` says what a device does to get ready, `loader` if None. Raises UsageError, BudgetError, CheckpointError or
    OutputError. Does not return where the guard takes over, unless other tasks follow.
    """
    log.add_phase("start and import", 0.0)
    with open_engine(request.devices, log, guard) as engine:
        with guard.awaiting(HUB_IS_LATE):
            checkpoint = choose(request.model, cuda=engine.placement.kind == "cuda")
        say_what_is_made(request, checkpoint, engine, log)
        with open_spool(request, checkpoint, log) as spool:
            offer_temporary(spool.folder)
            composition = composition_that_fits(request, spool, log)
            # Once: a checkpoint may be gone by the time of the last manifest.
            asked, digests, history = request.facts(checkpoint), Digests(checkpoint), History()
            engine.load((prepare or loader)(request, checkpoint, engine, spool), lambda: budget.left)
            if not engine.alone:
                try_writing(request)
            queue = ImageQueue(spool, composition.most_rounds)
            selector = None
            if composition.pool:
                selector = Selector(request.image.task, torch.device(engine.placement.kind if engine.alone else "cpu"))
            file_plan = plan_files(request, composition, budget, engine.seconds_to_close, selector, log)
            file_plan.grew(spool.count)
            planner = Planner(file_plan, before=sum(number in spool for number in range(composition.most_rounds)))

            def manifest_of(extent: Extent) -> dict[str, object]:
                made, seconds = planner.facts(), max(log.timings.get("generate", 0.0), 1e-9)
                made["images_per_second"] = round(planner.images / seconds, 2)
                made["peak_memory_bytes"] = max(made["peak_memory_bytes"], peak_memory())
                return {
                    **asked,
                    "ipc": extent.ipc,
                    "rounds": extent.rounds,
                    "pool": files.chosen.pool if files.chosen else None,
                    "sharpening_steps": files.chosen.steps if files.chosen else None,
                    "resumed_rounds": spool.before,
                    "tasks": request.tasks,
                    **made,
                    **log.facts(),
                    **digests.facts(),
                    **machine(),
                    "idle_time": idle_time(planner, checkpoint.sampling, request.composition),
                    **history.facts(),  # the longest, last
                }

            files = JobFiles(request, spool, file_plan, manifest_of, log)
            if spool.before and (extent := file_in_place(request, checkpoint)):
                files.adopt(extent)
            ending = Ending(request, checkpoint.sampling, engine, planner, files, digests, log)
            guard.serve(ending)
            try:
                generation = Generation(request.devices, engine, planner, queue, files, history, log)
                generation.run(guard.stop)
                if selector and file_plan.rounds > composition.cap:
                    # What was measured beside all that goes on at the start: now it tells how many more rounds fit.
                    file_plan.choosing_takes(composition.classes * selector.seconds_per_image())
                    generation.run(guard.stop)
                    choose_images(selector, files, guard.stop, log)
                # Whoever holds this lock writes the last file. If the guard does, this waits until the process ends or,
                # where other tasks follow, until the guard is done.
                guard.last_file_lock.acquire()
                if not ending.complete:
                    ending.conclude()
            finally:
                files.abandon()
            assert file_plan.in_place
            return file_plan.in_place


def choose_images(selector: Selector, files: JobFiles, stop: threading.Event, log: Log) -> None:
    """Has the last file's images chosen from the rounds there are, as far as time allows. Raises OutputError."""
    plan, pool = files.plan, files.spool.read()
    classes, cap = plan.composition.classes, plan.composition.cap
    if len(pool) <= cap:
        return

    def seconds_left() -> float:
        files.keep_up()
        return 0.0 if stop.is_set() else plan.spare

    with log.phase("choose images"):
        pace = plan.choosing / classes
        numbers, looked_at = selector.choose(pool, cap, pace, lambda: seconds_left() - plan.sharpening)
    chosen = looked_at > cap
    if not chosen.any():
        return
    seen = int(looked_at[chosen].min())
    choice = Choice(Chosen(pool, numbers), seen)
    files.take(choice)
    log.say(f"IPC {cap} chosen from {seen} rounds" + f", all there was time for of {len(pool)}" * (seen < len(pool)))
    if others := classes - np.count_nonzero(chosen):
        log.warn(f"no time to choose images of {others} of {classes} classes: they have those made first")
    if plan.sharpening:
        with log.phase("sharpen images"):
            sharpen_images(selector, choice, pool, files, lambda: seconds_left() > 0, log)


def sharpen_images(
    selector: Selector, choice: Choice, pool: Rounds, files: JobFiles, go_on: Callable[[], bool], log: Log
) -> None:
    """Has the last file's images moved, as far as time allows, from those chosen."""
    places, labels = np.divmod(np.arange(len(choice.images) * pool.shape[0]), pool.shape[0])
    images = choice.images[places, labels].reshape(len(choice.images), *pool.shape)
    try:
        moved, steps = sharpening.sharpen(selector.task, selector.device, images, pool, go_on)
    except torch.OutOfMemoryError:
        log.warn("the GPU has too little memory to sharpen images: they stay as they are chosen")
        return
    if steps:
        files.take(replace(choice, moved=moved, steps=steps))
        log.say(f"sharpened in {steps} of {sharpening.STEPS} steps")


@contextmanager
def open_engine(wanted: DeviceRequest, log: Log, guard: Guard) -> Iterator[Engine]:
    """What was asked for: a device in this process, or several through Ray. Raises UsageError."""
    engine: Engine
    if wanted.cluster is not None:
        engine = Fleet(wanted.kind, wanted.count, wanted.cluster, log)
    else:
        kind, count = choose_devices(wanted.kind, wanted.count)
        if wanted.kind == "auto" and (why := unseen_gpu()):
            log.warn(f"an NVIDIA driver is installed, and PyTorch sees no CUDA device ({why}): the CPU is used")
        engine = Fleet(kind, count, None, log) if count > 1 else Alone(kind, log)
    guard.before_exit(partial(engine.close, patience=EXIT_PATIENCE))
    try:
        yield engine
    finally:
        engine.close()


def say_what_is_made(request: JobRequest, checkpoint: Checkpoint, engine: Engine, log: Log) -> None:
    task, kind = request.image.task, engine.placement.kind
    devices = kind if engine.alone else f"{engine.count} x {kind}"
    log.say(
        f"{task.title}: {len(task.classes)} classes at {task.size} px; model: {checkpoint.source}; device: {devices}"
    )
    known = checkpoint.classes
    unknown = [one.name for one in task.classes if known is not None and one.name not in known]
    if unknown:
        log.warn(
            f"this model was not trained for {len(unknown)} of the {len(task.classes)} classes, such as "
            f"{unknown[0]!r}, and its pictures of them do not look like them: use SDXL-Turbo, or train one (./run.sh "
            "train)"
        )


@contextmanager
def open_spool(request: JobRequest, checkpoint: Checkpoint, log: Log) -> Iterator[Spool]:
    """The spool, in an output folder that is this job's while the context lasts: a new one, or with the rounds of the
    run to resume. What a killed run left is cleared away and said.

    Raises UsageError where that run made its rounds of something else, and OutputError.
    """
    task, folder = request.image.task, request.spool
    with claimed(request.output) as locked:
        if not locked:
            log.warn(f"{request.output} is on a disk without locks: see that no other job writes there")
        try:
            if goes_with_the_container(request.output):
                place = request.output.absolute()
                log.warn(
                    f'nothing is mounted at {place}, and the files go with the container: docker run -v "$PWD/outputs:'
                    f'{place}" keeps them'
                )
            check_place(request)
            if request.dataset.exists():
                there_is = "a larger one can be written" if request.resume else "a round is done"
                log.say(f"{request.dataset} is there already, and is replaced once {there_is}")
            if leftovers := remove_unfinished(request.output, task.name):
                log.say(f"{leftovers} unfinished files of an interrupted run removed")
            label = request.image.identity(checkpoint)
            found = prepare_spool(folder, len(task.classes), task.size, label, resume=request.resume)
            if request.resume and not found:
                log.say(f"nothing to resume in {folder}: starting anew")
            elif found and not request.resume:
                log.warn(f"{found} rounds of an interrupted run removed; --resume would have gone on from them")
            with Spool(folder, len(task.classes), task.size) as spool:
                if spool.before:
                    log.say(f"resumed: {spool.before} whole rounds of an interrupted run")
                yield spool
        finally:
            remove_if_empty(folder)


def loader(request: JobRequest, checkpoint: Checkpoint, engine: Engine, spool: Spool) -> Load:
    """What a device does to get ready, in its own process; a run that is resumed has chosen its decoder."""
    loading = Loading(
        request.image,
        request.composition.cap,
        checkpoint,
        fingerprint(checkpoint),
        checkpoint.path == EMBEDDED,
        engine.placement,
        decoder=spool.decoder,
        network=spool.network,
    )
    return partial(load_maker if engine.alone else load_elsewhere, loading)


def try_writing(request: JobRequest) -> None:
    """Writes a file of noise and throws it away, while devices load: the first use of some libraries takes a second,
    which would otherwise pass for the cost of a file. With one device, loading it has used them."""
    classes, size = len(request.image.task.classes), request.image.task.size
    noise = np.random.default_rng(0).integers(0, 256, (1, classes, 3, size, size), dtype=np.uint8)
    with suppress(OSError, OutputError), tempfile.TemporaryDirectory(dir=request.output) as folder:
        write_dataset(Path(folder) / "noise.pt", noise, request.file_spec(Extent(1, 1)), all_cores=False)


def plan_files(
    request: JobRequest, composition: Composition, budget: Budget, to_close: float, selector: Selector | None, log: Log
) -> FilePlan:
    """A plan that guesses what a file costs until one has been written. After the last one it takes so many seconds
    `to_close` the engine, and time for the report, where that is a small part of the budget."""
    values = 3 * request.image.task.size**2
    cost = FileCost(composition.classes, GUESSED_FIXED, GUESSED_VALUE * values, GUESSED_COPY * values)
    seconds = report_seconds(composition.classes)
    afterwards = to_close + (seconds if seconds <= REPORT_SHARE * budget.seconds else 0)
    if selector is None:
        return FilePlan(budget, composition, cost, afterwards)
    choosing = composition.classes * selector.seconds_per_image()
    sharpen = plan_sharpening(selector, composition, budget, log)
    return FilePlan(budget, composition, cost, afterwards, choosing, sharpen)


def plan_sharpening(selector: Selector, composition: Composition, budget: Budget, log: Log) -> float:
    """Seconds to keep for sharpening: 0 where images are to stay as they are chosen, which is said where a GPU might
    have sharpened them."""
    if composition.cap > MOST_SHARPENED or selector.device.type != "cuda":
        return 0.0
    try:
        seconds = sharpening.seconds(selector.task, selector.device, composition.cap)
    except torch.OutOfMemoryError:
        log.warn("the GPU has too little memory to sharpen images: they stay as they are chosen")
        return 0.0
    if seconds <= SHARPENING_SHARE * budget.left:
        return seconds
    log.say(f"images are chosen and not sharpened: that would take {seconds:.0f} s of {budget.left:.0f}")
    return 0.0
