"""Jobs on the embedded checkpoint without the seconds it takes to start one: forked from a server that has it loaded.

Everything but the loading is the real thing: the command line, the process, its files and its end.
"""

import codecs
import contextlib
import dataclasses
import functools
import itertools
import multiprocessing
import os
import resource
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub import constants
from numpy.typing import NDArray
from torch import Tensor

from submission import cli
from submission.dataset.rounds import Spool
from submission.distillation.selection import Selector
from submission.engine import Engine, Load, Maker
from submission.engine.maker import GeneratorMaker
from submission.errors import CheckpointError
from submission.job import checks, run, sequence
from submission.job.ending import Ending
from submission.job.files import JobFiles
from submission.log import Log
from submission.machine.crowding import Crowding
from submission.machine.memory import WorkingMemory
from submission.model.checkpoint import EMBEDDED, Checkpoint, inspect
from submission.model.choice import choose
from submission.model.generator import Generator, load_generator
from submission.model.image_spec import ImageSpec
from submission.plan import guard
from submission.plan.budget import Allowance, Budget, start_budget
from submission.report import page
from submission.request import JobRequest
from submission.tasks import Task, load_task
from tests import stub_device
from tools import train
from tools.training import critic, diffusion, distil, layout, progress, result, samples, vae

NOBODY = 65534
# The main function of a command line.
Main = Callable[..., int]
# Rounds before a device is stuck or fails: few, for a busy machine must come past them in a budget of seconds.
FAULT_AFTER = 3


CPU = torch.device("cpu")


@functools.cache
def generator() -> Generator:
    """CIFAR-100 from the embedded checkpoint. One thread: the pool of more would not survive a fork."""
    torch.set_num_threads(1)
    return _load(load_task("cifar100"))


def _load(task: Task) -> Generator:
    log, checkpoint = Log("plain", start_budget(600)), inspect(EMBEDDED, "embedded")
    return load_generator(ImageSpec(task), checkpoint, CPU, log)


class Interfered(Generator):
    """A generator that does something before every batch."""

    before: Callable[[NDArray[np.int64]], None]

    def images(self, numbers: NDArray[np.int64], log: Log) -> Tensor:
        self.before(numbers)
        return super().images(numbers, log)


def good_device(request: JobRequest, checkpoint: Checkpoint, engine: Engine, spool: Spool) -> Load:
    """The embedded checkpoint as it is; where there are several devices, each loads it for itself."""
    if not engine.alone:
        return run.loader(request, checkpoint, engine, spool)
    return _with(lambda _: None, None if is_first(request) else request.image.task)


def is_first(request: JobRequest) -> bool:
    """Whether the request is for CIFAR-100, as in tests of several tasks that of the first one."""
    return request.image.task.name == "cifar100"


def _with(before: Callable[[NDArray[np.int64]], None], task: Task | None = None) -> Load:
    """A device that does something before every batch, for images of CIFAR-100 or of another task."""

    def load(seconds_left: float, like: object, network: object, log: Log) -> Maker:
        loaded = _load(task) if task else generator()
        interfered = Interfered(**{field.name: getattr(loaded, field.name) for field in dataclasses.fields(loaded)})
        interfered.before = before
        return GeneratorMaker(interfered, CPU, log, WorkingMemory.watch(), Crowding())

    return load


def start(
    output: Path,
    *options: str,
    tasks: Sequence[str] = ("cifar100",),
    device: run.Prepare = good_device,
    fault: Callable[[], None] | None = None,
    environment: Mapping[str, str] | None = None,
) -> ForkServerProcess:
    """Starts the job in a process of its own, which prints to `output`.log.

    `device` and `fault` are functions below: what makes the images, and what is wrong with everything else.
    """
    return _start(_job, output, [*tasks], ("--select", "none", *options), device, fault, environment or {})


def start_command(
    main: Main,
    arguments: list[str],
    log: Path,
    *,
    folder: Path,
    environment: Mapping[str, str],
    fault: Callable[[], None] | None = None,
) -> ForkServerProcess:
    """Starts a command line of the job or of a tool in a process of its own and in that folder.

    `log` gets what it says on standard error. `fault` is a function below.
    """
    return _start(_command, main, arguments, log, folder, dict(environment), fault)


def _start(target: Callable[..., None], *arguments: object) -> ForkServerProcess:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.preloaded"])
    process = context.Process(target=target, args=arguments)
    process.start()
    return process


def warm_up() -> None:
    """Returns when the server is ready to fork."""
    _start(_nothing).join()


def _nothing() -> None:
    """What a process does that is only to be started."""


def said(output: Path) -> str:
    """What the job that writes there has printed."""
    return output.with_suffix(".log").read_text()


def kill(process: ForkServerProcess, number: signal.Signals) -> None:
    assert process.pid
    os.kill(process.pid, number)


def end(process: ForkServerProcess, seconds: float = 100) -> int:
    """Waits for it; its exit code."""
    process.join(seconds)
    assert process.exitcode is not None, "still there"
    return process.exitcode


def wait_for(condition: Callable[[], bool], process: ForkServerProcess) -> None:
    """Until it holds, or the process is gone."""
    while not condition() and process.is_alive():
        time.sleep(0.005)


def _job(
    output: Path,
    tasks: list[str],
    options: tuple[str, ...],
    device: run.Prepare,
    fault: Callable[[], None] | None,
    environment: Mapping[str, str],
) -> None:
    os.environ.update(environment)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # which nohup would have had ignored, had it started the tests
    log = os.open(output.with_suffix(".log"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    if fault:
        fault()
    arguments = [*tasks, "--model", "embedded", "--device", "cpu", "--output", str(output), *options]
    os._exit(cli.main(arguments, prepare=device))


def _command(
    main: Main,
    arguments: list[str],
    log: Path,
    folder: Path,
    environment: dict[str, str],
    fault: Callable[[], None] | None,
) -> None:
    os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    os.environ.update(environment)
    os.chdir(folder)
    if fault:
        fault()
    try:
        code = main(arguments)
    except SystemExit as error:  # argparse
        code = int(error.code or 0)
    except Exception:  # noqa: BLE001  what Python does with it
        traceback.print_exc()
        code = 1
    sys.stderr.flush()
    os._exit(code)


def little_memory(*_: object) -> Load:
    """Batches of more than ten do not fit: the first such time as on a GPU, then as on a CPU."""
    seen = []

    def before(numbers: NDArray[np.int64]) -> None:
        if len(numbers) > 10:
            seen.append(numbers)
            if len(seen) == 1:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")
            raise RuntimeError(
                "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory"
            )

    return _with(before)


def stuck_device(*_: object, seconds: float = 1000) -> Load:
    """After FAULT_AFTER rounds a batch never comes back."""

    def before(numbers: NDArray[np.int64]) -> None:
        if numbers[0] >= 100 * FAULT_AFTER:  # CIFAR-100's images are numbered round after round
            print("the device is stuck", flush=True)
            time.sleep(seconds)

    return _with(before)


def late_with_the_first(request: JobRequest, *_: object) -> Load:
    """A batch of the first task comes back after ten seconds, too late for a budget of so many; the second one's are
    made as they should be."""
    return stuck_device(seconds=10) if is_first(request) else _with(lambda _: None, request.image.task)


def slow_to_load_the_first(request: JobRequest, *_: object) -> Load:
    """To load the first task's model takes longer than a budget of six seconds."""
    if not is_first(request):
        return _with(lambda _: None, request.image.task)

    def load(*arguments: Any) -> Maker:
        time.sleep(7)
        return _with(lambda _: None)(*arguments)

    return load


def no_model_for_the_first(request: JobRequest, *_: object) -> Load:
    """The checkpoint is gone when the first task's turn comes, and back for the second."""
    if is_first(request):
        raise CheckpointError("/weights/unet is missing")
    return _with(lambda _: None, request.image.task)


def broken_for_the_first(request: JobRequest, *_: object) -> Load:
    """The first task's device is broken in a way that nobody expects."""
    if is_first(request):
        raise RuntimeError("CUDA error: unspecified launch failure")
    return _with(lambda _: None, request.image.task)


def unhurried_with_the_second(request: JobRequest, *_: object) -> Load:
    """Leaves time for something to happen while the second task's images are made."""
    return _with(lambda _: None) if is_first(request) else _with(lambda _: time.sleep(3), request.image.task)


def failing_device(*_: object) -> Load:
    """After FAULT_AFTER rounds every batch fails."""

    def before(numbers: NDArray[np.int64]) -> None:
        if numbers[0] >= 100 * FAULT_AFTER:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

    return _with(before)


def unhurried_device(*_: object) -> Load:
    """Leaves time for something to happen between batches."""
    return _with(lambda _: time.sleep(0.3))


def interrupted_device(*_: object) -> Load:
    """Ctrl-C while the model is loaded, which takes its time."""

    def load(*_: object) -> Maker:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(1000)
        raise AssertionError("nobody has ended it")

    return load


def stubs(*_: object) -> Load:
    """Devices are made up, each with an actor of its own."""
    return stub_device.load


def stubs_that_do_not_load(*_: object) -> Load:
    """No device sees the checkpoint."""
    return stub_device.load_nothing


def nobody_listens() -> None:
    """What is printed goes to a pipe that is full."""
    _reader, writer = os.pipe()
    os.set_blocking(writer, False)
    with contextlib.suppress(BlockingIOError):
        while True:
            os.write(writer, b"x" * 1024)
    os.set_blocking(writer, True)
    os.dup2(writer, 1)


def without_hangups() -> None:
    """As nohup starts what it starts."""
    signal.signal(signal.SIGHUP, signal.SIG_IGN)


def reader_gone() -> None:
    """Nobody reads what is printed any more, from the second line on."""
    reader, writer = os.pipe()
    os.dup2(writer, 1)
    threading.Thread(target=lambda: os.close(reader) if os.read(reader, 1) else None, daemon=True).start()


def full_output() -> None:
    """What is printed goes to a disk that is full."""
    os.dup2(os.open("/dev/full", os.O_WRONLY), 1)


def jumping_clock() -> None:
    """The wall clock is set forward by an hour, then back by a day, and so on. The real one is everybody's."""
    jumps, now = itertools.cycle((3600.0, -86400.0)), time.time
    vars(time)["time"] = lambda: now() + next(jumps)


def small_files() -> None:
    """No file may be larger than 7 MB: the first of five images per class fits."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (7_000_000, 7_000_000))


def slow_to_choose(seconds: float = 0.1) -> None:
    """The features of a batch take their time."""
    features = Selector.features

    def slowly(self: Selector, images: NDArray[np.uint8]) -> Tensor:
        print("choosing", flush=True)
        time.sleep(seconds)
        return features(self, images)

    setattr(Selector, "features", slowly)  # noqa: B010
    setattr(Selector, "seconds_per_image", lambda _: 1e-3)  # noqa: B010


def endless_choosing() -> None:
    """The features of the first batch never come."""
    slow_to_choose(1000)


def endless_report() -> None:
    """The report takes longer than there is time."""
    vars(page)["write_report"] = lambda *_: time.sleep(1000)


def offline() -> None:
    """An empty hub cache and no network, through the hub library's own switches."""
    vars(constants).update(HF_HUB_OFFLINE=True, HF_HUB_CACHE=str(Path.cwd() / "hub"))


def gpu_without_weights() -> None:
    """A CUDA device, and no SDXL-Turbo to be had."""
    offline()
    vars(torch.cuda).update(is_available=lambda: True, device_count=lambda: 1, set_device=lambda _: None)
    vars(run)["choose"] = vars(checks)["choose"] = functools.partial(choose, root=Path.cwd())


def no_ray() -> None:
    """Ray is not installed."""
    vars(sys)["modules"]["ray"] = None


def small_training() -> None:
    """The trainer's batches are a few images, its UNets narrow, every step has a line in the log and a state on disk.
    Its clock stands still but for a hundred seconds with every step: it repeats itself whatever the machine is at."""
    vars(critic).update(STEPS=2, PROBED=2)
    vars(vae).update(BATCH=4, NORMALISE_ON=4)
    vars(progress).update(LOG_EVERY=1, SAVE_SECONDS=300.0, LEAST_BATCH=4, WARM_UP=4)
    vars(train).update(WARM_UP=4)
    vars(layout).update(UNET_WIDTHS={"small": (32, 32)})
    vars(diffusion).update(BATCH=4, SOLVER_STEPS=2)
    vars(distil).update(PAIRS=20, SOLVED_AT_ONCE=4, DISTIL_BATCH=4, MATCH_BATCH=4)
    vars(result).update(CHECKED=8, SHOWN=4)
    vars(samples).update(SHEET_IMAGES=2)
    vars(result).update(SHEET_IMAGES=2)
    clock, seed_step = [0.0], progress.seed_step

    def seed_and_tick(*arguments: Any) -> None:
        clock[0] += 100
        seed_step(*arguments)

    def start(seconds: float, began: float) -> Budget:
        return Budget(seconds, 100 * round((began - time.time()) / 100), lambda: clock[0])

    for module in (progress, distil):
        vars(module).update(seed_step=seed_and_tick)
    vars(train).update(start_budget=start)


def small_training_stopped_before_a_step() -> None:
    """As that, and told to stop when the teacher's next step is being prepared."""
    small_training()

    def stop(*_: object) -> None:
        raise progress.StoppedError

    vars(train)["train_diffusion"] = stop


def ordinary_user() -> None:
    """Someone whom permissions stop."""
    codecs.lookup("cp437")  # zipfile's, which this user may not be able to import from where Python is
    if os.getuid() == 0:
        os.setuid(NOBODY)


def ordinary_user_who_stands_back() -> None:
    """As someone who cannot take back what `nice` has given away."""
    os.nice(10)
    ordinary_user()


def slow_to_notice() -> None:
    """When time is up, the last file is in place, but the thread that put it there has yet to notice."""
    write_last, last_words, replace, time_is_up = (
        JobFiles.write_last,
        Ending.last_words,
        Path.replace,
        threading.Event(),
    )

    def replace_slowly(self: Path, target: Path) -> Path:
        result = replace(self, target)
        if Path(target).suffix == ".pt":
            time_is_up.wait()
            time.sleep(guard.LAST_WORDS_PATIENCE / 3)
        return result

    class SlowToNotice(JobFiles):
        def write_last(self) -> None:
            setattr(Path, "replace", replace_slowly)  # noqa: B010
            write_last(self)

    def time_is_up_and_said(self: Ending) -> None:
        time_is_up.set()
        last_words(self)

    vars(guard)["LAST_WORDS_PATIENCE"] = 1.5
    vars(run)["JobFiles"] = SlowToNotice
    setattr(Ending, "last_words", time_is_up_and_said)  # noqa: B010


def slow_with_all(request: JobRequest, *_: object) -> Load:
    """Rounds of any task take their time."""
    return _with(lambda _: time.sleep(0.3), request.image.task)


def told_between_tasks() -> None:
    """Told to stop when the first task is over, and before anything of the second has begun."""
    setattr(sequence, "_forget_the_last", lambda: os.kill(os.getpid(), signal.SIGTERM))  # noqa: B010


def told_as_the_second_begins() -> None:
    """Told to stop when it is settled that the second task is begun, and before its guard is there."""
    turn = Allowance.turn

    def turn_and_stop(self: Allowance, classes: Sequence[int], began: float) -> tuple[Budget, Budget]:
        if began > self.start:
            os.kill(os.getpid(), signal.SIGTERM)
        return turn(self, classes, began)

    setattr(Allowance, "turn", turn_and_stop)  # noqa: B010
