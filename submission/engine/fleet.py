"""Several devices through Ray: an actor a device, on this machine or in a cluster.

Ray is imported here alone, and not before it is needed. Its own start takes seconds, on a thread, while the job gets
ready. No actor is restarted by Ray: whether that pays, the job decides.
"""

import atexit
import ctypes
import logging
import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from numpy.typing import NDArray

from submission.budget import start_budget
from submission.engine import Event, Facts, Failed, Load, Made, Maker, NoMemoryError, Ready, first_line, manner
from submission.errors import BankoError, UsageError
from submission.progress import Log

PACKAGE = Path(__file__).resolve().parents[1]
# Bytes of a batch up to which its images come straight to the driver, and of the store that larger ones pass through.
DIRECT, STORE = 64 << 20, 128 << 20
# Seconds between two looks at whether a cluster has grown, and in which one has to answer.
CLUSTER_LOOK, CLUSTER_PATIENCE = 2.0, 5.0
# What is left to do where this process is killed, and its end of a pipe closed: Ray's agents would wait for a minute
# for one that answers. They are known by the logs that they write to.
WATCH = """
read -r _
for process in /proc/[0-9]*; do
    if ls -l "$process/fd" 2>/dev/null | grep -qF "$1/"; then kill -9 "${process#/proc/}"; fi
done
rm -rf "$1"
"""
# Linux: processes whose parent dies become children of this one, so that they can be found (prctl(2)).
PR_SET_CHILD_SUBREAPER = 36


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
    """An actor, as the driver sees it: its handle, what it has yet to answer, first things first, whether it is still
    to be started, and how often it has loaded in another manner than the others."""

    handle: Any = None
    refs: list[Any] = field(default_factory=list)
    wanted: bool = True
    loaded: int = 0


class Fleet:
    """An engine of as many devices as were asked for, or as a cluster has GPUs; then `count` grows with it.

    `kind` is what they are, `cpu` or `cuda`, `depth` how many batches each should have in hand. Of those on a machine,
    `sharing` share its memory, and each has so many of its `cores`; None: all. To end them takes `seconds_to_close`.
    """

    depth = 2
    seconds_to_close = 0.5

    def __init__(self, kind: str, count: int | None, cluster: str | None, log: Log) -> None:
        """Starts Ray on this machine, for `count` devices of a `kind`, and does not wait for it; or joins a `cluster`
        for so many, or with None for all its GPUs, where the kind may be `auto`. Raises UsageError.
        """
        self.kind = kind
        self.cores: int | None = None
        self.sharing = count or 1
        self._wanted, self._cluster, self._log = count, cluster, log
        self._members: list[_Member] = []
        self._load: Load | None = None
        self._seconds_left: Callable[[], float] = lambda: 0.0
        self._like: Facts | None = None
        self._network: bytes | None = None
        self._looked_at = 0.0
        self._folder: Path | None = None
        self._heart: list[psutil.Process] = []
        self._watch: subprocess.Popen[bytes] | None = None
        self._before = {child.pid for child in psutil.Process().children(recursive=True)}
        self._trouble: UsageError | None = None
        self._connected, self._closed = threading.Event(), threading.Event()
        self._began = log.budget.elapsed
        if cluster is None:
            self._members = [_Member() for _ in range(self.sharing)]
            cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
            self.cores = int(os.environ.get("OMP_NUM_THREADS") or 0) or max(1, cores // self.sharing)
            if kind == "cpu" and self.sharing > cores:
                log.warn(f"{count} devices share {cores} cores")
        # The thread stays: Ray's processes end with the one that started them.
        threading.Thread(target=self._connect, name="ray", daemon=True).start()
        if cluster is not None:
            self._connected.wait()
            if self._trouble:
                raise self._trouble

    @property
    def count(self) -> int:
        return len(self._members)

    def load(self, load: Load, seconds_left: Callable[[], float]) -> None:
        """Has all devices load their generators."""
        self._load, self._seconds_left = load, seconds_left

    def ask(self, device: int, numbers: NDArray[np.int64], *, disturbed: bool, compiled: bool) -> None:
        """Puts a batch of images into a device's hands, `disturbed` by a snapshot that is being written, to be made by
        networks that are `compiled` or not."""
        member, make = self._members[device], self._members[device].handle.make
        member.refs.append(make.remote(device, numbers, socket.gethostname(), disturbed=disturbed, compiled=compiled))

    def events(self, seconds: float) -> Sequence[Event]:
        """What has happened, waiting so many seconds for something to. Raises UsageError."""
        if not self._connected.wait(seconds):
            return []
        if self._trouble:
            raise self._trouble
        import ray  # noqa: PLC0415

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
        """Starts a device anew, whatever has become of it; False where Ray itself is gone."""
        alive = all(process.is_running() and process.status() != psutil.STATUS_ZOMBIE for process in self._heart)
        self._members[device].wanted = alive
        return alive

    def stop(self, device: int) -> None:
        """Ends a device; nothing of what it had in hand comes back."""
        import ray  # noqa: PLC0415

        handle, self._members[device] = self._members[device].handle, _Member(wanted=False)
        if handle is not None:
            ray.kill(handle, no_restart=True)

    def close(self, patience: float = 1.0) -> None:
        """Ends all that was started, waiting so many seconds for it to be gone: on any thread, and more than once."""
        if self._cluster is not None:
            for index in range(self.count if self._connected.is_set() else 0):
                self.stop(index)
            self._closed.set()
            return
        until = time.monotonic() + patience
        while left := [child for child in _descendants() if child.pid not in self._before]:
            for child in left:
                with suppress(psutil.NoSuchProcess):
                    child.kill()
            if time.monotonic() >= until:
                return
            time.sleep(0.01)
        if self._folder:
            shutil.rmtree(self._folder, ignore_errors=True)
        self._closed.set()

    def _connect(self) -> None:
        """Starts Ray, or joins it; then waits until it is over."""
        os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
        if self._cluster is None:
            # Other users of this machine reach its ports, too: whoever has no token is refused.
            os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
        wish = "several devices on this machine" if self._cluster is None else f"--cluster {self._cluster}"
        try:
            import ray  # noqa: PLC0415

            logging.getLogger("ray").setLevel(logging.ERROR)
            # It would print a paragraph for everyone who dies; the job has a line for that.
            ray._private.worker.print_to_stdstream = lambda *_, **__: None
            atexit.unregister(ray.shutdown)  # which would wait for what `close` has ended
            if self._cluster is None:
                self._start_ray()
            else:
                self._join(self._cluster)
        except ImportError:
            self._trouble = UsageError(
                f"{wish}: Ray is missing; pip install -r requirements-ray.txt brings it, one device needs none"
            )
        except UsageError as error:
            self._trouble = error
        except Exception as error:  # noqa: BLE001  of many classes, some of them Ray's own
            self._trouble = UsageError(f"{wish}: Ray does not start or answer ({first_line(error)})")
        self._log.spans["start Ray"] = self._began, self._log.budget.elapsed
        self._log.timings["start Ray"] = self._log.budget.elapsed - self._began
        self._connected.set()
        self._closed.wait()

    def _start_ray(self) -> None:
        import ray  # noqa: PLC0415

        if sys.platform == "linux":
            ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
        self._folder = Path(tempfile.mkdtemp(prefix="banko-ray-"))
        watch = ["/bin/sh", "-c", WATCH, "watch", str(self._folder)]
        self._watch = subprocess.Popen(watch, stdin=subprocess.PIPE, stderr=subprocess.DEVNULL, start_new_session=True)
        ray.init(
            address="local",
            num_cpus=self.count,
            num_gpus=self.count if self.kind == "cuda" else 0,
            object_store_memory=STORE,
            include_dashboard=False,
            configure_logging=False,
            log_to_driver=False,
            _node_ip_address="127.0.0.1",
            _plasma_directory=str(self._folder),  # shared memory is scarce in containers
            _temp_dir=str(self._folder),
            _system_config={
                # Its watch over memory would end actors where the page cache fills that; the kernel knows better.
                "memory_monitor_refresh_ms": 0,
                # Where Ray itself is gone, this process goes on without it. It would be ended after a minute, or when
                # it next touches the store, which images therefore pass by.
                "gcs_rpc_server_reconnect_timeout_s": 86400,
                "max_direct_call_object_size": DIRECT,
                "task_rpc_inlined_bytes_limit": DIRECT,
            },
        )
        self._heart = [child for child in psutil.Process().children() if child.name() in ("gcs_server", "raylet")]

    def _join(self, address: str) -> None:
        import ray  # noqa: PLC0415

        host, _, port = address.rpartition(":")
        if host:  # Ray itself would try for minutes
            socket.create_connection((host, int(port)), timeout=CLUSTER_PATIENCE).close()
        ray.init(
            address=address,
            runtime_env={"py_modules": [str(PACKAGE)]},
            configure_logging=False,
            log_to_driver=False,
        )
        nodes = [node["Resources"] for node in _nodes()]
        cores, gpus = [int(node.get("CPU", 0)) for node in nodes], sum(int(node.get("GPU", 0)) for node in nodes)
        if self.kind != "cpu" and gpus:
            self.kind = "cuda"
        elif self.kind == "cuda":
            raise UsageError(f"--device cuda: the Ray cluster {address} has no GPU")
        elif self._wanted is None:
            raise UsageError(f"the Ray cluster {address} has no GPU: --devices says how many devices its CPUs are")
        else:
            self.kind = "cpu"
        devices = self._wanted or gpus
        self._members = [_Member() for _ in range(devices)]
        self.cores = 1 if self.kind == "cpu" else None
        self.sharing = -(-devices // len(nodes))
        self._log.say(f"Ray cluster: {len(nodes)} nodes, {sum(cores)} CPUs, {gpus} GPUs; {devices} devices of it")

    def _grow(self) -> None:
        """Takes in GPUs that have joined the cluster."""
        now = time.monotonic()
        if self._cluster is None or self._wanted is not None or now - self._looked_at < CLUSTER_LOOK:
            return
        self._looked_at = now
        for _ in range(self.count, sum(int(node["Resources"].get("GPU", 0)) for node in _nodes())):
            self._members.append(_Member())
            self._log.say(f"the cluster has grown: device {self.count} is started")

    def _start(self, index: int) -> None:
        import ray  # noqa: PLC0415

        needs = {"num_gpus": 1, "num_cpus": 0} if self.kind == "cuda" else {"num_cpus": 1}
        # Ray restarts nothing; whether that pays, the job decides.
        actor = ray.remote(Actor).options(**needs, max_restarts=0, max_task_retries=0, scheduling_strategy="SPREAD")
        self._members[index] = _Member(actor.remote(self._load), wanted=False)
        self._ask_to_load(index)

    def _ask_to_load(self, index: int) -> None:
        member = self._members[index]
        member.refs.append(member.handle.load.remote(index, self.kind, self._seconds_left(), self._like, self._network))

    def _outcome(self, index: int, ref: Any) -> Event | None:
        """What has become of something that a device was asked for; None where it is asked once more."""
        import ray  # noqa: PLC0415

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
                self._members[index].loaded += 1
                if self._members[index].loaded > 1:
                    return Failed(index, UsageError(f"it makes images as {manner(event.facts)}, unlike the others"))
                self._ask_to_load(index)
                return None
        return event


def _nodes() -> list[dict[str, Any]]:
    """The nodes of the cluster that are there."""
    import ray  # noqa: PLC0415

    every: list[dict[str, Any]] = ray.nodes()  # type: ignore[no-untyped-call]
    return [node for node in every if node["Alive"]]


def _descendants() -> list[psutil.Process]:
    with suppress(psutil.NoSuchProcess):
        children = psutil.Process().children(recursive=True)
        return [child for child in children if child.is_running() and child.status() != psutil.STATUS_ZOMBIE]
    return []
