"""Scores a synthetic training set as the organisers do: train a small ConvNet on it, test that on real images.

    ./run.sh evaluate --submit_dir outputs --truth_dir reference_data

It takes the same files as the organisers' script, draws the same random numbers and writes the same `scores.txt`.
Beside it, it leaves `results.json`, the learning curves, and for each task the report on the run that made the file,
with the score in it, and it says if the classes seem to be in a wrong order.
"""

import argparse
import math
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from submission.arguments import Parser, add_device, exit_code_of, number_from
from submission.distillation.convnet import WIDTH, ConvNet
from submission.errors import InputFileError, OutputError, UsageError
from submission.machine.device import choose_device
from submission.machine.disk import write_json, write_whole
from submission.machine.limits import cores
from submission.machine.memory import keep_freed_memory, memory_free
from submission.tasks import Task, builtin_names, load_task
from tools.reading.manifests import page_about, read_manifest
from tools.reading.real_images import find_test_images
from tools.reading.tensor_files import read_submission
from tools.scoring.fast import Arithmetic, make_forward, probe
from tools.scoring.findings import inspect
from tools.scoring.results import Entry, Run, Score, draw_curves, figures, overall, summary
from tools.scoring.training import Measure, Schedule, assess, train

# Feature maps of the first layers' size that training holds at the same time: 4.5 to 6 were measured.
FEATURE_MAPS = 5
# Seconds between lines of progress.
LINE_SECONDS = 10.0


def build_parser() -> Parser:
    parser = Parser(
        prog="./run.sh evaluate",
        description="Scores NAME.pt as the organisers do: trains a ConvNet on it and tests that on real images.",
        epilog="examples:\n  ./run.sh evaluate --submit_dir outputs --truth_dir reference_data\n"
        "  ./run.sh evaluate --submit_dir outputs --protocol fast --max-steps 1200 --runs 1\n"
        "  ./run.sh evaluate --submit_dir outputs --tasks my-classes.toml --truth_dir my-images\n\n"
        "exit codes: 0 evaluated; 2 usage; 5 output cannot be written; 6 a file was refused",
    )
    add = parser.add_argument
    add("--submit_dir", type=Path, required=True, metavar="DIR", help="holds NAME.pt of each task")
    add(
        "--truth_dir",
        type=Path,
        default=Path("reference_data"),
        metavar="DIR",
        help="holds NAME_test.pt, or torchvision's cifar-100-python/, or the unpacked tiny-imagenet-200/, or a folder "
        "per class with images of any size, in test/, val/, NAME/ or beside each other",
    )
    add(
        "--output_dir",
        type=Path,
        default=Path(),
        metavar="DIR",
        help="gets scores.txt, results.json, learning_curves.png, and NAME.html where --submit_dir has NAME.json",
    )
    add(
        "--tasks",
        nargs="+",
        metavar="TASK",
        help="names, or a task's .toml (default: those with a file in --submit_dir)",
    )
    add(
        "--protocol",
        choices=("official", "fast"),
        default="official",
        help="official: their arithmetic; fast: the same, compiled and in bfloat16 where that gains",
    )
    add("--epochs", type=number_from(0), default=1000, metavar="N", help="train epochs 0 to N inclusive")
    add("--max-steps", type=number_from(1), metavar="S", help="end runs so; restart at half (default: no such end)")
    add("--runs", type=number_from(1), default=3, metavar="N", help="networks trained per task")
    add("--seed", type=number_from(0), default=0, metavar="N", help="seeds torch once, before the first run")
    add_device(parser)
    add("--debug", action="store_true", help="show tracebacks")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    options = build_parser().parse_args(arguments)
    return exit_code_of(lambda: evaluate(options), debug=options.debug)


def evaluate(options: argparse.Namespace) -> None:
    """Check all files, score each task, write the scores. Raises a BankoError for what a person can mend."""
    device = choose_device(options.device)
    schedule = Schedule(options.epochs, options.max_steps)
    entries = [open_entry(task, options) for task in choose_tasks(options.tasks, options.submit_dir)]
    for entry in entries:
        check_memory(entry, schedule, device)
    make_writable(options.output_dir)
    keep_freed_memory()
    torch.set_num_threads(min(cores(), torch.get_num_threads()))
    arithmetic = prepare(entries[0], schedule, device) if options.protocol == "fast" else None
    for entry in entries:
        announce(entry, schedule, options.runs, device, arithmetic)
    # Once, before the first run: the runs and tasks that follow go on with the generator as they find it.
    torch.manual_seed(options.seed)
    scores = [score_task(entry, schedule, options.runs, device, arithmetic) for entry in entries]
    results = write_results(scores, options, device, arithmetic)
    write_reports(scores, results, options)
    print(summary(scores))


def choose_tasks(wanted: Sequence[str] | None, submit_dir: Path) -> list[Task]:
    """The tasks asked for, or the built-in ones that have a file. Raises UsageError, InputFileError."""
    if wanted is not None:
        tasks = [load_task(name) for name in wanted]
        names = [task.name for task in tasks]
        if len(set(names)) < len(names):
            raise UsageError(f"--tasks names a task twice: {' '.join(names)}")
        return tasks
    tasks = [load_task(name) for name in builtin_names()]
    # A link that leads nowhere is a file that was meant to be there: let reading it say so.
    present = [task for task in tasks if (path := submit_dir / f"{task.name}.pt").is_symlink() or path.exists()]
    if not present:
        files = ", ".join(f"{task.name}.pt" for task in tasks)
        raise InputFileError(f"{submit_dir} holds none of {files}; for a task of your own, say --tasks FILE.toml")
    if len(present) < len(tasks):
        missing = ", ".join(f"{task.name}.pt" for task in tasks if task not in present)
        evaluated = ", ".join(task.name for task in present)
        print(f"{submit_dir} holds no {missing}: evaluating {evaluated} alone, and its accuracy will be the score")
    return present


def open_entry(task: Task, options: argparse.Namespace) -> Entry:
    """Both files of a task, checked. Raises InputFileError."""
    file = options.submit_dir / f"{task.name}.pt"
    submission = read_submission(file, task)
    truth = find_test_images(options.truth_dir, task)
    findings = inspect(submission, task)
    # What makes a file useless is no reason not to score it: the organisers would.
    for finding in findings:
        print(f"warning: {file}: {finding.text}", file=sys.stderr)
    return Entry(task, submission, truth, findings)


def make_writable(folder: Path) -> None:
    """Find out now, not after hours of training, that results cannot be written. Raises OutputError."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise OutputError(f"cannot write into {folder} ({error.strerror})") from error


def check_memory(entry: Entry, schedule: Schedule, device: torch.device) -> None:
    """Refuse, before memory is taken, images too large to train on in batches as they are. Raises InputFileError."""
    need = FEATURE_MAPS * 4 * WIDTH * entry.task.size**2 * batch_size(entry, schedule)
    free = memory_free() if device.type == "cpu" else torch.cuda.mem_get_info(device)[0]
    if need > free:
        raise InputFileError(
            f"{entry.task.name}: training on batches of {batch_size(entry, schedule)} images of {entry.task.size} px "
            f"takes about {need / 1e9:.0f} GB, and {free / 1e9:.0f} GB are free: score smaller images, or elsewhere"
        )


def prepare(entry: Entry, schedule: Schedule, device: torch.device) -> Arithmetic:
    """Find out how to be fast here; the random numbers stay as they are."""
    print("compiling the network (half a minute, the first time)", flush=True)
    with torch.random.fork_rng():
        arithmetic = probe(new_net(entry, device), batch_size(entry, schedule))
    if not arithmetic.compiled:
        print("warning: nothing to compile with here (no C++ compiler?), so this will be slower", file=sys.stderr)
    return arithmetic


def announce(entry: Entry, schedule: Schedule, runs: int, device: torch.device, arithmetic: Arithmetic | None) -> None:
    """Say what is to come and about how long it takes, from one timed step of training."""
    steps = schedule.steps(len(entry.train.labels))
    images, labels = entry.train.images[: schedule.batch_size], entry.train.labels[: schedule.batch_size]
    ticks: list[float] = []
    # On the side: the random numbers of the runs, and so their results, stay what they were.
    with torch.random.fork_rng():
        net = new_net(entry, device)
        forward = choose_forward(net, entry, schedule, arithmetic)
        two_steps = Schedule(epochs=1)  # the first of them warms up
        train(net, images, labels, two_steps, lambda step, measure: ticks.append(time.perf_counter()), forward)
    seconds = ticks[1] - ticks[0]
    print(
        f"{entry.task.name}: {entry.ipc} images per class, {len(entry.test.labels):,} test images; "
        f"{runs} run{'s' * (runs > 1)} of {steps:,} steps, about {duration(runs * steps * seconds)} on {device.type}",
        flush=True,
    )


def score_task(
    entry: Entry, schedule: Schedule, runs: int, device: torch.device, arithmetic: Arithmetic | None = None
) -> Score:
    """Train and test as many networks as there are runs, with the random numbers as they come."""
    train_images, train_labels = entry.train.images, entry.train.labels
    if device.type == "cuda":
        train_images, train_labels = train_images.to(device), train_labels.to(device)
    steps = schedule.steps(len(train_labels))
    done = []
    for run in range(runs):
        net = new_net(entry, device)
        progress = Progress(
            f"{entry.task.name} run {run + 1}/{runs}", steps, schedule.images_per_step(len(train_labels))
        )
        forward = choose_forward(net, entry, schedule, arithmetic)
        train(net, train_images, train_labels, schedule, progress.step, forward, record=arithmetic is not None)
        measure, predictions = assess(net, entry.test.images, entry.test.labels, schedule.batch_size)
        done.append(Run(measure.accuracy, predictions, progress.measures))
        print(f"{progress.name}: accuracy {measure.accuracy:.4f} on the test images after {progress.spent}", flush=True)
    return Score(entry, done, steps)


def new_net(entry: Entry, device: torch.device) -> ConvNet:
    """A network of the task's shape, initialised by torch's generator."""
    return ConvNet(len(entry.task.classes), entry.task.size).to(device)


def choose_forward(
    net: ConvNet, entry: Entry, schedule: Schedule, arithmetic: Arithmetic | None
) -> Callable[[torch.Tensor], torch.Tensor]:
    """What computes the logits in training: the network as it is, or under `fast` as was found to be fastest."""
    return net if arithmetic is None else make_forward(net, batch_size(entry, schedule), arithmetic)


def batch_size(entry: Entry, schedule: Schedule) -> int:
    """Images in the largest batch there will be."""
    return min(schedule.batch_size, len(entry.train.labels))


class Progress:
    """A line now and then about a run of training."""

    def __init__(self, name: str, steps: int, images_per_step: float) -> None:
        self.name = name
        self.measures: list[Measure] = []  # of every step
        self._steps, self._images_a_step = steps, images_per_step
        self._started = self._last_line = time.perf_counter()

    def step(self, done: int, measure: Measure) -> None:
        """Told of every step, with the measure of its batch."""
        self.measures.append(measure)
        now = time.perf_counter()
        if now - self._last_line < LINE_SECONDS:
            return
        self._last_line = now
        seconds = (now - self._started) / done
        print(
            f"{self.name}: step {done:,}/{self._steps:,}, loss {measure.loss:.3f}, "
            f"{self._images_a_step / seconds:,.0f} images/s, {duration(seconds * (self._steps - done))} left",
            flush=True,
        )

    @property
    def spent(self) -> str:
        """The time since the run began."""
        return duration(time.perf_counter() - self._started)


def write_results(
    scores: list[Score], options: argparse.Namespace, device: torch.device, arithmetic: Arithmetic | None
) -> dict[str, Any]:
    """`scores.txt`, the organisers' one line, the learning curves, and `results.json`, whose content is returned.
    Raises OutputError."""
    folder: Path = options.output_dir
    write_whole(folder / "scores.txt", f"correct: {overall(scores)}".encode())
    write_whole(folder / "learning_curves.png", draw_curves(scores))
    settings = {
        "protocol": options.protocol,
        "arithmetic": asdict(arithmetic or Arithmetic(compiled=False, bf16=False)),
        "epochs": options.epochs,
        "max_steps": options.max_steps,
        "seed": options.seed,
        "device": device.type,
        "torch": torch.__version__,
    }
    results = figures(scores) | settings
    write_json(folder / "results.json", results)
    return results


def write_reports(scores: list[Score], results: Mapping[str, Any], options: argparse.Namespace) -> None:
    """A report with the score on every file whose run left its manifest. Raises OutputError."""
    for score in scores:
        task, path = score.entry.task, options.submit_dir / f"{score.entry.task.name}.json"
        try:
            page = page_about(path, read_manifest(path), task, score.entry.train.images, results)
        except InputFileError as error:
            print(f"no report on {task.name}: {error}")
        else:
            write_whole(options.output_dir / f"{task.name}.html", page)


def duration(seconds: float) -> str:
    """Seconds as a person would say them: 8 s, 12 min, 2 h 40 min."""
    if seconds < 60:
        return f"{math.ceil(seconds)} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02} min"


if __name__ == "__main__":
    raise SystemExit(main())
