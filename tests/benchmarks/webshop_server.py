"""Load on the shop's server: steps per second, latency, memory, with clients in other processes.

    python tests/benchmarks/webshop_server.py                      # generated shop
    python tests/benchmarks/webshop_server.py --data <folder>      # official files

One real server process; for every number of sessions as many client processes, each with one open
connection, playing random valid actions for some seconds (resets included, as in the original's 47
steps/s). Then one client that steps all sessions with one batch request. Latencies are those of
single requests as the client sees them. The processor time of the server per step depends less on
what else the machine does than the steps per second do.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import random
import statistics
import time
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any

from measured_server import MeasuredServer, poster

ORIGINAL_STEPS = 47.0
"""Steps per second of the original text environment in one process, no HTTP (median of five)."""
MAX_TURNS = 15


@dataclass
class Load:
    """The measurements of one client."""

    steps: int = 0
    resets: int = 0
    seconds: float = 0.0
    latencies: list[float] = field(default_factory=list)


class Customer:
    """One session after another, with random valid actions."""

    def __init__(self, split: str, seed: int) -> None:
        self.draws = random.Random(seed)
        self.split = split
        self.state: dict[str, Any] = {}
        self.words: list[str] = []

    def wanted(self) -> dict[str, Any]:
        return {"split": self.split, "seed": self.draws.randrange(2**31)}

    def begin(self, state: dict[str, Any]) -> None:
        self.state = state
        self.words = state["instruction"].split()

    def is_done(self) -> bool:
        return bool(self.state["over"]) or self.state["turn_index"] >= MAX_TURNS

    def step(self) -> dict[str, Any]:
        clickables = self.state["clickables"]
        if self.state["has_search_bar"]:
            action = "search[" + " ".join(self.draws.sample(self.words, 3)) + "]"
        else:
            action = f"click[{self.draws.choice(clickables)}]"
        return {"turn_index": self.state["turn_index"], "action": action}


def play_alone(
    url: str, library: str, split: str, seed: int, seconds: float, start: Any, answer: Connection
) -> None:
    """A client process: one session at a time, single calls."""
    post = poster(url, library)
    customer = Customer(split, seed)
    customer.begin(post("/sessions", customer.wanted()))
    load = Load()
    start.wait()
    begun = time.perf_counter()
    while (now := time.perf_counter()) < begun + seconds:
        if customer.is_done():
            post("/batch/close", {"session_ids": [customer.state["session_id"]]})
            customer.begin(post("/sessions", customer.wanted()))
            load.resets += 1
            continue
        reply = post(f"/sessions/{customer.state['session_id']}/step", customer.step())
        load.latencies.append(time.perf_counter() - now)
        customer.state = reply
        load.steps += 1
    load.seconds = time.perf_counter() - begun
    post("/batch/close", {"session_ids": [customer.state["session_id"]]})
    answer.send(load)


def play_batch(
    url: str, library: str, split: str, sessions: int, seconds: float, answer: Connection
) -> None:
    """A client process that steps all its sessions with one request."""
    post = poster(url, library)
    customers = [Customer(split, seed) for seed in range(sessions)]

    def begin(fresh: list[Customer]) -> None:
        wanted = [customer.wanted() for customer in fresh]
        states = post("/batch/create", {"sessions": wanted})["results"]
        for customer, state in zip(fresh, states, strict=True):
            customer.begin(state)

    begin(customers)
    load = Load()
    begun = time.perf_counter()
    while time.perf_counter() < begun + seconds:
        steps = [{"session_id": c.state["session_id"], **c.step()} for c in customers]
        asked = time.perf_counter()
        replies = post("/batch/step", {"steps": steps})["results"]
        load.latencies.append(time.perf_counter() - asked)
        for customer, reply in zip(customers, replies, strict=True):
            customer.state = reply
        load.steps += len(steps)
        done = [customer for customer in customers if customer.is_done()]
        if done:
            post("/batch/close", {"session_ids": [c.state["session_id"] for c in done]})
            begin(done)
            load.resets += len(done)
    load.seconds = time.perf_counter() - begun
    post("/batch/close", {"session_ids": [c.state["session_id"] for c in customers]})
    answer.send(load)


def run_clients(
    server: MeasuredServer, options: argparse.Namespace, sessions: int, batch: bool
) -> None:
    """One line of the table."""
    context = multiprocessing.get_context("fork")
    count = 1 if batch else sessions
    start = context.Barrier(count + 1)
    receivers, processes = [], []
    for seed in range(count):
        receiver, sender = context.Pipe(duplex=False)
        if batch:
            target, arguments = play_batch, (sessions, options.seconds, sender)
        else:
            target, arguments = play_alone, (seed, options.seconds, start, sender)
        processes.append(
            context.Process(
                target=target, args=(server.url, options.client, options.split, *arguments)
            )
        )
        receivers.append(receiver)
        processes[-1].start()
    if not batch:
        start.wait()
    before = server.processor_seconds()
    loads: list[Load] = [receiver.recv() for receiver in receivers]
    used = server.processor_seconds() - before
    for process in processes:
        process.join()
    steps = sum(load.steps for load in loads)
    seconds = statistics.mean(load.seconds for load in loads)
    latencies = sorted(latency for load in loads for latency in load.latencies)
    percentiles = [1e3 * latencies[int(part * (len(latencies) - 1))] for part in (0.5, 0.99)]
    rate = steps / seconds
    print(
        f"| {sessions:4d} | {'batch' if batch else 'single'} | {rate:,.0f} |"
        f" {rate / ORIGINAL_STEPS:.0f} | {percentiles[0]:.1f} | {percentiles[1]:.1f} |"
        f" {1e6 * used / steps:.0f} | {sum(load.resets for load in loads) / seconds:,.0f} |"
        f" {server.megabytes():.0f} |",
        flush=True,
    )


def session_memory(server: MeasuredServer, options: argparse.Namespace, sessions: int) -> None:
    """Resident memory for many sessions that were each played a few steps."""
    post = poster(server.url, options.client)
    before = server.megabytes()
    customers = [Customer(options.split, seed) for seed in range(sessions)]
    for begin in range(0, sessions, 256):
        part = customers[begin : begin + 256]
        wanted = [customer.wanted() for customer in part]
        states = post("/batch/create", {"sessions": wanted})["results"]
        for customer, state in zip(part, states, strict=True):
            customer.begin(state)
        for _ in range(6):
            playing = [customer for customer in part if not customer.is_done()]
            steps = [{"session_id": c.state["session_id"], **c.step()} for c in playing]
            replies = post("/batch/step", {"steps": steps})["results"]
            for customer, reply in zip(playing, replies, strict=True):
                customer.state = reply
    grown = server.megabytes() - before
    print(
        f"\n{sessions} live sessions of up to 6 steps: {before:.0f} MB -> {before + grown:.0f} MB,"
        f" {1e3 * grown / sessions:.1f} KB per session"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--data", default="generated", help="generated, or a folder")
    parser.add_argument("--sessions", type=int, nargs="+", default=[1, 16, 64, 256])
    parser.add_argument("--seconds", type=float, default=10.0, help="for each line of the table")
    parser.add_argument("--split", default="train")
    parser.add_argument("--memory-sessions", type=int, default=4096)
    parser.add_argument(
        "--client", choices=("http.client", "urllib3", "requests"), default="urllib3"
    )
    options = parser.parse_args()
    capacity = str(max(4096, options.memory_sessions))
    server = MeasuredServer(["webshop", "--data", options.data, "--capacity", capacity])
    try:
        load = os.getloadavg()[0]
        print(
            f"{options.data} data, {options.client}, {os.cpu_count()} cores, load {load:.1f}"
            f" before: ready in {server.ready_seconds:.2f} s"
            f" ({server.ready_processor_seconds:.2f} s of processor time)"
            f" with {server.megabytes():.0f} MB\n"
        )
        print(
            "| sessions | calls | steps/s | x original | p50 ms | p99 ms | server us/step |"
            " resets/s | server MB |\n|---|---|---|---|---|---|---|---|---|"
        )
        for sessions in options.sessions:
            run_clients(server, options, sessions, batch=False)
        for sessions in options.sessions:
            run_clients(server, options, sessions, batch=True)
        if options.memory_sessions:
            session_memory(server, options, options.memory_sessions)
    finally:
        server.stop()


if __name__ == "__main__":
    main()
