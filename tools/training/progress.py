"""Where a training stands: its steps, its log, and the state that a killed one goes on from."""

import io
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn

from submission.errors import OutputError
from tools.training.muon import Muon

WARM_UP = 50  # steps, or a tenth of all where that is less
CLIP_NORM = 1.0
LOG_EVERY = 50  # steps that a line of the log is the mean of
ADAMS_SHARE = 1 / 3  # of the rate, for what Muon does not take: text encoders, biases and norms


@dataclass
class Journal:
    """The lines of the log, and the losses of steps that are not in it yet: scalars on the device."""

    lines: list[str] = field(default_factory=list)
    unlogged: list[dict[str, Tensor]] = field(default_factory=list)


@dataclass
class Progress:
    """Where the training stands, `networks` by name included: all that a resumed one needs."""

    output: Path
    save_every: int  # steps
    networks: dict[str, nn.Module]
    generator: torch.Generator  # of the device that trains
    settings: dict[str, Any]  # what a resumed training must have been begun with
    stage: str = "vae"
    step: int = 0  # done in this stage
    seconds: float = 0.0  # of steps so far, over all starts
    optimisers: list[dict[str, Any]] | None = None
    journal: Journal = field(default_factory=Journal)


def start(progress: Progress, *, resume: bool) -> None:
    """Make the output folder ready: take up its state, or refuse one that holds a training already.

    Raises OutputError, and OSError as all that writes there.
    """
    kept = progress.output / "state.pt"
    progress.output.mkdir(parents=True, exist_ok=True)
    if kept.exists() and not resume:
        raise OutputError(f"{kept} is there from another training: go on with --resume, or choose another --output")
    if kept.exists():
        _load(kept, progress)
    elif not resume:
        for of_another in ("critic.pt", "pairs.pt"):
            (progress.output / of_another).unlink(missing_ok=True)
    (progress.output / "training.log").write_text("".join(line + "\n" for line in progress.journal.lines))


def begin_stage(progress: Progress, stage: str) -> None:
    progress.stage, progress.step, progress.optimisers, progress.journal.unlogged = stage, 0, None, []
    save(progress)


def steps(
    progress: Progress,
    optimisers: Sequence[torch.optim.Optimizer],
    total: int,
    on_save: Callable[[], None] = lambda: None,
) -> Iterator[int]:
    """Numbers of the steps left to do, the learning rates set before each, the state saved after some.

    The rates rise linearly over WARM_UP steps at most, to what the optimisers were made with, and fall to nothing along
    half a cosine.
    """
    rates = [[group["lr"].item() for group in optimiser.param_groups] for optimiser in optimisers]
    if progress.optimisers is not None:
        for optimiser, state in zip(optimisers, progress.optimisers, strict=True):
            optimiser.load_state_dict(state)
    warm_up = min(WARM_UP, total / 10)
    for step in range(progress.step, total):
        started = time.monotonic()
        factor = min(1.0, (step + 1) / warm_up) * 0.5 * (1 + math.cos(math.pi * step / total))
        for optimiser, highest in zip(optimisers, rates, strict=True):
            for group, rate in zip(optimiser.param_groups, highest, strict=True):
                group["lr"].fill_(rate * factor)
        yield step
        progress.step = step + 1
        progress.seconds += time.monotonic() - started
        if progress.step % progress.save_every == 0 or progress.step == total:
            progress.optimisers = [optimiser.state_dict() for optimiser in optimisers]
            save(progress)
            on_save()


def adam(parameters: Sequence[Tensor], rate: float) -> torch.optim.AdamW:
    """AdamW whose rate and step a recorded step can read from the device."""
    device = parameters[0].device
    return torch.optim.AdamW(
        parameters,
        lr=torch.tensor(rate, device=device),
        betas=(0.9, 0.99),
        weight_decay=0.0,
        capturable=device.type == "cuda",
    )


def optimisers_of(
    unet: nn.Module, rate: float, *others: nn.Module
) -> tuple[Sequence[Tensor], list[torch.optim.Optimizer]]:
    """The parameters of the UNet and the others, and what trains them: Muon the UNet's weights at `rate`, Adam the
    rest at ADAMS_SHARE of it."""
    weights = [p for p in unet.parameters() if p.ndim > 1]
    rest = [p for p in unet.parameters() if p.ndim == 1]
    rest += [p for network in others for p in network.parameters()]
    muon = Muon(weights, torch.tensor(rate, device=weights[0].device))
    return weights + rest, [muon, adam(rest, rate * ADAMS_SHARE)]


def update(optimisers: Sequence[torch.optim.Optimizer], parameters: Sequence[Tensor], loss: Tensor) -> None:
    """One step down the gradient of `loss`, whose norm over all parameters is cut off at CLIP_NORM."""
    for parameter in parameters:
        parameter.grad = None
    torch.autograd.backward(loss)
    torch.nn.utils.clip_grad_norm_(parameters, CLIP_NORM)
    for optimiser in optimisers:
        optimiser.step()


def record(progress: Progress, **losses: Tensor) -> None:
    """Note the losses of a step, scalars that may be written over; every LOG_EVERY steps their means go into the log
    and onto the screen."""
    journal = progress.journal
    journal.unlogged.append({name: loss.clone() for name, loss in losses.items()})
    done = progress.step + 1
    if done % LOG_EVERY:
        return
    means = {name: fmean(step[name].item() for step in journal.unlogged) for name in losses}
    line = f"{progress.stage} {done} " + " ".join(f"{name}={mean:.5f}" for name, mean in means.items())
    journal.unlogged = []
    journal.lines.append(line)
    with (progress.output / "training.log").open("a") as log:
        log.write(line + "\n")
    print(f"{line} ({progress.seconds:.0f} s)", flush=True)


def save(progress: Progress) -> None:
    """Put everything that a resumed run needs into one file."""
    state = {
        "settings": progress.settings,
        "networks": {name: network.state_dict() for name, network in progress.networks.items()},
        "stage": progress.stage,
        "step": progress.step,
        "seconds": progress.seconds,
        "optimisers": progress.optimisers,
        "log": progress.journal.lines,
        "unlogged": progress.journal.unlogged,
        "generator": progress.generator.get_state(),
    }
    save_whole(state, progress.output / "state.pt")


def save_whole(value: Any, path: Path) -> None:
    """Save beside the place and move in: a kill leaves what was there before, or the whole of the new."""
    unfinished = path.with_name(path.name + ".part")
    whole = io.BytesIO()
    torch.save(value, whole)  # not to the disk: of a full one torch would say that a position is unexpected
    unfinished.write_bytes(whole.getbuffer())
    unfinished.replace(path)


def _load(path: Path, progress: Progress) -> None:
    state = torch.load(path, map_location=progress.generator.device, weights_only=True)
    settings = state.get("settings", {})  # none: begun by an earlier version
    if settings != progress.settings:
        begun = ", ".join(f"{name} {value}" for name, value in settings.items()) or "an earlier version's"
        raise OutputError(f"{path} is of a training with other options ({begun}): give the same, or another --output")
    for name, network in progress.networks.items():
        network.load_state_dict(state["networks"][name])
    progress.generator.set_state(state["generator"].cpu())
    for name in ("stage", "step", "seconds", "optimisers"):
        setattr(progress, name, state[name])
    progress.journal = Journal(state["log"], state["unlogged"])
