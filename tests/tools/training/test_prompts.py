"""The training asks for the class it means."""

import pytest
import torch

from submission.tasks import load_task
from tools.training import layout
from tools.training.prompts import STYLE_SHARES, Prompts, encode_prompts, prompts_of

TASKS = [load_task("cifar100"), load_task("tinyimagenet")]


@pytest.fixture(scope="module")
def networks() -> layout.Networks:
    torch.manual_seed(0)
    return layout.build_networks([p for task in TASKS for p in task.prompts("described")[0]])


@pytest.fixture(scope="module")
def prompts(networks: layout.Networks) -> Prompts:
    return prompts_of(networks, TASKS, torch.ones(300))


def test_rows_are_drawn_of_the_classes_meant(networks: layout.Networks, prompts: Prompts) -> None:
    labels = torch.tensor([3, 130, 299]).repeat(50)
    drawn = prompts.ids[prompts.draw_phrasings(labels, torch.Generator().manual_seed(1))]
    for label, ids in zip(labels.tolist(), drawn, strict=True):
        task, number = (TASKS[0], label) if label < 100 else (TASKS[1], label - 100)
        of_class = [phrasing[number] for style in STYLE_SHARES for phrasing in task.prompts(style)]
        assert (layout.token_ids(networks, of_class) == ids).all(dim=1).any()


def test_every_prompt_is_encoded_in_its_row(networks: layout.Networks, prompts: Prompts) -> None:
    encoded = encode_prompts(networks, prompts)
    rows = torch.tensor([0, 1234, prompts.empty])
    one_by_one = layout.encode(networks, prompts.ids[rows])
    torch.testing.assert_close(encoded.of(rows).tokens, one_by_one.tokens, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(encoded.of(rows).pooled, one_by_one.pooled, atol=1e-5, rtol=1e-4)
    assert torch.equal(prompts.ids[prompts.empty], layout.token_ids(networks, [""])[0])


def test_classes_are_drawn_as_often_as_they_have_images(networks: layout.Networks) -> None:
    counts = torch.zeros(300)
    counts[[7, 250]] = torch.tensor([30.0, 10.0])
    drawn = prompts_of(networks, TASKS, counts).draw(4000, torch.Generator().manual_seed(2)) % 300
    assert set(drawn.tolist()) == {7, 250}
    assert (drawn == 7).float().mean().item() == pytest.approx(0.75, abs=0.03)
