"""Train a one-step text-to-image model of SDXL-Turbo's layout on images of your own, in a given time.

The story, top to bottom: the critic, a network like the evaluator's, learns to tell the classes apart; the VAE learns
to keep what the critic sees in the images; the teacher, a UNet, and both text encoders learn to take noise away from
latents, a little at a time; the teacher draws pairs of noise and sample in several steps each; the student, another
UNet, learns to make the sample in the one step that the job takes; then, where the teacher had not much time, samples
that are as likely as the teacher's.

    ./run.sh train my-classes.toml --data photographs --output outputs/my-model --budget 20m

`OUTPUT/checkpoint` is the checkpoint, there from the teacher's first minute on; `OUTPUT/train.html` tells how it went,
`OUTPUT/samples/` shows it, and `OUTPUT/state.pt` is what `--resume` goes on from.
"""

import argparse
import copy
import hashlib
import math
import os
import shlex
import signal
import sys
from collections.abc import Sequence
from contextlib import closing, nullcontext, suppress
from functools import partial
from pathlib import Path

import diffusers
import psutil
import torch
import transformers
from safetensors import SafetensorError

from submission.arguments import Parser, add_device, exit_code_of, number_from, parse_seconds
from submission.engine.maker import out_of_memory
from submission.errors import BudgetError, OutputError, UsageError, as_word, first_line
from submission.log import Log, default_style
from submission.machine.device import choose_device, choose_devices
from submission.machine.disk import claimed, remove_unfinished
from submission.machine.limits import cores
from submission.machine.memory import keep_freed_memory
from submission.plan.budget import start_budget
from submission.tasks import Task, load_task
from tools.training import processes
from tools.training.critic import load_critic, train_critic
from tools.training.data import Sources, real_images
from tools.training.diffusion import Teacher, noise_schedule, train_diffusion
from tools.training.distil import Pairs, make_pairs, train_distil, train_match
from tools.training.layout import MAX_TOKENS, TRAINED, UNET_WIDTHS, build_networks, canvas_for
from tools.training.progress import (
    CHECKPOINT,
    DONE,
    STAGES,
    WARM_UP,
    Progress,
    StoppedError,
    begin_stage,
    load_whole,
    restore,
    save,
    save_whole,
    stages_after,
    state_to_resume,
    stop_if_told,
)
from tools.training.prompts import all_prompts, encode_prompts, prompts_of
from tools.training.result import PAGE, Subject, can_draw, forget_sheets, publish, recover, write_result
from tools.training.vae import train_vae

# Seconds that the training itself needs at least, when the images are read.
LEAST_SECONDS = 30.0
# Seconds that the end of the process takes, and how much longer the last page may take than the one that was timed.
EXIT_SECONDS, SLOWER = 2.0, 1.2
# Until one is timed, a page is taken to take so long: on a CPU by the pixels of the canvases, as two busy cores took.
PAGE_SECONDS, PAGE_CORE_SECONDS_PER_PIXEL = 8.0, 2 * 28 / 128**2
# Stages that decide what the pictures are like.
TRAINING_STAGES = ("diffusion", "distil", "match")
# A file of the output.
CRITIC = "critic.pt"
# The environment of several processes says when the first was started, in Unix seconds.
BEGAN = "BANKO_TRAINING_BEGAN"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    for library in (diffusers.utils.logging, transformers.utils.logging):
        library.set_verbosity_error()
        library.disable_progress_bar()
    given = sys.argv[1:] if arguments is None else list(arguments)
    options = build_parser().parse_args(given)
    return exit_code_of(lambda: run(options, given), debug=options.debug)


def build_parser() -> Parser:
    parser = Parser(
        prog="./run.sh train",
        description="Trains a one-step text-to-image model on your images, for the job to draw from with --model.",
        epilog="examples:\n  ./run.sh train my-classes.toml --data photographs --output outputs/my-model --budget 20m\n"
        "  ./run.sh my-classes.toml --model outputs/my-model/checkpoint\n\n"
        "exit codes: 0 trained, or told to stop and something can be drawn; 2 usage; 3 nothing can be drawn yet;\n"
        "5 output cannot be written; 6 the images were refused",
    )
    add = parser.add_argument
    add("tasks", nargs="+", metavar="TASK", help="as for the job: names of tasks, or .toml files")
    add(
        "--data",
        type=Path,
        required=True,
        metavar="DIR",
        help="training images, as evaluate reads test images: torchvision's cifar-100-python/, the unpacked "
        "tiny-imagenet-200/, NAME_train.pt, or a folder per class, in train/, NAME/train/, NAME/ or beside each other",
    )
    add(
        "--output", type=Path, required=True, metavar="DIR", help="gets checkpoint/, train.html, samples/ and the state"
    )
    add(
        "--budget",
        default="15m",
        metavar="TIME",
        help="900, 900s or 15m, from the start of the process; a training that is resumed has used a part of it",
    )
    add(
        "--size",
        choices=tuple(UNET_WIDTHS),
        default="small",
        help="of the UNet: 3.8 or 6.2 million weights; the larger begins as the embedded model's",
    )
    add("--resume", action="store_true", help="go on from OUTPUT/state.pt where there is one")
    add(
        "--truth_dir",
        type=Path,
        metavar="DIR",
        help="more test images: like those that --data names as such, they are not trained on (default: none)",
    )
    add("--seed", type=number_from(0), default=0, metavar="N", help="of all that is random")
    add_device(parser)
    add("--debug", action="store_true", help="show tracebacks")
    return parser


def run(options: argparse.Namespace, given: list[str]) -> int:
    """Train in this process, or in one for each GPU; returns the exit code.

    Raises UsageError, BudgetError, InputFileError for the data, and OutputError for the folder.
    """
    seconds = parse_seconds(options.budget)
    tasks = sorted(map(load_task, options.tasks), key=lambda task: canvas_for(task.size))
    if len({task.name for task in tasks}) < len(tasks):
        raise UsageError(f"a task is named twice: {' '.join(options.tasks)}")
    if options.output.resolve() == options.data.resolve():
        raise UsageError(f"--output {options.output} is where the images are: choose another")
    began = psutil.Process().create_time()
    if "RANK" in os.environ:  # one of several, of `run_together` or of another launcher
        began = float(os.environ.get(BEGAN, began))
        kind, _ = choose_devices(options.device, 1)
        device = processes.join(cpu=kind == "cpu")
    else:
        device = choose_device(options.device)
        if device.type == "cuda" and torch.cuda.device_count() > 1:
            os.environ[BEGAN] = str(began)
            return processes.run_together([sys.executable, "-m", "tools", "train", *given], torch.cuda.device_count())
        processes.join(cpu=device.type == "cpu")
    signal.signal(signal.SIGTERM, stop_reading)
    try:
        with processes.the_first_speaks(), claimed(options.output) if processes.is_first() else nullcontext():
            train(options, tasks, device, seconds, began)
            processes.leave()
    except StoppedError as error:
        words = "stopped while the images were read: go on with --resume"
        if not (options.output / CHECKPOINT).exists():
            raise BudgetError(words) from error
        if processes.is_first():
            print(words)
    except (OSError, SafetensorError) as error:  # not the data's: what reads them has an error of its own
        raise OutputError(
            f"cannot write to {options.output} ({getattr(error, 'strerror', None) or error}): make room and go on with "
            "--resume, or choose another --output"
        ) from error
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        raise UsageError(
            f"{device.type} has too little memory for this training ({first_line(error)[:80]}): free some, and go on "
            "with --resume"
        ) from error
    return 0


def train(options: argparse.Namespace, tasks: list[Task], device: torch.device, seconds: float, began: float) -> None:
    """All stages, or what is left of them, in `seconds` since `began`, a moment in Unix seconds.

    Raises InputFileError for the data; BudgetError; OutputError and OSError for the folder.
    """
    words = all_prompts(tasks)
    settings = {
        "tasks": ", ".join(f"{task.name} at {task.size} px" for task in tasks),
        "words": hashlib.sha256("\n".join(words).encode()).hexdigest()[:8],  # of the prompts: a task's file may change
        "size": options.size,
        "seed": options.seed,
        "device": device.type,
        "processes": processes.count(),
    }
    if processes.is_first():
        recover(options.output)
        remove_unfinished(options.output, "*")
    state = state_to_resume(options.output, settings, resume=options.resume)
    if state is None:
        forget_sheets(options.output, tasks)
    budget = start_budget(seconds, began - (state.get("elapsed", 0.0) if state else 0.0))
    keep_freed_memory()
    torch.backends.cudnn.benchmark = True  # the steps of a stage have batches of a few shapes
    torch.set_num_threads(min(cores(), torch.get_num_threads()))
    with closing(Log(default_style() if processes.is_first() else "kept", budget)) as log:
        with processes.first_before_others():
            images = real_images(Sources(options.data, options.truth_dir, options.output), tasks, device, log)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: budget.hurry())
        torch.manual_seed(options.seed)
        networks = build_networks(words, options.size, images[-1].canvas)
        trained = {name: getattr(networks, name) for name in TRAINED}
        trained |= {name: copy.deepcopy(networks.unet) for name in ("teacher", "rival")}
        for network in trained.values():
            network.to(device)
            if device.type == "cpu" and not isinstance(network, transformers.PreTrainedModel):
                network.to(memory_format=torch.channels_last)  # about three times as fast in these narrow convolutions
        progress = Progress(options.output, budget, log, trained, torch.Generator(device), settings)
        if device.type == "cpu":
            pixels = sum(of_canvas.canvas**2 for of_canvas in images)
            progress.ending = max(PAGE_SECONDS, PAGE_CORE_SECONDS_PER_PIXEL * pixels / cores()) + EXIT_SECONDS
        restore(progress, state)
        if not can_draw(progress) and budget.left < LEAST_SECONDS + progress.ending:
            left, enough = max(0.0, budget.left), math.ceil(budget.elapsed + LEAST_SECONDS + progress.ending)
            raise BudgetError(
                f"{left:.0f} of {seconds:.0f} s are left to train in: give a longer --budget, of {enough} s at least"
            )
        if state is None:
            begin_stage(progress, STAGES[0])
        elif progress.place.stage == DONE:
            log.say("this training is finished: to train for longer, choose another --output")
        if too_long := sum(len(networks.tokenizer(prompt).input_ids) > MAX_TOKENS for prompt in words):
            log.warn(f"{too_long} prompts are longer than {MAX_TOKENS} tokens, and are cut there")
        command = shlex.join(["./run.sh", *options.tasks, "--model", as_word(options.output / CHECKPOINT)])
        subject = Subject(tasks, networks, prompts_of(networks, tasks, device), images, command)
        with suppress(StoppedError):
            follow(subject, progress)
        if not can_draw(progress):
            raise BudgetError("stopped before anything could be drawn: go on with --resume")
        if copies := write_result(subject, progress):
            log.warn(copies)
        if progress.place.stage != DONE:
            save(progress)  # what the page took counts, too
        log.say(f"{options.output / PAGE} tells how it went; to draw with it: {command}")


def stop_reading(*_: object) -> None:
    """What SIGTERM does while the images are read, once. Raises StoppedError."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    raise StoppedError


def follow(subject: Subject, progress: Progress) -> None:
    """The stages, from where the training stands to the last. Raises StoppedError, and BudgetError where there was no
    time for a teacher."""
    networks, prompts, images = subject.networks, subject.prompts, subject.images
    output, device = progress.output, progress.generator.device
    teacher, rival = progress.networks["teacher"], progress.networks["rival"]
    if progress.place.stage == "diffusion":  # of a state that was saved when the teacher had learnt more than is shown
        networks.unet.load_state_dict(teacher.state_dict())

    def show_teacher() -> None:
        networks.unet.load_state_dict(teacher.state_dict())
        publish(subject, progress)

    while (stage := progress.place.stage) != DONE:
        progress.log.say(f"{stage}: until {progress.place.until:.0f} s")
        with progress.log.phase(stage):
            if stage == "critic":
                weights = train_critic(progress, images)
                if processes.is_first():
                    save_whole(weights, output / CRITIC)
            elif stage == "vae":
                train_vae(networks, load_critic(load_whole(output / CRITIC), device), progress, images)
            elif stage == "diffusion":
                train_diffusion(networks, teacher, progress, prompts, images, show_teacher)
                for follower in (networks.unet, rival):
                    follower.load_state_dict(teacher.state_dict())
            else:
                follow_teacher(subject, progress)
        stop_if_told(progress)
        steps = progress.journal.steps[stage] = progress.place.step
        if stage == "diffusion" and not steps:
            raise BudgetError("there was no time for a teacher: go on with --resume and a longer --budget")
        if stage in TRAINING_STAGES and steps < WARM_UP:
            progress.log.warn(f"in the stage {stage!r} there was time for {steps} steps alone: give a longer --budget")
        following = stages_after(progress, stage)[0]
        # A page to look at; the first also tells how long the last one will take.
        another = stage == "distil" and following != DONE and progress.budget.left > 2 * progress.ending
        if stage == "diffusion" or another:
            began = progress.budget.elapsed
            write_result(subject, progress)
            progress.ending = SLOWER * (progress.budget.elapsed - began) + EXIT_SECONDS
        begin_stage(progress, following)
    for file in output.glob("pairs_*.pt"):
        file.unlink(missing_ok=True)


def follow_teacher(subject: Subject, progress: Progress) -> None:
    """The stages in which the student learns from the teacher."""
    networks, prompts, images = subject.networks, subject.prompts, subject.images
    device, stage = progress.generator.device, progress.place.stage
    unet, rival = progress.networks["teacher"], progress.networks["rival"]
    encoded = encode_prompts(networks, prompts)
    teacher = Teacher(unet, noise_schedule(networks.scheduler, device), encoded, networks.scheduler.config)
    show = partial(publish, subject, progress)
    # A file for each process: they draw pairs of their own.
    file = progress.output / f"pairs_{processes.number()}.pt"
    if stage == "pairs":
        save_whole([vars(of_canvas) for of_canvas in make_pairs(teacher, progress, prompts, images)], file)
    elif stage == "distil":
        kept = [Pairs(**{name: part.to(device) for name, part in of_canvas.items()}) for of_canvas in load_whole(file)]
        train_distil(networks, progress, encoded, kept, images, show)
    else:
        train_match(networks, teacher, rival, progress, prompts, images, show)


if __name__ == "__main__":
    raise SystemExit(main())
