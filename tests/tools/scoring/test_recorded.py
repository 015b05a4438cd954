"""A recorded step does what the step does."""

import pytest
import torch
from torch import Tensor, nn

from tools.scoring.recorded import recorded
from tools.training.progress import optimisers_of, update


def losses_of_training(device: torch.device, *, record: bool) -> list[float]:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(8, 8), nn.SiLU(), nn.Linear(8, 8)).to(device)
    parameters, optimisers = optimisers_of(network, 1e-2)

    def learn(inputs: Tensor) -> Tensor:
        loss: Tensor = (network(inputs) - inputs.flip(1)).square().mean()
        update(optimisers, parameters, loss)
        return loss.detach()

    step = recorded(learn, device) if record else learn
    batches = torch.randn(12, 16, 8, generator=torch.Generator().manual_seed(1))
    losses = []
    for batch in batches:
        losses.append(step(batch.to(device)).item())
        for optimiser in optimisers:
            optimiser.param_groups[0]["lr"].mul_(0.9)  # a recording has to see it
    return losses


def test_on_a_cpu_nothing_is_recorded() -> None:
    def function(inputs: Tensor) -> Tensor:
        return inputs

    assert recorded(function, torch.device("cpu")) is function


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_recorded_training_learns_as_an_ordinary_one() -> None:
    cuda = torch.device("cuda")
    assert losses_of_training(cuda, record=True) == pytest.approx(losses_of_training(cuda, record=False), rel=1e-2)


def test_optimisers_learn() -> None:
    losses = losses_of_training(torch.device("cpu"), record=True)
    assert losses[-1] < 0.95 * losses[0]
