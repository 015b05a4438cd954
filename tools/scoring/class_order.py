"""Are the classes of a training set in the evaluator's order? A trained network's mistakes tell.

A file in the wrong order teaches the network right pictures under wrong names: it confuses classes not by likeness but
one for one. If naming its outputs otherwise makes it several times as accurate, the order is wrong.
"""

import math
from dataclasses import dataclass

import torch
from scipy.optimize import linear_sum_assignment

from submission.tasks import Task

# CIFAR-100's classes by superclass, in the order of the data set's own page. Both lists are nearly in
# alphabetical order, and so are easily taken for the order of the labels, which is that of all classes together.
CIFAR100_BY_SUPERCLASS = """
beaver dolphin otter seal whale aquarium_fish flatfish ray shark trout orchid poppy rose sunflower tulip bottle bowl can
cup plate apple mushroom orange pear sweet_pepper clock keyboard lamp telephone television bed chair couch table
wardrobe bee beetle butterfly caterpillar cockroach bear leopard lion tiger wolf bridge castle house road skyscraper
cloud forest mountain plain sea camel cattle chimpanzee elephant kangaroo fox porcupine possum raccoon skunk crab
lobster snail spider worm baby boy girl man woman crocodile dinosaur lizard snake turtle hamster mouse rabbit shrew
squirrel maple_tree oak_tree palm_tree pine_tree willow_tree bicycle bus motorcycle pickup_truck train lawn_mower rocket
streetcar tank tractor
""".split()  # noqa: SIM905
# Another order is believed when the accuracy under it is this many times the accuracy as things are, and the
# difference this many of its standard errors.
FAR_BETTER = 1.5
STANDARD_ERRORS = 3.0
# And when it is so many times chance or, of two classes, halfway from chance to 1: a network that has learnt next to
# nothing takes one kind of images for one class, and the order that suits this is better than chance.
LEARNT = 2.0
# Misplaced classes that a person is told; `results.json` has the whole order.
SHOWN = 5


@dataclass(frozen=True)
class Verdict:
    """What the audit found. An order is a list of classes, one a position: what the file holds there."""

    accuracy: float  # 0..1, as the file stands, mean over runs
    best_accuracy: float  # 0..1, under the best other order
    suspect: bool
    order: tuple[int, ...]  # the order believed: 0, 1, 2, ... unless suspect
    known_as: str | None = None  # what the suspected order is called, where it is a known one

    def statement(self, task: Task) -> str:
        """What to tell a person."""
        if not self.suspect:
            return f"class order: ok (no other order scores far better; the best gives {self.best_accuracy:.4f})"
        moved = [
            f"{task.classes[found].name} where {task.classes[position].name} should be"
            for position, found in enumerate(self.order)
            if position != found
        ]
        shown = ", ".join(moved[:SHOWN]) + f" and {len(moved) - SHOWN} more" * (len(moved) > SHOWN)
        sorting = f"sorted {self.known_as}, " if self.known_as else ""
        return (
            f"class order: SUSPECT: the classes seem to be {sorting}not in the evaluator's order: {shown}. "
            f"The accuracy of {self.accuracy:.4f} would be {self.best_accuracy:.4f} in the right order"
        )


def judge(task: Task, labels: torch.Tensor, runs: list[torch.Tensor]) -> Verdict:
    """Look for an order of classes that explains the predictions far better than the evaluator's.

    The matching of outputs to classes that fits best (an assignment problem) would flatter itself on the images it was
    fitted to, so it is fitted on half of them and scored on the other, both ways. Orders that are known mistakes need
    no fitting.

    Args:
        labels: int64 [N], the classes of the test images.
        runs: predictions of one network each, int64 [N].
    """
    classes = len(task.classes)
    half = _halves(labels)
    # confusion[h, c, p]: how often half h's images of class c were taken for class p, over all runs.
    confusion = torch.zeros(2, classes, classes, dtype=torch.int64)
    for predictions in runs:
        confusion.index_put_((half, labels, predictions), torch.tensor(1), accumulate=True)
    total = confusion.sum(0)
    guesses = int(total.sum())
    evaluators = tuple(range(classes))
    accuracy = _recognised(total, evaluators) / guesses
    # The known ones first: `max` takes the first of those as good, and a known order is often the best matching too.
    candidates: list[tuple[int, str | None, tuple[int, ...]]] = [
        (_recognised(total, order), name, order) for name, order in known_orders(task).items()
    ]
    fitted = sum(_recognised(confusion[1 - h], _matching(confusion[h])) for h in (0, 1))
    candidates.append((fitted, None, _matching(total)))
    recognised, name, order = max(candidates, key=lambda candidate: candidate[0])
    best_accuracy = recognised / guesses
    noise = math.sqrt((accuracy + best_accuracy) / len(labels))
    learnt = min(LEARNT / classes, (1 + 1 / classes) / 2)
    suspect = best_accuracy > max(FAR_BETTER * accuracy, accuracy + STANDARD_ERRORS * noise, learnt)
    if not suspect:
        return Verdict(accuracy, best_accuracy, False, evaluators)
    return Verdict(accuracy, best_accuracy, True, order, name)


def known_orders(task: Task) -> dict[str, tuple[int, ...]]:
    """Orders that people take for the evaluator's, by what they sort by. The evaluator's own is not among them."""
    names = [one.name for one in task.classes]
    orders = {
        "by name": tuple(sorted(range(len(names)), key=lambda index: names[index].lower())),
        "by name, capitals first": tuple(sorted(range(len(names)), key=lambda index: names[index])),
    }
    if sorted(CIFAR100_BY_SUPERCLASS) == sorted(names):
        orders["by superclass"] = tuple(names.index(name) for name in CIFAR100_BY_SUPERCLASS)
    return {name: order for name, order in orders.items() if order != tuple(range(len(names)))}


def _recognised(confusion: torch.Tensor, order: tuple[int, ...]) -> int:
    """How many images are recognised if position p of the training set held class order[p]."""
    return int(confusion[list(order), range(len(order))].sum())


def _matching(confusion: torch.Tensor) -> tuple[int, ...]:
    """The order with the most images recognised."""
    positions, classes = linear_sum_assignment(confusion.t().numpy(), maximize=True)
    assert (positions == range(len(confusion))).all()
    return tuple(classes.tolist())


def _halves(labels: torch.Tensor) -> torch.Tensor:
    """0 or 1 for each image, int64 [N], so that each class is divided evenly."""
    by_class = labels.argsort(stable=True)
    half = torch.empty_like(labels)
    half[by_class] = torch.arange(len(labels)) % 2
    return half
