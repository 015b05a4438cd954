"""Ray itself: started on this machine and ended with all that belongs to it, or a cluster that is joined."""

import atexit
import ctypes
import logging
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

from submission.errors import UsageError, first_line
from submission.log import Log

PACKAGE = Path(__file__).resolve().parents[1]
# Bytes of a batch up to which its images come straight to the driver, and of the store that larger ones pass through.
DIRECT, STORE = 64 << 20, 128 << 20
# Seconds in which a cluster has to answer.
CLUSTER_PATIENCE = 5.0
# Whoever has it may use the Ray of this process: all of them, one after the other, since Ray reads it once.
TOKEN = secrets.token_hex(32)
# Where Ray keeps its files: one of each task.
FOLDERS: list[Path] = []
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


class RaySession:
    """Ray on this machine, for so many devices of a `kind`; or, where it has an address, a `cluster`.

    It starts on a thread, which takes seconds, while the job gets ready.
    """

    def __init__(self, kind: str, count: int, cluster: str | None, log: Log) -> None:
        self._cluster, self._log, self._began = cluster, log, log.budget.elapsed
        self._cpus, self._gpus = count, count if kind == "cuda" else 0
        self._folder: Path | None = None
        self.ray: Any = None  # the library, once it is there
        self._heart: list[psutil.Process] = []
        self._watch: subprocess.Popen[bytes] | None = None
        self._before = {child.pid for child in psutil.Process().children(recursive=True)}
        self._trouble: UsageError | None = None
        self._connected, self._closed = threading.Event(), threading.Event()
        # The thread stays: Ray's processes end with the one that started them.
        threading.Thread(target=self._connect, name="ray", daemon=True).start()

    def connected(self, seconds: float | None) -> bool:
        """Whether Ray is there within so many seconds; None waits for it. Asked on the main thread. Raises UsageError
        where it does not come."""
        there = self._connected.wait(seconds)
        _take_signals_back()
        if not there:
            return False
        if self._trouble:
            raise self._trouble
        return True

    def alive(self) -> bool:
        """Whether all of what was started here is still there."""
        return all(process.is_running() and process.status() != psutil.STATUS_ZOMBIE for process in self._heart)

    def nodes(self) -> list[dict[str, Any]]:
        """What each node of the cluster has to offer, by the name of the resource."""
        return [node["Resources"] for node in self.ray.nodes() if node["Alive"]]

    def close(self, patience: float) -> None:
        """Ends all that was started here, waiting so many seconds for it to be gone: on any thread, more than once."""
        until = time.monotonic() + patience
        while left := [child for child in self._descendants() if child.pid not in self._before]:
            for child in left:
                with suppress(psutil.NoSuchProcess):
                    child.kill()
            if time.monotonic() >= until:
                return
            time.sleep(0.01)
        if self._folder:
            shutil.rmtree(self._folder, ignore_errors=True)
        self._closed.set()

    def _descendants(self) -> list[psutil.Process]:
        if self._cluster is not None:
            return []
        with suppress(psutil.NoSuchProcess):
            children = psutil.Process().children(recursive=True)
            return [child for child in children if child.is_running() and child.status() != psutil.STATUS_ZOMBIE]
        return []

    def _connect(self) -> None:
        """Starts Ray, or joins it; then waits until it is over."""
        os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
        if self._cluster is None:
            # Other users of this machine reach its ports, too: whoever has no token is refused.
            os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": TOKEN}
            # Workers start in another folder, and where `run.sh` has not started this they would not find the code.
            paths = [str(PACKAGE.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
            os.environ["PYTHONPATH"] = os.pathsep.join(paths)
        wish = "several devices on this machine" if self._cluster is None else f"--cluster {self._cluster}"
        try:
            import ray  # noqa: PLC0415

            self.ray = ray
            logging.getLogger("ray").setLevel(logging.ERROR)
            # It would print a paragraph for everyone who dies; the job has a line for that.
            ray._private.worker.print_to_stdstream = lambda *_, **__: None
            atexit.unregister(ray.shutdown)  # which would wait for what `close` has ended
            if ray.is_initialized():  # by a task before; its folder is made again where this looks for what has ended
                ray.shutdown()
                for folder in FOLDERS:
                    shutil.rmtree(folder, ignore_errors=True)
            if self._cluster is None:
                self._start_ray()
            else:
                self._join(self._cluster)
        except ImportError:
            self._trouble = UsageError(
                f"{wish}: Ray is missing; pip install -r requirements-ray.txt brings it, one device needs none"
            )
        except Exception as error:  # noqa: BLE001  of many classes, some of them Ray's own
            self._trouble = UsageError(f"{wish}: Ray does not start or answer ({first_line(error)})")
        self._log.add_phase("start Ray", self._began)
        self._connected.set()
        self._closed.wait()

    def _start_ray(self) -> None:
        if sys.platform == "linux":
            ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
        self._folder = Path(tempfile.mkdtemp(prefix="banko-ray-"))
        FOLDERS.append(self._folder)
        watch = ["/bin/sh", "-c", WATCH, "watch", str(self._folder)]
        self._watch = subprocess.Popen(watch, stdin=subprocess.PIPE, stderr=subprocess.DEVNULL, start_new_session=True)
        self.ray.init(
            address="local",
            num_cpus=self._cpus,
            num_gpus=self._gpus,
            object_store_memory=STORE,
            include_dashboard=False,
            configure_logging=False,
            log_to_driver=False,
            _node_ip_address="127.0.0.1",
            _plasma_directory=str(self._folder),  # shared memory is scarce in containers
            _temp_dir=str(self._folder),
            runtime_env={"working_dir": str(_empty(self._folder))},
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
        host, _, port = address.rpartition(":")
        if host:  # Ray itself would try for minutes
            socket.create_connection((host, int(port)), timeout=CLUSTER_PATIENCE).close()
        with tempfile.TemporaryDirectory() as folder:
            env = {"py_modules": [str(PACKAGE)], "working_dir": str(_empty(Path(folder)))}
            self.ray.init(address=address, runtime_env=env, configure_logging=False, log_to_driver=False)
        if not self.nodes():
            raise ConnectionError("it has no nodes")


def _take_signals_back() -> None:
    """Has SIGTERM mean what it meant before Ray: as it starts it puts a handler in place of ours which prints a stack,
    and aborts the process three seconds later, when the last file may not be done; as it ends, none."""
    signal.signal(signal.SIGTERM, signal.getsignal(signal.SIGTERM))
    signal.alarm(0)


def _empty(folder: Path) -> Path:
    """A folder for actors to be in. They would otherwise look for modules in the one that this was started from, first
    of all, and whatever is called as one of ours, or of Python's, would be taken for it."""
    empty = folder / "empty"
    empty.mkdir()
    return empty
