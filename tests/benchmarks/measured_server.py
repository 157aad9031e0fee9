"""A server in a process of its own, whose time and memory are measured, and calls to it."""

from __future__ import annotations

import http.client
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

REPOSITORY = Path(__file__).resolve().parents[2]
Post = Callable[[str, object], dict[str, Any]]


def poster(url: str, library: str) -> Post:
    """A function that posts JSON over one open connection."""
    headers = {"Content-Type": "application/json"}
    if library == "requests":
        import requests

        session = requests.Session()
        return lambda path, body: session.post(url + path, json=body).json()
    if library == "urllib3":
        import urllib3

        pool = urllib3.HTTPConnectionPool(urlsplit(url).hostname, urlsplit(url).port, maxsize=1)

        def send(path: str, body: object) -> dict[str, Any]:
            content = json.dumps(body).encode()
            return json.loads(pool.urlopen("POST", path, body=content, headers=headers).data)

        return send
    connection = http.client.HTTPConnection(urlsplit(url).netloc)

    def send_plain(path: str, body: object) -> dict[str, Any]:
        connection.request("POST", path, json.dumps(body).encode(), headers)
        return json.loads(connection.getresponse().read())

    return send_plain


class MeasuredServer:
    """A server process under load, started with the arguments of `atod-serve`."""

    def __init__(self, arguments: list[str]) -> None:
        begun = time.perf_counter()
        command = [sys.executable, "-m", "env_servers.cli", *arguments, "--port", "0"]
        self.process = subprocess.Popen(
            [*command, "--parent", str(os.getpid())],
            stdout=subprocess.PIPE,
            text=True,
            cwd=REPOSITORY,
        )
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit("the server did not start")
        self.ready_seconds = time.perf_counter() - begun
        self.ready_processor_seconds = self.processor_seconds()
        self.url: str = json.loads(line)["url"]

    def megabytes(self) -> float:
        pages = int(Path(f"/proc/{self.process.pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE") / 1e6

    def peak_megabytes(self) -> float:
        """The largest resident size so far; mapped files that were read count too."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(status.partition("VmHWM:")[2].split()[0]) * 1024 / 1e6

    def processor_seconds(self) -> float:
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait(10)
