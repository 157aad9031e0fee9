"""Measure a server in a process of its own: its time and memory, and clients that load it."""

from __future__ import annotations

import json
import multiprocessing
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import urllib3

REPOSITORY = Path(__file__).resolve().parents[2]
Post = Callable[[str, object], dict[str, Any]]


def poster(url: str) -> Post:
    """A function that posts JSON over one open connection."""
    pool = urllib3.connection_from_url(url)

    def post(path: str, body: object) -> dict[str, Any]:
        return json.loads(pool.request("POST", path, json=body).data)

    return post


def resident(name: str, process: int | str = "self") -> int:
    """Bytes of a process: VmRSS now, VmHWM at most so far, RssAnon without mapped files."""
    status = Path(f"/proc/{process}/status").read_text()
    return 1024 * int(status.partition(f"{name}:")[2].split()[0])


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
        return resident("VmRSS", self.process.pid) / 1e6

    def peak_megabytes(self) -> float:
        """The largest resident size so far; mapped files that were read count too."""
        return resident("VmHWM", self.process.pid) / 1e6

    def processor_seconds(self) -> float:
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait(10)


@dataclass
class Load:
    """The measurements of one client."""

    count: int = 0
    """Steps or queries."""
    resets: int = 0
    seconds: float = 0.0
    latencies: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class Figures:
    """The measurements of several clients; rates per second, latencies in ms."""

    rate: float
    resets: float
    p50: float
    p99: float
    server_microseconds: float
    """Processor time of the server for a step or query."""


def run_clients(
    client: Callable[..., None], calls: Sequence[tuple[Any, ...]], server: MeasuredServer | None
) -> Figures:
    """Run a client process for each call at the same time.

    Each is called with its arguments, a barrier to wait at before it measures, and a queue for its
    `Load`. Without a server of ours its processor time is 0.
    """
    context = multiprocessing.get_context("fork")
    start, answers = context.Barrier(len(calls) + 1), context.SimpleQueue()
    processes = [context.Process(target=client, args=(*call, start, answers)) for call in calls]
    for process in processes:
        process.start()
    start.wait()
    before = server.processor_seconds() if server else 0.0
    loads: list[Load] = [answers.get() for _ in calls]
    used = server.processor_seconds() - before if server else 0.0
    for process in processes:
        process.join()
    count = sum(load.count for load in loads)
    seconds = statistics.mean(load.seconds for load in loads)
    latencies = sorted(latency for load in loads for latency in load.latencies)
    p50, p99 = (1e3 * latencies[int(part * (len(latencies) - 1))] for part in (0.5, 0.99))
    resets = sum(load.resets for load in loads) / seconds
    return Figures(count / seconds, resets, p50, p99, 1e6 * used / count)
