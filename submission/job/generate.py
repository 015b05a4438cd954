"""Rounds: images are asked of devices, put into the spool as they come, and files written beside, until time is up."""

import gc
import threading
from dataclasses import dataclass

from submission.dataset.image_queue import ImageQueue
from submission.engine import Engine, Event, Failed, Made, NoMemoryError, Ready
from submission.errors import BankoError, BudgetError, CheckpointError, UsageError, first_line
from submission.job.files import JobFiles
from submission.job.history import History
from submission.log import Log, Status
from submission.plan.devices import Device
from submission.plan.planner import Planner
from submission.request import DeviceRequest

# Seconds that devices are waited for at a time.
WAIT = 0.05
# A device that was started anew so many times is not worth another try.
MOST_RESTARTS = 3


@dataclass
class Generation:
    """The generating part of a job. `trouble` is what ended the last device that was given up.

    The planner is asked before every batch. A file is written after the first round and larger ones as rounds multiply,
    beside generation: from early on a complete one is in place, and what the last one will cost is known.
    """

    wanted: DeviceRequest
    engine: Engine
    planner: Planner
    queue: ImageQueue
    files: JobFiles
    history: History
    log: Log
    trouble: Exception | None = None

    def run(self, stop: threading.Event) -> None:
        """Adds rounds to the spool until the planner says that it is time to write, or it is told to `stop`.

        Raises BudgetError where not even one round fits, and what ended the last device where there is none left and
        no round.
        """
        planner, log = self.planner, self.log
        while not stop.is_set():
            self.history.note(planner)
            planner.expect(self.engine.count, self.wanted.batch_size)
            self.supply()
            if planner.done or self.nothing_to_wait_for():
                break
            if planner.budget.usable <= 0:  # other tasks follow, or the guard would have ended the process
                break
            if planner.time_to_write():
                if planner.in_hand:
                    log.say(f"{planner.in_hand} images were still under way when it was time to write")
                break
            starting = not self.engine.alone and not any(device.ready for device in planner.devices)
            with log.phase("start devices" if starting else "generate"):
                events = self.engine.events(WAIT)
            for event in events:
                self.take(event)
            self.give_up_waiting()
            self.files.keep_up()
            self.announce()
        if not planner.file_plan.rounds:
            raise self.why_nothing(stop)

    def nothing_to_wait_for(self) -> bool:
        devices = self.planner.devices
        idle = not any(device.in_hand for device in devices)
        return idle and (any(device.ready for device in devices) or self.gone())

    def gone(self) -> bool:
        """Whether no device will come back."""
        return all(device.state == "dropped" for device in self.planner.devices)

    def supply(self) -> None:
        """Gives every device as much as it should have in hand, each in turn."""
        planner, writing = self.planner, self.files.writing
        for depth in range(self.engine.depth):
            for index, device in enumerate(planner.devices):
                now = planner.budget.elapsed
                if not device.ready or len(device.in_hand) != depth or (depth and device.in_hand[0].late_at < now):
                    continue
                if (size := planner.next_batch(device)) and len(numbers := self.queue.take(size)):
                    full = len(numbers) == device.speed.batch_size.current
                    if self.wanted.compiles and self.engine.placement.kind == "cuda" and full:
                        device.consider_compiling(planner.plan().generate)
                    device.give(numbers, now, disturbed=writing)
                    self.engine.ask(index, numbers, disturbed=writing, compiled=device.compilation.on)

    def take(self, event: Event) -> None:
        """Handles an event. Raises CheckpointError, OutputError, and what ends a device alone."""
        device = self.planner.devices[event.device]
        match event:
            case Ready():
                self.pass_on(event)
                device.loaded(event.name, event.node, event.facts, event.seconds)
                gc.enable()  # `__main__` says why it was not
                if not self.files.spool.decoder:
                    self.files.spool.keep_decoder(event.facts["decoder"], event.network)
                if not self.engine.alone:
                    self.log.say(f"{device.name} on {device.node} is ready, after {event.seconds:.1f} s")
            case Made():
                self.pass_on(event)
                self.made(device, event)
            case Failed(error=NoMemoryError()) if device.in_hand:
                self.shrink(event.device)
            case Failed(error=CheckpointError()) if device.ready:
                raise event.error  # what one makes broken, all do
            case Failed():
                hopeless = isinstance(event.error, BankoError) or device.restarts
                self.lose(event.device, event.error, again=device.ready or not hopeless)

    def made(self, device: Device, event: Made) -> None:
        """A batch goes into the spool, and what it took into the plan. Raises OutputError."""
        planner, spool, batch = self.planner, self.files.spool, device.in_hand[0]
        new = spool.add(event.images, batch.numbers)
        self.history.made_images(planner.budget.elapsed)
        if not event.grows:
            device.speed.batch_size.grow_no_more()
        # From the driver's point of view, with the way there and back.
        seconds, expected = planner.budget.elapsed - batch.began, device.speed.expected(len(batch.numbers))
        writing, facts = self.files.writing, event.facts
        if planner.observe(device, seconds, new, spool.count, disturbed=writing, facts=facts):
            self.log.warn(
                f"a batch took {seconds:.1f} s where {expected:.1f} s were expected (a stopped process?): new plan"
            )
        if event.crowding is not None:
            planner.file_plan.cost.crowded(event.crowding)

    def pass_on(self, event: Ready | Made) -> None:
        """Logs a device's messages: each warning once, information from the first device alone."""
        for kind, text in event.said:
            if kind == "warning" and text not in self.log.warnings:
                self.log.warn(text)
            elif kind == "info" and not any(device.ready for device in self.planner.devices):
                self.log.say(text)

    def shrink(self, index: int) -> None:
        """A batch did not fit into memory: from now on they are half as large. Raises UsageError for a batch of one."""
        device = self.planner.devices[index]
        before = device.speed.batch_size.current
        numbers = device.out_of_memory(self.planner.budget.elapsed)
        self.queue.give_back(numbers)
        if len(numbers) == 1:
            error = UsageError(f"no memory for even one image at {device.facts['resolution']} px: lower --resolution")
            if self.engine.alone:
                raise error
            self.lose(index, error, again=False)
        elif device.speed.batch_size.current < before:
            self.log.warn(f"out of memory: batches of {device.speed.batch_size.current} from now on")

    def lose(self, index: int, error: Exception, *, again: bool = True) -> None:
        """A device makes nothing any more: what it had in hand goes to others, and it is started anew where that pays.

        Raises `error` where that was the only device and there is no round.
        """
        planner, device = self.planner, self.planner.devices[index]
        self.trouble = error
        lost = sum(len(batch.numbers) for batch in device.in_hand)
        for numbers in device.hand_on():
            self.queue.give_back(numbers)
        self.engine.stop(index)
        if self.engine.alone:
            device.lost(again=False)
            if not planner.file_plan.rounds:
                raise error
            rounds = planner.file_plan.rounds
            self.log.warn(f"generation failed, the file is finished with {rounds} rounds: {first_line(error)}")
            return
        again = again and device.restarts < MOST_RESTARTS and planner.pays_to_start() and self.engine.restart(index)
        device.lost(again=again)
        name = f"{device.name} on {device.node}" if device.node else f"device {index}"
        what = "is started anew" if again else "is left out from now on"
        given = f"; its {lost} images in hand go to others" if lost else ""
        self.log.warn(f"{name} {what} ({first_line(error)}){given}")

    def give_up_waiting(self) -> None:
        """What is late goes to others as well, and a device that hangs is ended."""
        now = self.planner.budget.elapsed
        for index, device in enumerate(self.planner.devices):
            if not device.in_hand or now < device.in_hand[0].late_at:
                continue
            if now >= device.in_hand[0].hung_at:
                self.lose(index, RuntimeError(f"no answer for {now - device.in_hand[0].began:.0f} s"))
                continue
            for numbers in device.hand_on():
                self.queue.give_back(numbers)

    def announce(self) -> None:
        """Shows progress, and says the plan when it is new and whenever it has changed noticeably."""
        planner, files = self.planner, self.planner.file_plan
        if not planner.paced:
            return
        plan, composition, pace = planner.plan(), files.composition, planner.images_per_second
        planned = max(plan.rounds, 1)
        self.log.status(
            Status(
                rounds=files.rounds,
                planned_rounds=planned,
                ipc=composition.ipc(files.rounds),
                planned_ipc=composition.ipc(planned),
                images=planner.total_images,
                planned_images=planned * composition.classes,
                images_per_second=pace,
            )
        )
        # Before the first file is in place, its cost is a guess.
        if files.in_place is None or (before := self.history.changed(planner, plan)) is None:
            return
        was = f" (was {before:.0f})" if before else ""
        self.log.say(
            f"plan: {plan.rounds} rounds{was}, IPC {plan.ipc}; {pace:,.1f} images/s in batches of "
            f"{planner.batch_size}; {plan.reserve:.1f} s kept for writing"
        )

    def why_nothing(self, stop: threading.Event) -> BankoError | Exception:
        """The error to raise where no round was made."""
        if stop.is_set():
            return BudgetError("stopped before the first round was done: there is nothing to write")
        if not self.gone():
            return self.planner.too_small()
        if isinstance(self.trouble, BankoError):
            return self.trouble
        return UsageError(f"no device could make a single round ({self.trouble})")
