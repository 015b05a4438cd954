"""The audit of the order of classes: alarms where there is cause, names known mistakes, and is quiet otherwise."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from submission.distillation.convnet import ConvNet
from submission.tasks import Task, load_task
from tests.tools.real_data import real_subset, real_test_images
from tools.scoring.class_order import Verdict, judge, known_orders
from tools.scoring.fast import make_forward, probe
from tools.scoring.training import Schedule, assess, train

CIFAR100 = load_task("cifar100")
TINY_IMAGENET = load_task("tinyimagenet")


def guesses(labels: torch.Tensor, classes: int, accuracy: float, seed: int) -> torch.Tensor:
    """Predictions that are right that often, and else spread unevenly, as a network's are."""
    generator = np.random.default_rng(seed)
    favourites = generator.dirichlet(np.full(classes, 0.3))
    others = generator.choice(classes, len(labels), p=favourites)
    return torch.from_numpy(np.where(generator.random(len(labels)) < accuracy, labels.numpy(), others))


def order_of(task: Task, seed: int) -> torch.Tensor:
    return torch.randperm(len(task.classes), generator=torch.Generator().manual_seed(seed))


def as_trained_on(order: torch.Tensor, predictions: torch.Tensor) -> torch.Tensor:
    """What a network says that knows the classes by their positions in a file of that order."""
    return order.argsort()[predictions]


@given(
    accuracy=st.floats(0, 1), runs=st.integers(1, 3), images=st.sampled_from([1, 3, 25, 50]), seed=st.integers(0, 99)
)
@settings(max_examples=60)
def test_the_right_order_raises_no_alarm(accuracy: float, runs: int, images: int, seed: int) -> None:
    labels = torch.arange(100).repeat_interleave(images)
    predictions = [guesses(labels, 100, accuracy, seed + run) for run in range(runs)]
    verdict = judge(CIFAR100, labels, predictions)
    assert not verdict.suspect
    assert verdict.order == tuple(range(100))
    right = sum((labels == one).double().mean().item() for one in predictions) / runs
    assert verdict.accuracy == pytest.approx(right)


def test_a_network_that_has_learnt_next_to_nothing_raises_no_alarm() -> None:
    """It takes half of ten classes for one, and half for another, both wrong: other names would suit it better."""
    task = replace(CIFAR100, classes=CIFAR100.classes[:10])
    labels = torch.arange(10).repeat(30)
    verdict = judge(task, labels, [torch.where(labels < 5, 9, 0)])
    assert verdict.accuracy == 0 and verdict.best_accuracy == 0.2 and not verdict.suspect


@given(accuracy=st.floats(0.06, 1), seed=st.integers(0, 99))
@example(accuracy=0.330078125, seed=93)  # where shares instead of counts were compared, rounding hid the name
@settings(max_examples=30)
def test_the_superclass_order_is_named(accuracy: float, seed: int) -> None:
    labels = torch.arange(100).repeat(50)
    order = torch.tensor(known_orders(CIFAR100)["by superclass"])
    verdict = judge(CIFAR100, labels, [as_trained_on(order, guesses(labels, 100, accuracy, seed))])
    assert verdict.suspect
    assert verdict.known_as == "by superclass"
    assert verdict.order == tuple(order.tolist())
    assert "sorted by superclass" in verdict.statement(CIFAR100)


def test_the_superclass_order_is_the_published_one() -> None:
    order = known_orders(CIFAR100)["by superclass"]
    assert sorted(order) == list(range(100))
    # The published entry's: 1 of 100 labels right.
    assert sum(position == found for position, found in enumerate(order)) == 1


@given(accuracy=st.floats(0.15, 1), seed=st.integers(0, 99))
@settings(max_examples=20)
def test_an_unknown_order_is_found(accuracy: float, seed: int) -> None:
    labels = torch.arange(200).repeat(25)
    order = order_of(TINY_IMAGENET, seed)
    verdict = judge(TINY_IMAGENET, labels, [as_trained_on(order, guesses(labels, 200, accuracy, seed + 1))])
    assert verdict.suspect
    assert verdict.known_as is None
    found = torch.tensor(verdict.order)
    assert (found == order).double().mean() > 0.7
    assert verdict.best_accuracy <= accuracy + 0.03  # no better than what the network really knows


def test_sorted_names_are_known_for_numbered_classes() -> None:
    labels = torch.arange(200).repeat(25)
    order = torch.tensor(known_orders(TINY_IMAGENET)["by name"])
    verdict = judge(TINY_IMAGENET, labels, [as_trained_on(order, guesses(labels, 200, 0.2, 0))])
    assert verdict.known_as == "by name"


def test_two_classes_exchanged_are_far_from_another_order() -> None:
    labels = torch.arange(100).repeat(50)
    order = torch.arange(100)
    order[[3, 70]] = order[[70, 3]]
    assert not judge(CIFAR100, labels, [as_trained_on(order, guesses(labels, 100, 0.3, 0))]).suspect


def judge_after(schedule: Schedule, images: torch.Tensor, every: int, seed: int, *, fast: bool = False) -> Verdict:
    """The verdict of a network trained on a file's images, 10 a class, on every so manieth real test image."""
    torch.manual_seed(seed)
    net = ConvNet(100, 32)
    forward = make_forward(net, schedule.batch_size, probe(net, schedule.batch_size)) if fast else net
    train(net, images, torch.arange(100).repeat_interleave(10), schedule, forward=forward)
    tests, labels = real_test_images(CIFAR100)
    return judge(CIFAR100, labels[::every], [assess(net, tests[::every], labels[::every])[1]])


def test_real_images_in_the_superclass_order() -> None:
    order = known_orders(CIFAR100)["by superclass"]
    images = real_subset(CIFAR100, ipc=10, seed=0).view(100, 10, 3, 32, 32)[list(order)].flatten(0, 1)
    verdict = judge_after(Schedule(max_steps=20, batch_size=64), images, every=4, seed=0)
    assert verdict.suspect
    assert verdict.known_as == "by superclass"
    assert verdict.accuracy < 0.02 < verdict.best_accuracy


@pytest.mark.long
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("seed", range(20))
def test_real_images_in_the_right_order(seed: int) -> None:
    images = real_subset(CIFAR100, ipc=10, seed=seed)
    verdict = judge_after(Schedule(max_steps=150), images, every=1, seed=seed, fast=True)
    assert not verdict.suspect, verdict
    assert verdict.accuracy > 0.05
