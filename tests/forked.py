"""Jobs on the embedded checkpoint without the seconds it takes to start one: forked from a server that has it loaded.

Everything but the loading is the real thing: the command line, the process, its files and its end.
"""

import codecs
import contextlib
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
from collections.abc import Callable, Mapping
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub import constants
from numpy.typing import NDArray
from torch import Tensor

from submission import cli, finish, guard, job, report
from submission.budget import start_budget
from submission.checkpoint import EMBEDDED, inspect
from submission.engine import maker
from submission.estimates import Extent
from submission.generator import Generator, load_generator
from submission.progress import Log
from submission.tasks import load_task
from submission.work import Work
from tests import stub_device
from tools.embedded import critic, diffusion, distil, layout, progress, vae

NOBODY = 65534
# The main function of a command line.
Main = Callable[[list[str]], int]
# Rounds before a device is stuck or fails: few, for a busy machine must come past them in a budget of seconds.
FAULT_AFTER = 3


@functools.cache
def generator() -> Generator:
    """CIFAR-100 from the embedded checkpoint. One thread: the pool of more would not survive a fork."""
    torch.set_num_threads(1)
    log = Log("plain", start_budget(600))
    device, checkpoint = torch.device("cpu"), inspect(EMBEDDED, "embedded")
    return load_generator(load_task("cifar100"), checkpoint, device, log, style="described", seed=0, resolution=None)


def start(
    output: Path, *options: str, fault: str = "", environment: Mapping[str, str] | None = None
) -> ForkServerProcess:
    """Starts the job in a process of its own, which prints to `output`.log. `fault` is the name of a function below."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.preloaded"])
    process = context.Process(target=_job, args=(output, options, fault, environment or {}))
    process.start()
    return process


def start_command(
    main: Main, arguments: list[str], log: Path, *, folder: Path, environment: Mapping[str, str], fault: str = ""
) -> ForkServerProcess:
    """Starts a command line of the job or of a tool in a process of its own and in that folder.

    `log` gets what it says on standard error. `fault` is the name of a function below.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.preloaded"])
    process = context.Process(target=_command, args=(main, arguments, log, folder, dict(environment), fault))
    process.start()
    return process


def warm_up() -> None:
    """Returns when the server is ready to fork."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.preloaded"])
    process = context.Process(target=os.getpid)
    process.start()
    process.join()


def wait_for(condition: Callable[[], bool], process: ForkServerProcess) -> None:
    """Until it holds, or the process is gone."""
    while not condition() and process.is_alive():
        time.sleep(0.005)


def _job(output: Path, options: tuple[str, ...], fault: str, environment: Mapping[str, str]) -> None:
    os.environ.update(environment)
    log = os.open(output.with_suffix(".log"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    loaded = generator()
    if fault:
        globals()[fault](loaded)
    vars(maker)["load_generator"] = lambda *_, **__: loaded
    arguments = ["cifar100", "--model", "embedded", "--device", "cpu", "--output", str(output), *options]
    os._exit(cli.main(arguments))


def _command(
    main: Main, arguments: list[str], log: Path, folder: Path, environment: dict[str, str], fault: str
) -> None:
    os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    os.environ.update(environment)
    os.chdir(folder)
    if fault:
        globals()[fault](None)
    try:
        code = main(arguments)
    except SystemExit as error:  # argparse
        code = int(error.code or 0)
    except Exception:  # noqa: BLE001  what Python does with it
        traceback.print_exc()
        code = 1
    sys.stderr.flush()
    os._exit(code)


def _when_generating(loaded: Generator, before: Callable[[NDArray[np.int64]], None]) -> None:
    """Has `before` called with the images of every batch."""
    images: Callable[..., Tensor] = Generator.images

    def with_fault(self: Generator, numbers: NDArray[np.int64], log: Any) -> Tensor:
        before(numbers)
        return images(self, numbers, log)

    vars(loaded)["images"] = functools.partial(with_fault, loaded)


def little_memory(loaded: Generator) -> None:
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

    _when_generating(loaded, before)


def stuck_device(loaded: Generator) -> None:
    """After FAULT_AFTER rounds a batch never comes back."""

    def before(numbers: NDArray[np.int64]) -> None:
        if numbers[0] >= 100 * FAULT_AFTER:  # CIFAR-100's images are numbered round after round
            print("the device is stuck", flush=True)
            time.sleep(1000)

    _when_generating(loaded, before)


def unhurried_device(loaded: Generator) -> None:
    """Leaves time for something to happen between batches."""
    _when_generating(loaded, lambda _: time.sleep(0.3))


def stubs(_: Generator) -> None:
    """Devices are made up, each with an actor of its own."""
    vars(job)["loader"] = lambda *_: stub_device.load


def stubs_that_do_not_load(_: Generator) -> None:
    """No device sees the checkpoint."""
    vars(job)["loader"] = lambda *_: stub_device.load_nothing


def failing_device(loaded: Generator) -> None:
    """After FAULT_AFTER rounds every batch fails."""

    def before(numbers: NDArray[np.int64]) -> None:
        if numbers[0] >= 100 * FAULT_AFTER:  # CIFAR-100's images are numbered round after round
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

    _when_generating(loaded, before)


def nobody_listens(_: Generator) -> None:
    """What is printed goes to a pipe that is full."""
    _reader, writer = os.pipe()
    os.set_blocking(writer, False)
    with contextlib.suppress(BlockingIOError):
        while True:
            os.write(writer, b"x" * 1024)
    os.set_blocking(writer, True)
    os.dup2(writer, 1)


def jumping_clock(_: Generator) -> None:
    """The wall clock is set forward by an hour, then back by a day, and so on. The real one is everybody's."""
    jumps, now = itertools.cycle((3600.0, -86400.0)), time.time
    vars(time)["time"] = lambda: now() + next(jumps)


def small_files(_: Generator) -> None:
    """No file may be larger than 7 MB: the first of five images a class fits."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (7_000_000, 7_000_000))


def endless_report(_: Generator) -> None:
    """The report takes longer than there is time."""
    vars(report)["write_report"] = lambda *_: time.sleep(1000)


def offline(_: object) -> None:
    """An empty hub cache and no network, through the hub library's own switches."""
    vars(constants).update(HF_HUB_OFFLINE=True, HF_HUB_CACHE=str(Path.cwd() / "hub"))


def gpu_without_weights(_: object) -> None:
    """A CUDA device, and no SDXL-Turbo to be had."""
    offline(None)
    vars(torch.cuda).update(is_available=lambda: True, device_count=lambda: 1, set_device=lambda _: None)
    vars(job)["PROJECT"] = Path.cwd()


def no_ray(_: object) -> None:
    """Ray is not installed."""
    vars(sys)["modules"]["ray"] = None


def small_training(_: object) -> None:
    """The trainer's batches are a few images, its UNets narrow, every other step has a line in the log. Nothing is
    compiled, which takes longer than to train so little."""
    torch._dynamo.config.disable = True
    vars(critic).update(STEPS=2, PROGRESS_EVERY=1)
    vars(vae).update(BATCH=4, NORMALISE_ON=1)
    vars(progress).update(LOG_EVERY=2)
    vars(layout).update(UNET_WIDTHS=(32, 32))
    vars(diffusion).update(BATCH=4, SOLVER_STEPS=2)
    vars(distil).update(PAIRS=20, SOLVED_AT_ONCE=10, DISTIL_BATCH=4, MATCH_BATCH=4)


def interrupted(_: object) -> None:
    """Ctrl-C while the model is loaded, which takes its time."""

    def load(*_: Any, **__: Any) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(1000)

    vars(maker)["load_generator"] = load


def ordinary_user(_: object) -> None:
    """Someone whom permissions stop."""
    codecs.lookup("cp437")  # zipfile's, which this user may not be able to import from where Python is
    if os.getuid() == 0:
        os.setuid(NOBODY)


def slow_to_notice(_: Generator) -> None:
    """When time is up, the last file is in place, but the thread that put it there has yet to notice."""
    start, write_last, replace, time_is_up = guard._start, finish.write_last, Path.replace, threading.Event()

    def start_and_tell(work: Callable[..., None], *arguments: object) -> threading.Thread:
        thread = start(work, *arguments)
        if work.__name__ == "last_words":
            time_is_up.set()
        return thread

    def replace_slowly(self: Path, target: Path) -> Path:
        result = replace(self, target)
        if Path(target).suffix == ".pt":
            time_is_up.wait()
            time.sleep(guard.LAST_WORDS_PATIENCE / 3)
        return result

    def write_last_slowly(work: Work, extent: Extent) -> None:
        setattr(Path, "replace", replace_slowly)  # noqa: B010
        write_last(work, extent)

    vars(guard).update(_start=start_and_tell, LAST_WORDS_PATIENCE=1.5)
    vars(finish)["write_last"] = write_last_slowly
