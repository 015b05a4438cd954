"""The training asks for the class it means."""

from dataclasses import replace

import pytest
import torch

from submission.tasks import load_task
from tools.training import layout
from tools.training.images import RealImages
from tools.training.prompts import Prompts, encode_prompts, encode_rows, phrasings_of, prompts_of

CPU = torch.device("cpu")
# The last has no diverse prompts.
TASKS = [load_task("cifar100"), load_task("tinyimagenet"), replace(load_task("cifar100"), phrasings={})]


@pytest.fixture(scope="module")
def networks() -> layout.Networks:
    torch.manual_seed(0)
    return layout.build_networks([p for task in TASKS for p in task.prompts("described")[0]], "small", 32)


@pytest.fixture(scope="module")
def prompts(networks: layout.Networks) -> Prompts:
    return prompts_of(networks, TASKS, CPU)


def test_rows_are_drawn_of_the_classes_meant(networks: layout.Networks, prompts: Prompts) -> None:
    labels = torch.tensor([3, 130, 299, 310]).repeat(50)
    drawn = prompts.ids[prompts.draw_phrasings(labels, torch.Generator().manual_seed(1))]
    for label, ids in zip(labels.tolist(), drawn, strict=True):
        task, number = next((TASKS[i], label - first) for i, first in ((2, 300), (1, 100), (0, 0)) if label >= first)
        of_class = [phrasing[number] for phrasing in phrasings_of(task)]
        assert (layout.token_ids(networks, of_class) == ids).all(dim=1).any()


def test_every_prompt_is_encoded_in_its_row(networks: layout.Networks, prompts: Prompts) -> None:
    encoded = encode_prompts(networks, prompts)
    rows = torch.tensor([0, 1234, prompts.empty])
    one_by_one = layout.encode(networks, prompts.ids[rows])
    torch.testing.assert_close(encoded.of(rows).tokens, one_by_one.tokens, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(encoded.of(rows).pooled, one_by_one.pooled, atol=1e-5, rtol=1e-4)
    assert torch.equal(prompts.ids[prompts.empty], layout.token_ids(networks, [""])[0])


def test_of_few_prompts_each_is_encoded_once_and_the_same(networks: layout.Networks, prompts: Prompts) -> None:
    few = Prompts(prompts.ids[:4], prompts.rows[:2] % 4, prompts.shares)
    rows = torch.tensor([3, 1, 1, 0, 2])
    torch.testing.assert_close(
        encode_rows(networks, few, rows).tokens, encode_rows(networks, prompts, rows).tokens, atol=1e-5, rtol=1e-4
    )


def test_classes_are_drawn_as_often_as_they_have_images(prompts: Prompts) -> None:
    counts = torch.zeros(200, dtype=torch.long)
    counts[[7, 150]] = torch.tensor([30, 10])
    images = RealImages(torch.empty(40, 3, 1, 1), counts, first=100)
    drawn = prompts.draw(images, 4000, torch.Generator().manual_seed(2))
    of_first = torch.isin(drawn, prompts.rows[107])
    assert (of_first | torch.isin(drawn, prompts.rows[250])).all()
    assert of_first.float().mean().item() == pytest.approx(0.75, abs=0.03)
