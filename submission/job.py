"""The story, top to bottom: a task and a budget go in, a dataset file comes out before the deadline."""

import gc
import hashlib
import json
import math
import os
import signal
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

import numpy as np

from submission import checkpoint as checkpoints
from submission.batch_size import BatchSize
from submission.budget import Budget, Scheduler, Shape
from submission.checkpoint import Checkpoint
from submission.dataset_file import write_dataset
from submission.device import choose_devices
from submission.devices import Device
from submission.engine import Event, Failed, Load, Made, NoMemoryError, Ready, first_line
from submission.engine.alone import Alone
from submission.engine.fleet import Fleet
from submission.engine.maker import Loading, load_elsewhere, load_maker
from submission.errors import BankoError, BudgetError, CheckpointError, OutputError, UsageError
from submission.estimates import Extent, FileCost
from submission.finish import (
    REPORT_SHARE,
    collect_snapshot,
    finish,
    report_seconds,
    start_snapshot,
    write_manifest,
)
from submission.guard import Duties, Guard
from submission.image_queue import ImageQueue
from submission.manifest import Digests
from submission.needs import shape_that_fits
from submission.output_folder import claimed, release, remove_unfinished
from submission.progress import Log, Status
from submission.rounds import Spool, prepare_spool, remove_if_empty
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
# Seconds that devices are waited for at a time.
WAIT = 0.05
# A device that was started anew so many times is not worth another try.
MOST_RESTARTS = 3
# Seconds that ending other processes may take where this one is about to go.
EXIT_PATIENCE = 0.1


def run(config: JobConfig, budget: Budget, log: Log, guard: Guard) -> None:
    """Makes OUT/NAME.pt, .json, .png and .html inside `budget`; `guard.stop` ends generation early.

    Raises UsageError, BudgetError, CheckpointError or OutputError. Does not return where the guard takes over.
    """
    task = config.task
    log.timings["start and import"] = budget.elapsed
    log.spans["start and import"] = (0.0, budget.elapsed)
    with open_engine(config, log, guard) as engine:
        checkpoint = checkpoints.choose(config.model, cuda=engine.kind == "cuda", environment=os.environ, root=PROJECT)
        devices = engine.kind if isinstance(engine, Alone) else f"{engine.count} x {engine.kind}"
        log.say(
            f"{task.title}: {len(task.classes)} classes at {task.size} px; model: {checkpoint.source}; "
            f"device: {devices}"
        )
        if checkpoint.path == checkpoints.EMBEDDED and task.name not in builtin_names():
            log.warn(
                f"the embedded model knows the classes of {' and '.join(builtin_names())} alone, and its pictures of "
                "others do not look like them: use SDXL-Turbo for a task of your own"
            )
        with open_spool(config, checkpoint, log) as spool:
            shape = shape_that_fits(config, spool, log)
            digests = Digests(checkpoint)
            engine.load(loader(config, checkpoint, engine, spool), lambda: budget.left)
            if engine.depth > 1:
                try_writing(config)
            scheduler, queue = start_scheduler(config, shape, budget, spool)
            scheduler.afterwards += engine.seconds_to_close
            work = Work(config, checkpoint, digests, engine, spool, queue, scheduler, log)
            guard.duties = duties(work, guard)
            if guard.stop.is_set():
                scheduler.hurry()
            try:
                generate(work, guard)
                guard.finishing.acquire()  # for good; in vain where the guard has it, which ends the process
                conclude(work, guard)
            finally:
                work.writer.abandon()


@contextmanager
def open_engine(config: JobConfig, log: Log, guard: Guard) -> Iterator[Alone | Fleet]:
    """What was asked for: a device in this process, or several through Ray. Raises UsageError."""
    engine: Alone | Fleet
    if config.cluster is not None:
        engine = Fleet(config.device, config.devices, config.cluster, log)
    else:
        kind, count = choose_devices(config.device, config.devices)
        engine = Fleet(kind, count, None, log) if count > 1 else Alone(kind, log)
    guard.before_exit = partial(engine.close, patience=EXIT_PATIENCE)
    try:
        yield engine
    finally:
        engine.close()


def loader(config: JobConfig, checkpoint: Checkpoint, engine: Alone | Fleet, spool: Spool) -> Load:
    """What a device does to get ready, in its own process; a run that is resumed has chosen its decoder."""
    embedded = checkpoint.path == checkpoints.EMBEDDED
    label = checkpoints.fingerprint(checkpoint)
    loading = Loading(
        config,
        checkpoint,
        label,
        embedded,
        engine.kind,
        threads=engine.cores,
        sharing=engine.sharing,
        devices=engine.count,
        decoder=spool.decoder,
        network=spool.network,
    )
    return partial(load_maker if isinstance(engine, Alone) else load_elsewhere, loading)


@contextmanager
def open_spool(config: JobConfig, checkpoint: Checkpoint, log: Log) -> Iterator[Spool]:
    """The spool, in an output folder that is this job's while the context lasts: a new one, or with the rounds of the
    run to resume. What a killed run left is cleared away and said.

    Raises UsageError where that run made its rounds of something else, and OutputError.
    """
    task = config.task
    folder = config.output / f".{task.name}.spool"
    with claimed(config.output):
        try:
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
            with Spool(folder, len(task.classes), task.size) as spool:
                if spool.before:
                    log.say(f"resumed: {spool.before} whole rounds of an interrupted run")
                yield spool
        finally:
            remove_if_empty(folder)


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


def try_writing(config: JobConfig) -> None:
    """Writes a file of noise and throws it away, while devices load: the first use of some libraries takes a second,
    which would otherwise pass for the cost of a file. With one device, loading it has used them."""
    classes, size = len(config.task.classes), config.task.size
    noise = np.random.default_rng(0).integers(0, 256, (1, classes, 3, size, size), dtype=np.uint8)
    with suppress(OSError, OutputError), tempfile.TemporaryDirectory(dir=config.output) as folder:
        write_dataset(Path(folder) / "noise.pt", noise, config.recipe(Extent(1, 1)), alone=False)


def start_scheduler(config: JobConfig, shape: Shape, budget: Budget, spool: Spool) -> tuple[Scheduler, ImageQueue]:
    """A scheduler that guesses what a file costs until one has been written, and the images it is about."""
    values = 3 * config.task.size**2
    cost = FileCost(shape.classes, GUESSED_FIXED, GUESSED_VALUE * values, GUESSED_COPY * values)
    queue = ImageQueue(spool, shape.cap)
    scheduler = Scheduler(budget, shape, cost, [], before=shape.cap - queue.missing, rounds=spool.count)
    if (seconds := report_seconds(shape.classes)) <= REPORT_SHARE * budget.seconds:
        scheduler.afterwards = seconds
    return scheduler, queue


def duties(work: Work, guard: Guard) -> Duties:
    """What the guard does where the main thread cannot."""
    scheduler, log = work.scheduler, work.log

    def hurry(number: signal.Signals) -> None:
        scheduler.hurry()
        if not work.finished:
            log.warn(f"told to stop ({number.name}): finishing the file with {scheduler.rounds} rounds")

    def take_over() -> int:
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
        if work.finished:
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

    return Duties(scheduler.overdue, scheduler.late, code, hurry, take_over, last_words)


def generate(work: Work, guard: Guard) -> None:
    """Adds rounds to the spool until the scheduler, asked again before every batch, says that it is time to write.

    A file is written after the first round and larger ones as rounds multiply, beside generation: from early on a
    complete one is in place, and what the last one will cost is known. Raises BudgetError where not even one round
    fits, and what ended the last device where there is none left and no round.
    """
    scheduler, engine, log = work.scheduler, work.engine, work.log
    while not guard.stop.is_set():
        note_progress(work)
        while len(scheduler.devices) < engine.count:
            scheduler.devices.append(Device(BatchSize(work.config.batch_size), ready=False))
        supply(work)
        ready = any(device.ready for device in scheduler.devices)
        idle = not any(device.in_hand for device in scheduler.devices)
        gone = all(device.dropped for device in scheduler.devices)
        if scheduler.done or (idle and (ready or gone)):
            break
        if scheduler.rounds and scheduler.left <= scheduler.finish(scheduler.shape.extent(scheduler.rounds)):
            log.say(f"{scheduler.in_hand} images were still under way when it was time to write")
            break
        with log.phase("generate" if ready or engine.depth == 1 else "start devices"):
            events = engine.events(WAIT)
        for event in events:
            take(work, event)
        give_up_waiting(work)
        keep_up(work)
    if scheduler.rounds == 0:
        if guard.stop.is_set():
            raise BudgetError("stopped before the first round was done: there is nothing to write")
        if gone and not isinstance(work.trouble, BankoError):
            raise UsageError(f"no device could make a single round ({work.trouble})")
        raise (gone and work.trouble) or scheduler.too_small()


def supply(work: Work) -> None:
    """Gives every device as much as it should have in hand, each in turn."""
    scheduler, writing = work.scheduler, work.writer.busy
    for depth in range(work.engine.depth):
        for index, device in enumerate(scheduler.devices):
            now = scheduler.budget.elapsed
            if not device.ready or len(device.in_hand) != depth or (depth and device.in_hand[0].late_at < now):
                continue
            if (size := scheduler.next_batch(device)) and len(numbers := work.queue.take(size)):
                if work.config.compiles and work.engine.kind == "cuda" and len(numbers) == device.batch.current:
                    device.consider_compiling(scheduler.plan().generate)
                device.give(numbers, now, disturbed=writing)
                work.engine.ask(index, numbers, disturbed=writing, compiled=device.compiled)


def take(work: Work, event: Event) -> None:
    """What to make of news from a device. Raises CheckpointError, OutputError, and what ends a device alone."""
    scheduler, log, device = work.scheduler, work.log, work.scheduler.devices[event.device]
    match event:
        case Ready():
            pass_on(work, event)
            device.ready, device.facts = True, event.facts
            gc.enable()  # `__main__` says why it was not
            if not work.spool.decoder:
                work.spool.keep_decoder(event.facts["decoder"], event.network)
            device.name, device.node = event.name, event.node
            device.loading = event.seconds
            if work.engine.depth > 1:
                log.say(f"{device.name} on {device.node} is ready, after {event.seconds:.1f} s")
        case Made():
            pass_on(work, event)
            device.facts = event.facts
            batch = device.in_hand[0]
            made = work.queue.put(batch.numbers, event.images)
            if work.first_image is None:
                work.first_image = scheduler.budget.elapsed
            if batch.compiles:
                device.compiled = event.facts["compiled"]
            if not event.grows:
                device.batch.limit = device.batch.current
            # From the driver's point of view, with the way there and back.
            seconds, expected = scheduler.budget.elapsed - batch.began, len(batch.numbers) * device.pace.mean
            if scheduler.observe(device, seconds, made, work.spool.count, disturbed=work.writer.busy):
                log.warn(
                    f"a batch took {seconds:.1f} s where {expected:.1f} s were expected (a stopped process?): new plan"
                )
            if event.crowding is not None:
                scheduler.cost.crowding = event.crowding
        case Failed(error=NoMemoryError()) if device.in_hand:
            shrink(work, event.device)
        case Failed(error=CheckpointError()) if device.ready:
            raise event.error  # what one makes broken, all do
        case Failed():
            hopeless = isinstance(event.error, BankoError) or device.restarts
            lose(work, event.device, event.error, again=device.ready or not hopeless)


def pass_on(work: Work, event: Ready | Made) -> None:
    """Says what a device said: of what all have in common, once."""
    for kind, text in event.said:
        if kind == "warning" and text not in work.log.warnings:
            work.log.warn(text)
        elif kind == "info" and not any(device.ready for device in work.scheduler.devices):
            work.log.say(text)


def shrink(work: Work, index: int) -> None:
    """A batch did not fit into memory: from now on they are half as large. Raises UsageError for a batch of one."""
    device = work.scheduler.devices[index]
    numbers = device.took(work.scheduler.budget.elapsed).numbers
    device.forget_compiling()
    work.queue.give_back(numbers)
    if len(numbers) == 1:
        error = UsageError(f"no memory for even one image at {device.facts['resolution']} px: lower --resolution")
        if work.engine.depth == 1:
            raise error
        lose(work, index, error, again=False)
    elif len(numbers) <= device.batch.current:  # the one behind it was asked for before this was known
        device.batch.out_of_memory()
        work.log.warn(f"out of memory: batches of {device.batch.current} from now on")


def lose(work: Work, index: int, error: Exception, *, again: bool = True) -> None:
    """A device makes nothing any more: what it had in hand goes to others, and it is started anew where that pays.

    Raises `error` where that was the only device and there is no round.
    """
    scheduler, device = work.scheduler, work.scheduler.devices[index]
    work.trouble = error
    device.ready = False
    for batch in device.in_hand:
        if not batch.handed_on:
            work.queue.give_back(batch.numbers)
    lost = sum(len(batch.numbers) for batch in device.in_hand)
    device.in_hand.clear()
    device.forget_compiling()
    work.engine.stop(index)
    if work.engine.depth == 1:
        device.dropped = True
        if not scheduler.rounds:
            raise error
        work.log.warn(f"generation failed, the file is finished with {scheduler.rounds} rounds: {first_line(error)}")
        return
    again = again and device.restarts < MOST_RESTARTS and scheduler.pays_to_start() and work.engine.restart(index)
    what = "is started anew" if again else "is left out from now on"
    given = f"; its {lost} images in hand go to others" if lost else ""
    work.log.warn(f"{said_of(device, index)} {what} ({first_line(error)}){given}")
    device.dropped = not again
    device.restarts += again


def said_of(device: Device, index: int) -> str:
    return f"{device.name} on {device.node}" if device.node else f"device {index}"


def give_up_waiting(work: Work) -> None:
    """What is late goes to others as well, and a device that hangs is ended."""
    now = work.scheduler.budget.elapsed
    for index, device in enumerate(work.scheduler.devices):
        if not device.in_hand or now < device.in_hand[0].late_at:
            continue
        if now >= device.in_hand[0].hung_at:
            seconds = now - device.in_hand[0].began
            lose(work, index, RuntimeError(f"no answer for {seconds:.0f} s"))
            continue
        for batch in device.in_hand:
            if not batch.handed_on:
                batch.handed_on = True
                work.queue.give_back(batch.numbers)


def note_progress(work: Work) -> None:
    """Keeps how far generation is, unless that was kept a moment ago."""
    scheduler, elapsed = work.scheduler, work.scheduler.budget.elapsed
    if not work.progress or elapsed - work.progress[-1][0] >= PROGRESS_SPACING * scheduler.budget.seconds:
        work.progress.append((round(elapsed, 3), scheduler.total_images, scheduler.batch_size))


def keep_up(work: Work) -> None:
    """What is done between batches: snapshots as they are due, and a word on how it goes."""
    collect_snapshot(work)
    if not work.writer.busy and (extent := work.scheduler.snapshot()) is not None:
        start_snapshot(work, extent)
    if work.scheduler.paced:
        announce(work)


def conclude(work: Work, guard: Guard) -> None:
    """The end: devices go, so that cores and memory are the file's, and it is finished. Raises BudgetError or
    OutputError."""
    work.engine.close(patience=0)
    finish(work, stopped=guard.stop.is_set())


def announce(work: Work) -> None:
    """Shows progress, and says and keeps the plan when it is new and whenever it has changed noticeably."""
    scheduler, log = work.scheduler, work.log
    plan, shape, pace = scheduler.plan(), scheduler.shape, scheduler.images_per_second
    planned = max(plan.rounds, 1)
    log.status(
        Status(
            rounds=scheduler.rounds,
            planned_rounds=planned,
            ipc=shape.ipc(scheduler.rounds),
            planned_ipc=shape.ipc(planned),
            images=scheduler.total_images,
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
                "batch_size": scheduler.batch_size,
                "images_per_second": round(pace, 2),
                "generate_seconds": round(plan.generate, 2),
                "finish_seconds": round(plan.finish, 2),
                "crowding": round(scheduler.cost.crowding, 2),
            }
        )
        was = f" (was {before:.0f})" if before else ""
        log.say(
            f"plan: {plan.rounds} rounds{was}, IPC {plan.ipc}; {pace:,.1f} images/s in batches of "
            f"{scheduler.batch_size}; {plan.finish:.1f} s kept for writing"
        )
