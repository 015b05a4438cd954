"""Where a training stands: its stages and their time, steps and log, and the state that a killed one goes on from."""

import hashlib
import io
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from operator import mul
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn

from submission.errors import OutputError, first_line
from submission.log import Log
from submission.machine.disk import write_whole
from submission.plan.budget import Budget
from tools.training import processes
from tools.training.images import RealImages
from tools.training.muon import Muon

# What is done one after the other, and the share of the time after the images are read that each gets. Of other splits
# none was tried; docs/own-data.md has the steps that each stage comes to.
SHARES = {"critic": 0.03, "vae": 0.07, "diffusion": 0.52, "pairs": 0.1, "distil": 0.13, "match": 0.15}
STAGES = tuple(SHARES)
DONE = "done"
# A student whose teacher had so many steps is not matched: after 16,743, on an H200, its training sets were no better
# for it (submission/embedded/README.md). Trainings with fewer were measured with that stage alone.
MATCHED_BELOW = 5000
STATE, LOG, CHECKPOINT = "state.pt", "training.log", "checkpoint"  # in the output

WARM_UP = 20  # steps in which the rates rise
STEADY = 0.7  # share of a stage in which the rates stay; then they fall to nothing
OVERRUN = 0.05  # share of a stage's time by which it may be late; the stages after it have less
SETTLED = 3  # steps before the pace is measured: the first ones allocate and record
CHECK_SECONDS = 0.5  # after which several processes ask the first one how late it is, which they wait for
SAVE_SECONDS = 60.0  # between saves of the state, the most that a kill loses
CLIP_NORM = 1.0
LOG_EVERY = 10  # steps that a line of the log is the mean of
ADAMS_SHARE = 1 / 3  # of the rate, for what Muon does not take: text encoders, biases and norms
# Of the batches that suit a GPU a CPU takes a fourth, for more steps in the same time; and so many images at least.
LESS_ON_A_CPU = 4
LEAST_BATCH = 8


@dataclass
class Journal:
    """The lines of the log, the losses of steps that are not in it yet, scalars on the device, the steps of each stage
    that is over, what was last found about copying, and the warnings so far."""

    lines: list[str] = field(default_factory=list)
    unlogged: list[dict[str, Tensor]] = field(default_factory=list)
    steps: dict[str, int] = field(default_factory=dict)
    copying: dict[str, Any] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)


@dataclass
class Place:
    """A stage, the steps of it that are done, and its time: moments of the budget, in seconds.

    The rates fall from step `falls` on, and the stage is over after step `ends`; both are None until then.
    """

    stage: str = STAGES[0]
    began: float = 0.0
    until: float = 0.0
    step: int = 0
    falls: int | None = None
    ends: int | None = None


@dataclass
class Progress:
    """Where the training stands, `networks` by name included: all that a resumed one needs."""

    output: Path
    budget: Budget
    log: Log
    networks: dict[str, nn.Module]
    generator: torch.Generator  # of the device that trains; seeded anew for every step
    settings: dict[str, Any]  # what a resumed training must have been begun with
    place: Place = field(default_factory=Place)
    optimisers: list[dict[str, Any]] | None = None
    journal: Journal = field(default_factory=Journal)
    ending: float = 10.0  # seconds at the end for checkpoint, page and exit; measured on the way

    @property
    def stopped(self) -> bool:
        """Whether it was told to finish with what there is."""
        return self.budget.hurried


class StoppedError(BaseException):
    """The training was told to finish with what there is, in the middle of something that is of no use unfinished. Like
    KeyboardInterrupt, no error: whoever takes any error for a damaged file lets it through."""


def stop_if_told(progress: Progress) -> None:
    """Raises StoppedError where the training was told to stop."""
    if processes.agreed(progress.stopped):
        raise StoppedError


def state_to_resume(output: Path, settings: dict[str, Any], *, resume: bool) -> dict[str, Any] | None:
    """What an earlier start of this training left in its folder, which is made; None where there is nothing yet.

    Raises OutputError for the folder of another training, and OSError as all that writes there.
    """
    kept = output / STATE
    output.mkdir(parents=True, exist_ok=True)
    if not kept.exists():
        if (output / CHECKPOINT).exists():
            raise OutputError(f"{output / CHECKPOINT} is there, of no training to go on with: choose another --output")
        return None
    if not resume:
        raise OutputError(f"{kept} is there from another training: go on with --resume, or choose another --output")
    state: dict[str, Any] = load_whole(kept)
    begun_with = state.get("settings") if isinstance(state, dict) else None
    if begun_with != settings:
        begun = ", ".join(f"{name} {value}" for name, value in (begun_with or {}).items()) or "an earlier version's"
        raise OutputError(f"{kept} is of a training with other options ({begun}): give the same, or another --output")
    return state


def restore(progress: Progress, state: dict[str, Any] | None) -> None:
    """Go on from a state, or begin. Raises OutputError for the state of another version."""
    if state is not None:
        try:
            for name, network in progress.networks.items():
                network.load_state_dict(state["networks"][name])
            progress.place, progress.journal = Place(**state["place"]), Journal(**state["journal"])
            progress.optimisers, progress.ending = state["optimisers"], state["ending"]
        except (KeyError, TypeError, RuntimeError) as error:
            raise OutputError(
                f"{progress.output / STATE} is of another version of this project ({first_line(error)[:80]}): choose "
                "another --output"
            ) from error
        said = progress.log.warnings
        said += [text for text in progress.journal.warnings if text not in said]
        # The budget may be another one. With a much longer one the rates, where they have begun to fall, rise again.
        place = progress.place
        longer = max(place.until, _end_of(progress, place.stage, place.began))
        place.until = min(longer, progress.budget.seconds - progress.ending)
        if place.falls is not None and share_over(progress) < STEADY:
            place.falls = place.ends = None
    if processes.is_first():
        (progress.output / LOG).write_text("".join(line + "\n" for line in progress.journal.lines))


def stages_after(progress: Progress, stage: str) -> list[str]:
    """Those that come after a stage, and the end: a long training goes without `match`."""
    matched = progress.journal.steps.get("diffusion", 0) < MATCHED_BELOW
    return [one for one in STAGES[STAGES.index(stage) + 1 :] if one != "match" or matched] + [DONE]


def begin_stage(progress: Progress, stage: str) -> None:
    """A stage, with its share of the time that is left for it and those after it; or the end."""
    now = progress.budget.elapsed
    progress.place = Place(stage, *processes.agreed((now, _end_of(progress, stage, now))))
    progress.optimisers, progress.journal.unlogged = None, []
    save(progress)


def _end_of(progress: Progress, stage: str, began: float) -> float:
    """When a stage that began then is to be over, in seconds of the budget."""
    if stage == DONE:
        return began
    share = SHARES[stage] / sum(SHARES[one] for one in [stage, *stages_after(progress, stage)[:-1]])
    return began + share * max(0.0, progress.budget.seconds - began - progress.ending)


def steps(
    progress: Progress,
    optimisers: Sequence[torch.optim.Optimizer],
    batch: float,
    on_save: Callable[[], None] = lambda: None,
) -> Iterator[int]:
    """Numbers of the steps that the stage's time allows, the learning rates set and the generator seeded before each,
    the state saved after some, and then what `on_save` does. `batch` images are what a step takes on average.

    The rates rise over WARM_UP steps to what the optimisers were made with, and stay. When STEADY of the time is over,
    the pace so far says how many steps more there will be, and over these the rates fall to nothing: only the rest of
    the stage depends on a guess.
    """
    place, budget = progress.place, progress.budget
    tensors = [[group["lr"] for group in optimiser.param_groups] for optimiser in optimisers]
    rates = [[rate.item() for rate in of_optimiser] for of_optimiser in tensors]
    if progress.optimisers is not None:
        for optimiser, state, of_optimiser in zip(optimisers, progress.optimisers, tensors, strict=True):
            optimiser.load_state_dict(state)
            for group, rate in zip(optimiser.param_groups, of_optimiser, strict=True):
                group["lr"] = rate  # on the device, where a recorded step reads it
    first, settled, saved = place.step, (place.step, budget.elapsed), budget.elapsed
    every = 1  # steps between looks at the clock
    while place.ends is None or place.step < place.ends:
        if place.step % every == 0:
            if processes.agreed(_is_over(progress)):
                break
            if place.ends is None and place.step > settled[0] and processes.agreed(share_over(progress) >= STEADY):
                place.falls, place.ends = place.step, processes.agreed(place.step + _steps_left(progress, settled))
                saved = -SAVE_SECONDS
                continue
        _set_rates(optimisers, rates, place)
        seed_step(progress, place.step, processes.number())
        yield place.step
        place.step += 1
        if place.step - first == SETTLED:
            now = budget.elapsed
            if processes.count() > 1:
                steps_each_second = SETTLED / max(now - settled[1], 1e-9)
                every = processes.agreed(max(1, int(CHECK_SECONDS * steps_each_second)))
            settled = (place.step, now)
        progress.log.status(Pace(place, batch, settled, budget.elapsed, progress.journal.lines[-1:]))
        if budget.elapsed - saved >= SAVE_SECONDS:
            progress.optimisers = [optimiser.state_dict() for optimiser in optimisers]
            save(progress)
            if place.until - budget.elapsed > progress.ending:  # what is shown takes time, and soon there is more
                on_save()
            saved = budget.elapsed
    progress.optimisers = [optimiser.state_dict() for optimiser in optimisers]
    save(progress)


def share_over(progress: Progress) -> float:
    """How much of the stage's time is over, 0..1."""
    place = progress.place
    return min(1.0, (progress.budget.elapsed - place.began) / max(place.until - place.began, 1e-9))


def _steps_left(progress: Progress, settled: tuple[int, float]) -> int:
    """Steps that the rest of the stage's time allows, at the pace since the step and moment of `settled`."""
    place, now = progress.place, progress.budget.elapsed
    return max(0, round((place.until - now) * (place.step - settled[0]) / max(now - settled[1], 1e-9)))


def _is_over(progress: Progress) -> bool:
    """Whether the stage ends before its steps are done: it is late, or the training was told to stop."""
    place, end = progress.place, progress.budget.seconds - progress.ending
    late = min(place.until + OVERRUN * (place.until - place.began), max(place.until, end))
    return progress.stopped or progress.budget.elapsed > late


def _set_rates(optimisers: Sequence[torch.optim.Optimizer], rates: Sequence[Sequence[float]], place: Place) -> None:
    factor = min(1.0, (place.step + 1) / WARM_UP)
    if place.falls is not None and place.ends is not None:
        factor *= (place.ends - place.step) / (place.ends - place.falls)
    for optimiser, highest in zip(optimisers, rates, strict=True):
        for group, rate in zip(optimiser.param_groups, highest, strict=True):
            group["lr"].fill_(rate * factor)


@dataclass(frozen=True)
class Pace:
    """What a line of progress says of a stage, which is shown to be over by its seconds: the pace since the step and
    moment of `settled`, and the losses in the last of `lines`."""

    place: Place
    batch: float
    settled: tuple[int, float]
    now: float
    lines: Sequence[str] = ()

    @property
    def done(self) -> float:
        """Seconds of the stage that are over."""
        return self.now - self.place.began

    @property
    def planned(self) -> float:
        """Seconds that the stage has."""
        return self.place.until - self.place.began

    def __str__(self) -> str:
        stage, steps, seconds = self.place.stage, self.place.step - self.settled[0], self.now - self.settled[1]
        told = [f"step {self.place.step:,}"]
        if steps and seconds:
            told.append(f"{steps * self.batch * processes.count() / seconds:,.0f} images/s")
        told += [line.split(" ", 2)[2] for line in self.lines if line.startswith(f"{stage} ")]
        return f"{stage}: {', '.join(told)}, {max(0.0, self.place.until - self.now):.0f} s to go"


def seed_step(progress: Progress, step: int, process: int) -> None:
    """Seed the generator for a step in a process, so that what chance decides depends on nothing that came before."""
    progress.generator.manual_seed(_seed(progress, step, process))


def pick(progress: Progress, images: Sequence[RealImages]) -> int:
    """Which canvas this step is about, the same in all processes.

    In proportion to their images: batches are the smaller the larger a canvas is, so that every image has as much of
    the time. With as many looks at each, large canvases took most of it (docs/own-data.md has both).
    """
    dice = random.Random(_seed(progress, progress.place.step, "canvas"))
    return dice.choices(range(len(images)), [len(of_canvas.pixels) for of_canvas in images])[0]


def _seed(progress: Progress, *of: object) -> int:
    words = repr((progress.settings["seed"], progress.place.stage, *of))
    return int.from_bytes(hashlib.sha256(words.encode()).digest()[:7])


def batch_for(batch: int, canvas: int, device: torch.device) -> int:
    """How many images of a canvas a step takes: `batch` is what suits a GPU at the smallest canvas."""
    less = LESS_ON_A_CPU if device.type == "cpu" else 1
    return max(LEAST_BATCH, batch * 32**2 // (less * canvas**2))


def mean_batch(batch: int, images: Sequence[RealImages], device: torch.device) -> float:
    """How many images a step takes on average, over the canvases that steps are about."""
    counts = [len(of_canvas.pixels) for of_canvas in images]
    batches = [batch_for(batch, of_canvas.canvas, device) for of_canvas in images]
    total: float = sum(map(mul, counts, batches))
    return total / sum(counts)


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
    processes.average_gradients(parameters)
    torch.nn.utils.clip_grad_norm_(parameters, CLIP_NORM)
    for optimiser in optimisers:
        optimiser.step()


def record(progress: Progress, **losses: Tensor) -> None:
    """Note the losses of a step, scalars that may be written over; every LOG_EVERY steps their means are logged."""
    journal = progress.journal
    journal.unlogged.append({name: loss.clone() for name, loss in losses.items()})
    done = progress.place.step + 1
    if done % LOG_EVERY:
        return
    means = {name: fmean(step[name].item() for step in journal.unlogged) for name in losses}
    line = f"{progress.place.stage} {done} " + " ".join(f"{name}={mean:.5f}" for name, mean in means.items())
    journal.unlogged = []
    journal.lines.append(line)
    if processes.is_first():
        with (progress.output / LOG).open("a") as log:
            log.write(line + "\n")


def save(progress: Progress) -> None:
    """Put everything that a resumed run needs into one file."""
    if not processes.is_first():
        return
    progress.journal.warnings = list(progress.log.warnings)
    state = {
        "settings": progress.settings,
        "networks": {name: network.state_dict() for name, network in progress.networks.items()},
        "place": asdict(progress.place),
        "elapsed": progress.budget.elapsed,
        "ending": progress.ending,
        "optimisers": progress.optimisers,
        "journal": vars(progress.journal),
    }
    save_whole(state, progress.output / STATE)


def save_whole(value: Any, path: Path) -> None:
    """Save so that a kill leaves what was there before, or the whole of the new. Raises OutputError."""
    whole = io.BytesIO()
    torch.save(value, whole)  # not to the disk: of a full one torch would say that a position is unexpected
    write_whole(path, whole.getbuffer())


def load_whole(path: Path) -> Any:
    """What `save_whole` saved, on the CPU. Raises OutputError for a file that it did not."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise OutputError(f"{path} cannot be read ({error.strerror})") from error
    except Exception as error:  # of any class: the file may be anything
        raise OutputError(f"{path} cannot be read, damaged or no training's: choose another --output") from error
