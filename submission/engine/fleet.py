"""Several devices through Ray: an actor per device, on this machine or in a cluster.

Ray is imported here and in `ray_session` alone, and not before it is needed. No actor is restarted by Ray: whether that
pays, the job decides.
"""

import os
import socket
import textwrap
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from submission.engine import Event, Facts, Failed, Load, Made, Maker, NoMemoryError, Placement, Ready
from submission.engine.ray_session import RaySession
from submission.errors import BankoError, UsageError, first_line
from submission.log import Log
from submission.machine.limits import cores
from submission.plan.budget import start_budget

# Seconds between two looks at whether a cluster has grown.
CLUSTER_LOOK = 2.0


def manner(facts: Facts) -> tuple[object, ...]:
    """What decides pixels, and has to be the same on all devices."""
    decoder = facts["decoder"]
    return facts["resolution"], facts["unet_dtype"], decoder["name"], decoder["dtype"], decoder["fitted_to"]


class Actor:
    """What runs in a process of its own, on whatever machine, and answers as an engine's events."""

    def __init__(self, load: Load) -> None:
        self._load = load
        self._log = Log("kept", start_budget(0))
        self._maker: Maker | None = None

    def load(
        self, device: int, kind: str, seconds_left: float, like: Facts | None, network: bytes | None
    ) -> Ready | Failed:
        import ray  # noqa: PLC0415

        began = time.perf_counter()
        self._maker = None  # what it has loaded before makes room
        try:
            self._maker = self._load(seconds_left, like, network, self._log)
        except BankoError as error:
            return Failed(device, type(error)(f"on node {socket.gethostname()}: {error}"))
        gpus = ray.get_gpu_ids()
        name = f"cuda:{gpus[0]}" if gpus else f"{kind}:{device}"
        seconds = time.perf_counter() - began
        node, facts = socket.gethostname(), self._maker.facts()
        return Ready(device, name, node, facts, seconds, self._maker.network, self._said())

    def make(
        self, device: int, numbers: NDArray[np.int64], driver: str, *, disturbed: bool, compiled: bool
    ) -> Made | Failed:
        assert self._maker
        try:
            images, grows, crowding = self._maker.make(numbers, disturbed=disturbed, compiled=compiled)
        except (BankoError, NoMemoryError) as error:
            return Failed(device, error)
        except RuntimeError as error:
            return Failed(device, RuntimeError(first_line(error)))  # of a class that the driver may not know
        near = crowding if socket.gethostname() == driver else None
        return Made(device, images, grows, near, self._maker.facts(), self._said())

    def _said(self) -> Sequence[tuple[str, str]]:
        said, self._log.kept = self._log.kept, []
        return said


@dataclass
class _Member:
    """An actor as the driver sees it: its handle, the answers that it still owes, in order, whether it is to be
    started, and how often it has loaded unlike the others."""

    handle: Any = None
    refs: list[Any] = field(default_factory=list)
    wanted: bool = True
    mismatches: int = 0


class Fleet:
    """An engine (`submission.engine.Engine`) of as many devices as were asked for, or as a cluster has GPUs; then
    `count` grows with it."""

    alone = False
    depth = 2
    seconds_to_close = 0.5

    def __init__(self, kind: str, count: int | None, cluster: str | None, log: Log) -> None:
        """Starts Ray on this machine, for `count` devices of a `kind`, and does not wait for it; or joins a `cluster`
        for so many, or with None for all its GPUs, where the kind may be `auto`. Raises UsageError.
        """
        self._wanted, self._cluster, self._log = count, cluster, log
        self._load: Load | None = None
        self._seconds_left: Callable[[], float] = lambda: 0.0
        self._like: Facts | None = None
        self._network: bytes | None = None
        self._looked_at = 0.0
        self._session = RaySession(kind, count or 1, cluster, log)
        self.placement = self._here(kind, count or 1) if cluster is None else self._there(kind, cluster)
        self._members = [_Member() for _ in range(self.placement.devices)]

    @property
    def count(self) -> int:
        return len(self._members)

    def load(self, load: Load, seconds_left: Callable[[], float]) -> None:
        self._load, self._seconds_left = load, seconds_left

    def ask(self, device: int, numbers: NDArray[np.int64], *, disturbed: bool, compiled: bool) -> None:
        member, make = self._members[device], self._members[device].handle.make
        member.refs.append(make.remote(device, numbers, socket.gethostname(), disturbed=disturbed, compiled=compiled))

    def events(self, seconds: float) -> Sequence[Event]:
        if not self._session.connected(seconds):
            return []
        ray = self._session.ray
        self._grow()
        for index, member in enumerate(self._members):
            if member.wanted:
                self._start(index)
        waiting = {member.refs[0]: index for index, member in enumerate(self._members) if member.refs}
        if not waiting:
            time.sleep(seconds)
            return []
        done, _ = ray.wait(list(waiting), num_returns=1, timeout=seconds)
        if done:
            done, _ = ray.wait(list(waiting), num_returns=len(waiting), timeout=0)
        events = [self._outcome(waiting[ref], ref) for ref in done]
        return [event for event in events if event]

    def restart(self, device: int) -> bool:
        self._members[device].wanted = self._session.alive()
        return self._members[device].wanted

    def stop(self, device: int) -> None:
        handle, self._members[device] = self._members[device].handle, _Member(wanted=False)
        if handle is not None:
            self._session.ray.kill(handle, no_restart=True)

    def close(self, patience: float = 1.0) -> None:
        if self._cluster is not None:
            for index in range(self.count):
                self.stop(index)
        self._session.close(patience)

    def _here(self, kind: str, count: int) -> Placement:
        """Devices of this machine, which share its cores."""
        if kind == "cpu" and count > cores():
            self._log.warn(f"{count} devices share {cores()} cores")
        # OpenMP takes a list, for levels within each other; what it does not understand, it leaves aside.
        asked = os.environ.get("OMP_NUM_THREADS", "").split(",")[0].strip()
        threads = (int(asked) if asked.isdecimal() else 0) or max(1, cores() // count)
        return Placement(kind, threads, count, count)

    def _there(self, kind: str, address: str) -> Placement:
        """Devices of a cluster, once it has answered. Raises UsageError."""
        self._session.connected(None)
        nodes = self._session.nodes()
        cpus, gpus = [int(node.get("CPU", 0)) for node in nodes], sum(int(node.get("GPU", 0)) for node in nodes)
        if kind != "cpu" and gpus:
            kind = "cuda"
        elif kind == "cuda":
            raise UsageError(f"--device cuda: the Ray cluster {address} has no GPU")
        elif self._wanted is None:
            raise UsageError(f"the Ray cluster {address} has no GPU: --devices says how many devices its CPUs are")
        else:
            kind = "cpu"
        devices = self._wanted or gpus
        self._log.say(f"Ray cluster: {len(nodes)} nodes, {sum(cpus)} CPUs, {gpus} GPUs; {devices} devices of it")
        return Placement(kind, 1 if kind == "cpu" else None, -(-devices // len(nodes)), devices)

    def _grow(self) -> None:
        """Takes in GPUs that have joined the cluster."""
        now = time.monotonic()
        if self._cluster is None or self._wanted is not None or now - self._looked_at < CLUSTER_LOOK:
            return
        self._looked_at = now
        for _ in range(self.count, sum(int(node.get("GPU", 0)) for node in self._session.nodes())):
            self._members.append(_Member())
            self._log.say(f"the cluster has grown: device {self.count} is started")

    def _start(self, index: int) -> None:
        needs = {"num_gpus": 1, "num_cpus": 0} if self.placement.kind == "cuda" else {"num_cpus": 1}
        # Ray restarts nothing; whether that pays, the job decides.
        actor = self._session.ray.remote(Actor).options(
            **needs, max_restarts=0, max_task_retries=0, scheduling_strategy="SPREAD"
        )
        self._members[index] = _Member(actor.remote(self._load), wanted=False)
        self._ask_to_load(index)

    def _ask_to_load(self, index: int) -> None:
        member = self._members[index]
        member.refs.append(
            member.handle.load.remote(index, self.placement.kind, self._seconds_left(), self._like, self._network)
        )

    def _outcome(self, index: int, ref: Any) -> Event | None:
        """What has become of something that a device was asked for; None where it is asked once more."""
        ray = self._session.ray
        self._members[index].refs.pop(0)
        try:
            event: Event = ray.get(ref)
        except ray.exceptions.RayError as error:
            self.stop(index)
            cause = getattr(error, "cause", None) or error  # what an actor did not catch
            return Failed(index, RuntimeError(textwrap.shorten(first_line(cause), 120, placeholder=" ...")))
        if isinstance(event, Ready):
            if self._like is None:
                self._like, self._network = event.facts, event.network
            if event.network != self._network or manner(event.facts) != manner(self._like):
                self._members[index].mismatches += 1
                if self._members[index].mismatches > 1:
                    return Failed(index, UsageError(f"it makes images as {manner(event.facts)}, unlike the others"))
                self._ask_to_load(index)
                return None
        return event
