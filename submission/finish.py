"""Rounds to files: snapshots beside generation, the last file, and what lies beside it."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np

from submission.checkpoint import recognise
from submission.contact_sheet import MOST_CLASSES, draw_contact_sheet
from submission.dataset_file import AbandonedError, write_dataset
from submission.errors import OutputError
from submission.estimates import Extent
from submission.manifest import machine, write_json, write_whole
from submission.output_folder import release
from submission.work import Work
from submission.working_memory import peak_memory

# What the report took on two busy CPU cores that had yet to read its libraries from the disk: with less time left it is
# not begun, and so much is kept for it where that is no more than this share of the budget.
REPORT_SECONDS, REPORT_SECONDS_A_CLASS, REPORT_SHARE = 2.0, 0.005, 0.05
# Seconds the last manifest may wait for the checkpoint's hashes, which were begun at the start.
HASH_PATIENCE = 0.5


def start_snapshot(work: Work, extent: Extent) -> None:
    """Begins to write a file beside generation; sheet and manifest follow it."""
    config = work.config
    check_folder(work)

    def complete() -> None:
        draw_sheet(work)
        write_manifest(work)

    rounds = work.spool.read().first(extent.rounds)
    work.writer.start(config.dataset, rounds, config.recipe(extent), extent, placing(work, extent), complete)


@contextmanager
def placing(work: Work, extent: Extent) -> Iterator[None]:
    """While the file of `extent` is put in place: nobody writes a manifest until it is known to be there."""
    with work.placing:
        yield
        work.scheduler.in_place = extent


def collect_snapshot(work: Work) -> None:
    """Tells the scheduler of a snapshot that was finished meanwhile. Raises OutputError where it failed."""
    try:
        done = work.writer.collect()
    except OutputError:
        if work.config.output.is_dir():
            raise
        check_folder(work)
        return
    if done is not None:
        work.scheduler.wrote(done.extent, done.seconds, done.spent)
        work.log.timings["write snapshots"] = work.scheduler.spent


def finish(work: Work, *, stopped: bool) -> None:
    """Writes the last file, if there is more than in the one in place and time for it, and the manifest.

    Then the spool is of no more use, unless the job was `stopped` and may be resumed.

    Raises BudgetError where there is no time for any file, and OutputError.
    """
    config, scheduler, spool, log = work.config, work.scheduler, work.spool, work.log
    work.writer.abandon()
    collect_snapshot(work)
    check_folder(work)
    with log.phase("write and verify"):
        while (extent := scheduler.last_file()) is not None and not scheduler.late():
            write_last(work, extent)
    if scheduler.in_place is None:
        raise scheduler.too_small()
    extent = scheduler.in_place
    ready = scheduler.shape.ipc(spool.count)
    if extent.ipc < ready:
        log.warn(f"there was no time to write more than IPC {extent.ipc} of the {ready} that were ready")
    elif extent.ipc == scheduler.shape.cap < config.cap:
        log.warn(f"there was no room to write more than IPC {extent.ipc} of the {config.cap} allowed")
    with log.phase("sheet and manifest"):
        draw_sheet(work)
        if work.digests.wait(HASH_PATIENCE) is None:
            log.warn("the checkpoint's SHA-256 was not ready in time and is missing from the manifest")
        write_manifest(work)
    copies = f"the rest {config.pda} copies" if extent.rounds < extent.ipc else "no copies"
    log.say(
        f"{config.dataset}: {len(config.task.classes)} classes, IPC {extent.ipc} ({min(extent.rounds, extent.ipc)} "
        f"generated, {copies}), {scheduler.budget.left:.1f} s before the deadline"
    )
    work.finished = True
    if stopped and spool.count < scheduler.shape.cap:
        log.say(f"its {spool.count} rounds are kept in {spool.folder}: --resume goes on from them")
    else:
        spool.remove()
    make_report(work)
    release(config.output)
    log.close()


def make_report(work: Work) -> None:
    """The page about the run, where there is time for it; the job is finished with or without it."""
    dataset, scheduler, log = work.config.dataset, work.scheduler, work.log
    later = f"./run.sh report {dataset.with_suffix('.json')} makes it"
    if scheduler.left - scheduler.last < report_seconds(scheduler.shape.classes):
        log.say(f"no time for the report: {later}")
        return
    logging.getLogger("matplotlib").setLevel(logging.ERROR)  # it would complain where it cannot keep a cache
    try:
        from submission.report import write_report  # noqa: PLC0415  # its libraries are slow to import

        page = write_report(dataset, work.config.task)
    except (OutputError, OSError, ImportError) as error:  # ImportError: the interpreter may be the user's own
        log.warn(f"no report ({error}): {later}")
    else:
        log.say(f"{page}: what happened, written {scheduler.budget.left:.1f} s before the deadline")


def report_seconds(classes: int) -> float:
    """What the report on so many classes may take."""
    return REPORT_SECONDS + REPORT_SECONDS_A_CLASS * classes


def write_last(work: Work, extent: Extent) -> None:
    """Writes the last file, or gives up where it turns out too slow: the scheduler then thinks of a smaller one."""
    scheduler = work.scheduler
    began = scheduler.budget.elapsed

    def check(fraction: float) -> None:
        if scheduler.too_slow(extent, began, fraction):
            raise AbandonedError

    rounds = work.spool.read().first(extent.rounds)
    try:
        write_dataset(work.config.dataset, rounds, work.config.recipe(extent), check, placing=placing(work, extent))
    except AbandonedError:
        work.log.warn(f"writing IPC {extent.ipc} would end after the deadline: given up")


def check_folder(work: Work) -> None:
    """Sees whether the file in place is still there. The output folder is made again where someone has removed it: the
    rounds survive in the open spool. Raises OutputError."""
    folder = work.config.output
    if folder.is_dir() and (work.scheduler.in_place is None or work.config.dataset.exists()):
        return
    work.log.warn(f"{work.config.dataset if folder.is_dir() else folder} was removed while the job ran: made anew")
    work.scheduler.in_place = None
    work.sheet_drawn = False
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"cannot make {folder} again ({error.strerror})") from error


def draw_sheet(work: Work) -> None:
    """The contact sheet, of the first round, once."""
    if not work.sheet_drawn:
        classes = work.config.task.classes[:MOST_CLASSES]
        images = work.spool.read()[np.zeros(len(classes), np.int64), np.arange(len(classes))]
        write_whole(work.config.dataset.with_suffix(".png"), draw_contact_sheet(images, [c.name for c in classes]))
        work.sheet_drawn = True


def write_manifest(work: Work) -> None:
    """The manifest of the file in place: what was asked, what was done, how long it took, every fallback on the way.

    Raises OutputError.
    """
    with work.placing:
        if (extent := work.scheduler.in_place) is not None:
            write_json(work.config.dataset.with_suffix(".json"), manifest(work, extent))


def manifest(work: Work, extent: Extent) -> dict[str, object]:
    config, scheduler, log = work.config, work.scheduler, work.log
    told = [device.facts for device in scheduler.devices if device.facts]
    peaks = [peak_memory(), *(facts["peak_memory_bytes"] for facts in told)]
    generating = max(log.timings.get("generate", 0.0), 1e-9)
    digests = work.digests.wait(0)
    return {
        "task": config.task.name,
        "model": config.model,
        "classes": len(config.task.classes),
        "size": config.task.size,
        "ipc": extent.ipc,
        "rounds": extent.rounds,
        "max_ipc": config.cap,
        "copies_per_image": config.shape.copies,
        "pda": config.pda,
        "prompts": config.prompts,
        "seed": config.seed,
        "dtype": config.dtype,
        "budget_seconds": scheduler.budget.seconds,
        "elapsed_seconds": round(scheduler.budget.elapsed, 2),
        "phases_seconds": {name: round(seconds, 3) for name, seconds in list(log.timings.items())},
        "phases_from_to": {name: [round(end, 2) for end in span] for name, span in list(log.spans.items())},
        "images_per_second": round(scheduler.images / generating, 2),
        "first_image_seconds": work.first_image and round(work.first_image, 2),
        "resumed_rounds": work.spool.before,
        "devices": [
            {"name": one.name, "node": one.node, "images": one.images, "restarts": one.restarts}
            for one in scheduler.devices
        ],
        "snapshots_seconds": round(scheduler.spent, 3),
        "batch_size": scheduler.batch_size,
        "plans": list(work.plans),
        # How images were made on the first device and, with the same result, on all others.
        **(told[0] if told else {}),
        "images_regenerated": sum(facts["images_regenerated"] for facts in told),
        "checkpoint": {
            "source": work.checkpoint.source,
            "path": str(work.checkpoint.path),
            "sha256": digests,
            "recognised": digests and recognise(digests),
        },
        "warnings": list(log.warnings),
        "peak_memory_bytes": max(peaks),
        **machine(),
        # Last, since it is long.
        "progress": {
            name: [point[column] for point in work.progress]
            for column, name in enumerate(("elapsed", "images", "batch_size"))
        },
    }
