"""What an evaluation found, as files for machines and a summary for people."""

import io
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property

import torch
from matplotlib.figure import Figure

from submission.tasks import Task
from tools.reading.tensor_files import LabelledImages
from tools.scoring import class_order
from tools.scoring.findings import Finding
from tools.scoring.training import Measure

# Accuracies of the published entry (Su et al., Generative Dataset Distillation Based on Diffusion Model, 2024).
PUBLISHED = {"cifar100": 0.0137, "tinyimagenet": 0.0478}
# Classes named at either end of the list by accuracy.
NAMED_CLASSES = 5
# Points of a learning curve: each is the mean over as many steps as that takes.
CURVE_POINTS = 100


@dataclass(frozen=True)
class Entry:
    """One task's data, checked."""

    task: Task
    train: LabelledImages
    test: LabelledImages
    findings: list[Finding]  # of the file's audit

    @property
    def ipc(self) -> int:
        return len(self.train.labels) // len(self.task.classes)


@dataclass(frozen=True)
class Run:
    """One network: its test accuracy (0..1) and predictions (int64 [N]), and a measure of every step of training."""

    accuracy: float
    predictions: torch.Tensor
    measures: list[Measure]


@dataclass(frozen=True)
class Score:
    """The runs on one task, and the SGD steps of each."""

    entry: Entry
    runs: list[Run]
    steps: int

    @property
    def accuracies(self) -> list[float]:
        return [run.accuracy for run in self.runs]

    @property
    def mean(self) -> float:
        return statistics.fmean(self.accuracies)

    @property
    def std(self) -> float:
        """Population standard deviation of these runs, as numpy and the paper compute it."""
        return statistics.pstdev(self.accuracies)

    @cached_property
    def by_class(self) -> dict[str, float]:
        """Accuracy by class, mean over runs, for classes that the test set holds."""
        labels = self.entry.test.labels
        right = torch.stack([run.predictions == labels for run in self.runs]).double().mean(0)
        return {
            one.name: right[mask].mean().item()
            for one in self.entry.task.classes
            if (mask := labels == one.index).any()
        }

    @cached_property
    def class_order(self) -> class_order.Verdict:
        return class_order.judge(self.entry.task, self.entry.test.labels, [run.predictions for run in self.runs])


def overall(scores: Sequence[Score]) -> float:
    """The challenge's figure: the mean over tasks of the mean over runs."""
    return statistics.fmean(score.mean for score in scores)


def figures(scores: Sequence[Score]) -> dict[str, object]:
    """The part of `results.json` that the runs give."""
    return {"tasks": {score.entry.task.name: _task_figures(score) for score in scores}, "score": overall(scores)}


def summary(scores: Sequence[Score]) -> str:
    """The scores for a person: a line a task, what the classes say, and the mean over tasks."""
    lines = [f"{'task':<14}{'IPC':>5}{'steps':>9}{'mean':>9}{'std':>9}{'chance':>9}{'published':>11}   runs"]
    for score in scores:
        name = score.entry.task.name
        published = f"{PUBLISHED[name]:.4f}" if name in PUBLISHED else "-"
        runs = " ".join(f"{accuracy:.4f}" for accuracy in score.accuracies)
        lines.append(
            f"{name:<14}{score.entry.ipc:>5}{score.steps:>9,}{score.mean:>9.4f}{score.std:>9.4f}"
            f"{_chance(score.entry.task):>9.4f}{published:>11}   {runs}"
        )
    for score in scores:
        ranked = sorted(score.by_class.items(), key=lambda item: -item[1])
        lines += [
            f"{score.entry.task.name}:",
            f"  best classes: {_named(ranked[:NAMED_CLASSES])}",
            f"  worst classes: {_named(ranked[::-1][:NAMED_CLASSES])}",
            f"  {score.class_order.statement(score.entry.task)}",
        ]
    return "\n".join([*lines, f"correct: {overall(scores)}"])


def draw_curves(scores: Sequence[Score]) -> bytes:
    """A PNG of accuracy against SGD steps: in training, a line per run, and on the test images at the end."""
    figure = Figure(figsize=(6.4 * len(scores), 4.2), layout="constrained", dpi=120)
    for axes, score in zip(figure.subplots(1, len(scores), squeeze=False)[0], scores, strict=True):
        for number, run in enumerate(score.runs):
            points = _curve(run.measures)
            colour, label = f"C{number}", f"run {number + 1}: {run.accuracy:.4f} on test images"
            axes.plot(points["step"], points["accuracy"], color=colour, label=label)
            axes.plot(score.steps, run.accuracy, "o", color=colour, clip_on=False)
        axes.axhline(_chance(score.entry.task), color="grey", linestyle=":", label="chance")
        axes.set(
            title=f"{score.entry.task.title}, {score.entry.ipc} images per class",
            xlabel="SGD steps",
            ylabel="accuracy in training (augmented images)",
            ylim=(0, 1),
        )
        axes.legend(loc="upper left", frameon=False)
    png = io.BytesIO()
    figure.savefig(png, format="png")
    return png.getvalue()


def _task_figures(score: Score) -> dict[str, object]:
    task, order = score.entry.task, score.class_order
    return {
        "accuracy_mean": score.mean,
        "accuracy_std": score.std,
        "runs": score.accuracies,
        "chance": _chance(task),
        "published": PUBLISHED.get(task.name),
        "ipc": score.entry.ipc,
        "steps": score.steps,
        "class_order": "suspect" if order.suspect else "ok",
        "class_order_audit": {
            "best_accuracy": order.best_accuracy,
            "known_as": order.known_as,
            "statement": order.statement(task),
            "likely_order": [task.classes[index].name for index in order.order] if order.suspect else None,
        },
        "accuracy_by_class": score.by_class,
        "findings": [asdict(finding) for finding in score.entry.findings],
        "learning_curves": [_curve(run.measures) for run in score.runs],
    }


def _curve(measures: Sequence[Measure]) -> dict[str, list[float]]:
    """Means over successive parts of a run: the number of the last step, loss and accuracy."""
    span = -(-len(measures) // CURVE_POINTS)
    parts = [measures[start : start + span] for start in range(0, len(measures), span)]
    return {
        "step": [min((number + 1) * span, len(measures)) for number in range(len(parts))],
        "loss": [statistics.fmean(measure.loss for measure in part) for part in parts],
        "accuracy": [statistics.fmean(measure.accuracy for measure in part) for part in parts],
    }


def _chance(task: Task) -> float:
    """Accuracy of guessing."""
    return 1 / len(task.classes)


def _named(ranked: Sequence[tuple[str, float]]) -> str:
    return ", ".join(f"{name} {accuracy:.2f}" for name, accuracy in ranked)
