"""The hub as people reach it: through proxies, portals and lines that break. A stub server on the loopback address."""

import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from tests.paths import ROOT

PORTAL = b"<html><body>Please log in to the hotel's network</body></html>"


class Hub(BaseHTTPRequestHandler):
    """Answers every request as its `manner` says."""

    manner = ""

    def do_GET(self) -> None:
        status, body, length = 200, PORTAL, None
        if self.manner.isdigit():
            status, body = int(self.manner), b'{"error": "no"}'
        elif self.manner in ("cut", "drip"):
            length = 10 * len(body)
        self.send_response(status)
        if status == 429:
            self.send_header("Retry-After", "1")
        self.send_header("Content-Type", "text/html" if status == 200 else "application/json")
        self.send_header("Content-Length", str(length or len(body)))
        self.end_headers()
        if self.command != "HEAD" or self.manner == "drip":
            self.wfile.write(body)
        if self.manner == "drip":
            with suppress(OSError):
                for _ in range(200):
                    time.sleep(0.1)
                    self.wfile.write(b" ")

    do_HEAD = do_CONNECT = do_POST = do_GET  # noqa: N815

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server(request: pytest.FixtureRequest) -> Iterator[str]:
    handler = type("ThisHub", (Hub,), {"manner": request.param})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as found:
        threading.Thread(target=found.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{found.server_port}"
        found.shutdown()


def refused(folder: Path, *, tool: bool = False, budget: str = "40s", **environment: str) -> None:
    """The job, and maybe the tool that fetches, which tries longer, say in one line that the hub is not to be had."""
    told = {name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")}
    told |= {"PYTHONPATH": str(ROOT), "HF_HOME": str(folder / "hub"), **environment}
    job = ["submission", "cifar100", "--model", "nobody/nothing", "--budget", budget, "--output", "out"]
    for command in (job, ["tools.fetch_weights", "weights"])[: 1 + tool]:
        done = subprocess.run(
            [sys.executable, "-m", *command], cwd=folder, env=told, capture_output=True, text=True, check=False
        )
        lines = done.stderr.splitlines()
        assert done.returncode == 4 and len(lines) == 1, done.stderr
        assert lines[0].startswith("error: ") and re.search("is kept for another try|what came is kept", lines[0])


@pytest.mark.parametrize("server", ["429", "500", "cut"], indirect=True)
def test_a_hub_that_is_busy(server: str, tmp_path: Path) -> None:
    refused(tmp_path, HF_ENDPOINT=server)


@pytest.mark.parametrize("server", ["drip"], indirect=True)
def test_a_hub_that_sends_a_byte_now_and_then_holds_nothing_up(server: str, tmp_path: Path) -> None:
    began = time.monotonic()
    refused(tmp_path, budget="12s", HF_ENDPOINT=server)
    assert time.monotonic() - began < 12


@pytest.mark.parametrize("server", ["portal", "401", "403", "404"], indirect=True)
def test_a_hub_that_does_not_answer_as_one(server: str, tmp_path: Path) -> None:
    refused(tmp_path, tool=True, HF_ENDPOINT=server)


@pytest.mark.parametrize("server", ["407"], indirect=True)
def test_a_proxy_that_wants_a_password(server: str, tmp_path: Path) -> None:
    refused(tmp_path, HTTPS_PROXY=server, HTTP_PROXY=server)


@pytest.mark.parametrize("proxy", ["socks://127.0.0.1:1", "socks5://127.0.0.1:1", "http://127.0.0.1:1", "nonsense"])
def test_a_proxy_that_cannot_be_used(proxy: str, tmp_path: Path) -> None:
    refused(tmp_path, ALL_PROXY=proxy)
