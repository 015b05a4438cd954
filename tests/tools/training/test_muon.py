"""Muon: its updates are orthogonal, it takes convolutions, and goes on from its state."""

import copy

import torch
from torch import nn

from tools.training.muon import Muon, orthogonal


def test_updates_have_singular_values_about_one() -> None:
    torch.manual_seed(0)
    for shape in ((2, 24, 90), (2, 90, 24), (2, 16, 16)):
        skewed = torch.randn(shape) @ torch.diag(torch.logspace(0, -1.5, shape[2]))
        values = torch.linalg.svdvals(orthogonal(skewed))
        assert values.min() > 0.5 and values.max() < 1.4


def test_it_learns_weak_directions_that_adam_is_slow_to() -> None:
    """A linear map of inputs whose directions differ a hundredfold in size, through a convolution."""

    def error_after(kind: type[Muon] | type[torch.optim.Adam]) -> float:
        torch.manual_seed(1)
        layer, truth = (nn.Conv2d(32, 32, 1, bias=False) for _ in range(2))
        turned, _ = torch.linalg.qr(torch.randn(32, 32))  # or Adam, which scales every input by itself, would do well
        mixing = turned * torch.logspace(0, -2, 32)
        optimiser = kind(layer.parameters(), lr=torch.tensor(1e-2))
        for step in range(150):
            for group in optimiser.param_groups:
                group["lr"].fill_(1e-2 * (1 - step / 150))
            inputs = torch.einsum("ij,njhw->nihw", mixing, torch.randn(64, 32, 2, 2))
            optimiser.zero_grad()
            (layer(inputs) - truth(inputs)).square().mean().backward()
            optimiser.step()
        return (layer.weight - truth.weight).square().mean().item()

    assert error_after(Muon) < error_after(torch.optim.Adam)


def test_it_goes_on_from_its_state() -> None:
    torch.manual_seed(2)
    layer = nn.Linear(8, 4)
    optimiser = Muon([layer.weight], lr=torch.tensor(1e-2))
    inputs = torch.randn(10, 8)

    def step(network: nn.Linear, by: Muon) -> None:
        network.weight.grad = None
        network(inputs).square().mean().backward()
        by.step()

    step(layer, optimiser)
    other = copy.deepcopy(layer)
    resumed = Muon([other.weight], lr=torch.tensor(1e-2))
    resumed.load_state_dict(copy.deepcopy(optimiser.state_dict()))
    for _ in range(3):
        step(layer, optimiser)
        step(other, resumed)
    assert torch.equal(layer.weight, other.weight)
