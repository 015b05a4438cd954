"""A device's maker: what it compiles makes the same images, and what cannot be compiled is said."""

from pathlib import Path

import numpy as np
import pytest
import torch

from submission.engine.maker import GeneratorMaker
from submission.log import Log
from submission.machine.crowding import Crowding
from submission.machine.memory import WorkingMemory
from submission.model import pipeline
from submission.model.checkpoint import inspect
from submission.model.generator import load_generator
from submission.model.image_spec import ImageSpec
from submission.plan.budget import start_budget
from submission.tasks import load_task

CPU = torch.device("cpu")


@pytest.fixture
def maker(checkpoint_folder: Path, task_file: Path) -> GeneratorMaker:
    log, task = Log("kept", start_budget(60)), load_task(str(task_file))
    generator = load_generator(ImageSpec(task), inspect(checkpoint_folder, "test"), CPU, log, dtype=torch.float32)
    return GeneratorMaker(generator, CPU, log, WorkingMemory.watch(), Crowding())


def test_compiled_networks_make_the_same_images_in_batches_of_one_size(maker: GeneratorMaker) -> None:
    expected, _, _ = maker.make(np.arange(6), disturbed=False, compiled=False)
    compiled, _, _ = maker.make(np.arange(6), disturbed=False, compiled=True)
    assert maker.facts()["compiled"] and maker.log.warnings == []
    assert np.abs(compiled.astype(int) - expected.astype(int)).max() <= 1
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    few, _, _ = maker.make(np.arange(2, 4), disturbed=False, compiled=True)
    assert np.abs(few.astype(int) - expected[2:4].astype(int)).max() <= 1
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs, "a smaller batch compiles nothing anew"
    undone, _, _ = maker.make(np.arange(6), disturbed=False, compiled=False)
    assert np.array_equal(undone, expected) and not maker.facts()["compiled"]


def test_where_nothing_can_be_compiled_it_is_said(maker: GeneratorMaker, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(unet: torch.nn.Module) -> None:
        def forward(*_: object, **__: object) -> None:
            raise torch._dynamo.exc.TorchDynamoException("no compiler")

        vars(unet.conv_in)["forward"] = forward

    expected, _, _ = maker.make(np.arange(3), disturbed=False, compiled=False)
    monkeypatch.setattr(pipeline, "compile_blocks", broken)
    images, _, _ = maker.make(np.arange(3), disturbed=False, compiled=True)
    assert np.array_equal(images, expected) and not maker.facts()["compiled"]
    assert "torch cannot compile the model here (no compiler)" in maker.log.warnings[0]
