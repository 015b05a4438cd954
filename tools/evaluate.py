"""Scores a synthetic training set as the organisers do: train a small ConvNet on it, test that on real images.

    ./run.sh evaluate --submit_dir outputs --truth_dir reference_data

It takes the same files as the organisers' script, writes the same `scores.txt`, draws the same random numbers, and
leaves `results.json` beside it.
"""

import argparse
import math
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from submission.cli import number_from
from submission.errors import BankoError, InputFileError, OutputError, UsageError
from submission.manifest import write_json
from submission.tasks import Task, builtin_names, load_task
from tools.convnet import ConvNet
from tools.tensor_files import LabelledImages, read_submission, read_truth
from tools.training import Measure, Schedule, assess, keep_freed_memory, train

# Seconds between lines of progress.
LINE_SECONDS = 10.0


@dataclass(frozen=True)
class Job:
    """One task's data, checked."""

    task: Task
    train: LabelledImages
    test: LabelledImages

    @property
    def ipc(self) -> int:
        return len(self.train.labels) // len(self.task.classes)


@dataclass(frozen=True)
class Score:
    """Test accuracies (0..1) of the runs on one task, and the SGD steps of each."""

    job: Job
    runs: list[float]
    steps: int

    @property
    def mean(self) -> float:
        return statistics.fmean(self.runs)

    @property
    def std(self) -> float:
        """Of these runs, not an estimate for others: numpy's and the paper's default."""
        return statistics.pstdev(self.runs)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="./run.sh evaluate",
        description="Scores NAME.pt as the organisers do: trains a ConvNet on it and tests that on real images.",
        epilog="exit codes: 0 evaluated; 2 usage; 5 output cannot be written; 6 a file was refused",
    )
    parser.add_argument(
        "--submit_dir", type=Path, required=True, metavar="DIR", help="holds cifar100.pt, tinyimagenet.pt"
    )
    parser.add_argument(
        "--truth_dir",
        type=Path,
        default=Path("reference_data"),
        metavar="DIR",
        help="holds cifar100_test.pt, tinyimagenet_test.pt (default: ./reference_data/)",
    )
    parser.add_argument(
        "--output_dir", type=Path, default=Path(), metavar="DIR", help="gets scores.txt and results.json (default: ./)"
    )
    parser.add_argument(
        "--tasks",
        nargs="+",
        metavar="TASK",
        help=f"{', '.join(builtin_names())}, or a task's .toml (default: those with a file in --submit_dir)",
    )
    parser.add_argument(
        "--epochs",
        type=number_from(0),
        default=1000,
        metavar="N",
        help="train epochs 0 to N inclusive (default: 1000)",
    )
    parser.add_argument(
        "--max-steps",
        type=number_from(1),
        metavar="S",
        help="end a run after S SGD steps, with the optimiser restarted at half of them (default: no such end)",
    )
    parser.add_argument("--runs", type=number_from(1), default=3, metavar="N", help="networks a task (default: 3)")
    parser.add_argument(
        "--seed",
        type=number_from(0),
        default=0,
        metavar="N",
        help="seeds torch once, before the first run (default: 0)",
    )
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: auto")
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    options = build_parser().parse_args(arguments)
    try:
        evaluate(options)
    except BankoError as error:
        if options.debug:
            raise
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 128 + signal.SIGINT
    return 0


def evaluate(options: argparse.Namespace) -> None:
    """Check all files, score each task, write the scores. Raises a BankoError for what a person can mend."""
    device = choose_device(options.device)
    schedule = Schedule(options.epochs, options.max_steps)
    jobs = [open_job(task, options) for task in choose_tasks(options.tasks, options.submit_dir)]
    make_writable(options.output_dir)
    keep_freed_memory()
    for job in jobs:
        announce(job, schedule, options.runs, device)
    # Once, before the first run: the runs and tasks that follow go on with the generator as they find it.
    torch.manual_seed(options.seed)
    scores = [score_task(job, schedule, options.runs, device) for job in jobs]
    write_results(scores, options, device)
    print(table(scores))


def choose_device(wanted: str) -> torch.device:
    """`auto` is the GPU where there is one. Raises UsageError where one is asked for and there is none."""
    available = torch.cuda.is_available()
    if wanted == "cuda" and not available:
        raise UsageError("--device cuda: PyTorch sees no CUDA device here; use --device cpu, or check the driver")
    return torch.device("cuda" if available and wanted != "cpu" else "cpu")


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
        raise InputFileError(f"{submit_dir} holds none of {', '.join(f'{task.name}.pt' for task in tasks)}")
    if len(present) < len(tasks):
        missing = ", ".join(f"{task.name}.pt" for task in tasks if task not in present)
        evaluated = ", ".join(task.name for task in present)
        print(f"{submit_dir} holds no {missing}: evaluating {evaluated} alone, and its accuracy will be the score")
    return present


def open_job(task: Task, options: argparse.Namespace) -> Job:
    """Both files of a task, checked. Raises InputFileError."""
    return Job(
        task,
        read_submission(options.submit_dir / f"{task.name}.pt", task),
        read_truth(options.truth_dir / f"{task.name}_test.pt", task),
    )


def make_writable(folder: Path) -> None:
    """Find out now, not after hours of training, that results cannot be written. Raises OutputError."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise OutputError(f"cannot write into {folder} ({error.strerror})") from error


def announce(job: Job, schedule: Schedule, runs: int, device: torch.device) -> None:
    """Say what is to come and about how long it takes, from one timed step of training."""
    steps = schedule.steps(len(job.train.labels))
    images, labels = job.train.images[: schedule.batch_size], job.train.labels[: schedule.batch_size]
    ticks: list[float] = []
    # On the side: the random numbers of the runs, and so their results, stay what they were.
    with torch.random.fork_rng():
        net = ConvNet(len(job.task.classes), job.task.size).to(device)
        train(net, images, labels, Schedule(epochs=1), lambda step, measure: ticks.append(time.perf_counter()))
    seconds = ticks[1] - ticks[0]  # the first step warms up
    print(
        f"{job.task.name}: {job.ipc} images a class, {len(job.test.labels):,} test images; "
        f"{runs} run{'s' * (runs > 1)} of {steps:,} steps, about {duration(runs * steps * seconds)} on {device.type}",
        flush=True,
    )


def score_task(job: Job, schedule: Schedule, runs: int, device: torch.device) -> Score:
    """Train and test as many networks as there are runs, with the random numbers as they come."""
    train_images, train_labels = job.train.images, job.train.labels
    if device.type == "cuda":
        train_images, train_labels = train_images.to(device), train_labels.to(device)
    steps = schedule.steps(len(train_labels))
    accuracies = []
    for run in range(runs):
        net = ConvNet(len(job.task.classes), job.task.size).to(device)
        progress = Progress(f"{job.task.name} run {run + 1}/{runs}", steps, schedule.images_a_step(len(train_labels)))
        train(net, train_images, train_labels, schedule, progress.step)
        measure = assess(net, job.test.images, job.test.labels, schedule.batch_size).measure
        accuracies.append(measure.accuracy)
        print(f"{progress.name}: accuracy {measure.accuracy:.4f} on the test images after {progress.spent}", flush=True)
    return Score(job, accuracies, steps)


class Progress:
    """A line now and then about a run of training."""

    def __init__(self, name: str, steps: int, images_a_step: float) -> None:
        self.name = name
        self._steps, self._images_a_step = steps, images_a_step
        self._started = self._last_line = time.perf_counter()

    def step(self, done: int, measure: Measure) -> None:
        """Told of every step, with the measure of its batch."""
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


def write_results(scores: list[Score], options: argparse.Namespace, device: torch.device) -> None:
    """`scores.txt`, the organisers' one line, and `results.json`. Raises OutputError."""
    total = overall(scores)
    try:
        (options.output_dir / "scores.txt").write_text(f"correct: {total}")
    except OSError as error:
        raise OutputError(f"cannot write {options.output_dir / 'scores.txt'} ({error.strerror})") from error
    results = {
        "tasks": {
            score.job.task.name: {
                "accuracy_mean": score.mean,
                "accuracy_std": score.std,
                "runs": score.runs,
                "chance": chance(score.job.task),
                "ipc": score.job.ipc,
                "steps": score.steps,
            }
            for score in scores
        },
        "score": total,
        "protocol": "official",
        "epochs": options.epochs,
        "max_steps": options.max_steps,
        "seed": options.seed,
        "device": device.type,
        "torch": torch.__version__,
    }
    write_json(options.output_dir / "results.json", results)


def table(scores: list[Score]) -> str:
    """The scores for a person: a line a task, and the mean over them."""
    lines = [f"{'task':<14}{'IPC':>5}{'steps':>9}{'mean':>9}{'std':>9}{'chance':>9}   runs"]
    for score in scores:
        runs = " ".join(f"{accuracy:.4f}" for accuracy in score.runs)
        lines.append(
            f"{score.job.task.name:<14}{score.job.ipc:>5}{score.steps:>9,}{score.mean:>9.4f}{score.std:>9.4f}"
            f"{chance(score.job.task):>9.4f}   {runs}"
        )
    return "\n".join([*lines, f"correct: {overall(scores)}"])


def overall(scores: list[Score]) -> float:
    """The challenge's figure: the mean over tasks of the mean over runs."""
    return statistics.fmean(score.mean for score in scores)


def chance(task: Task) -> float:
    """Accuracy of a guess."""
    return 1 / len(task.classes)


def duration(seconds: float) -> str:
    """Seconds as a person would say them: 8 s, 12 min, 2 h 40 min."""
    if seconds < 60:
        return f"{math.ceil(seconds)} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02} min"


if __name__ == "__main__":
    sys.exit(main())
