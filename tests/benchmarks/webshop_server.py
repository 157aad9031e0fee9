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
import os
import random
import time
from typing import Any

from measured_server import Load, MeasuredServer, Post, poster, run_clients

ORIGINAL_STEPS = 47.0
"""Steps per second of the original text environment in one process, no HTTP (median of five)."""
MAX_TURNS = 15


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


def play_alone(url: str, split: str, seed: int, seconds: float, start: Any, out: Any) -> None:
    """A client process: one session at a time, single calls."""
    post = poster(url)
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
        load.count += 1
    load.seconds = time.perf_counter() - begun
    post("/batch/close", {"session_ids": [customer.state["session_id"]]})
    out.put(load)


def begin_all(post: Post, customers: list[Customer]) -> None:
    """Begin a session for each customer with one request."""
    wanted = [customer.wanted() for customer in customers]
    states = post("/batch/create", {"sessions": wanted})["results"]
    for customer, state in zip(customers, states, strict=True):
        customer.begin(state)


def play_batch(url: str, split: str, sessions: int, seconds: float, start: Any, out: Any) -> None:
    """A client process that steps all its sessions with one request."""
    post = poster(url)
    customers = [Customer(split, seed) for seed in range(sessions)]
    begin_all(post, customers)
    load = Load()
    start.wait()
    begun = time.perf_counter()
    while time.perf_counter() < begun + seconds:
        steps = [{"session_id": c.state["session_id"], **c.step()} for c in customers]
        asked = time.perf_counter()
        replies = post("/batch/step", {"steps": steps})["results"]
        load.latencies.append(time.perf_counter() - asked)
        for customer, reply in zip(customers, replies, strict=True):
            customer.state = reply
        load.count += len(steps)
        done = [customer for customer in customers if customer.is_done()]
        if done:
            post("/batch/close", {"session_ids": [c.state["session_id"] for c in done]})
            begin_all(post, done)
            load.resets += len(done)
    load.seconds = time.perf_counter() - begun
    post("/batch/close", {"session_ids": [c.state["session_id"] for c in customers]})
    out.put(load)


def report(server: MeasuredServer, options: argparse.Namespace, sessions: int, batch: bool) -> None:
    """One line of the table."""
    play, numbers = (play_batch, [sessions]) if batch else (play_alone, range(sessions))
    calls = [(server.url, options.split, number, options.seconds) for number in numbers]
    found = run_clients(play, calls, server)
    print(
        f"| {sessions:4d} | {'batch' if batch else 'single'} | {found.rate:,.0f} |"
        f" {found.rate / ORIGINAL_STEPS:.0f} | {found.p50:.1f} | {found.p99:.1f} |"
        f" {found.server_microseconds:.0f} | {found.resets:,.0f} | {server.megabytes():.0f} |",
        flush=True,
    )


def session_memory(server: MeasuredServer, options: argparse.Namespace, sessions: int) -> None:
    """Resident memory for many sessions that were each played a few steps."""
    post = poster(server.url)
    before = server.megabytes()
    customers = [Customer(options.split, seed) for seed in range(sessions)]
    for begin in range(0, sessions, 256):
        part = customers[begin : begin + 256]
        begin_all(post, part)
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
    options = parser.parse_args()
    capacity = str(max(4096, options.memory_sessions))
    server = MeasuredServer(["webshop", "--data", options.data, "--capacity", capacity])
    try:
        load = os.getloadavg()[0]
        print(
            f"{options.data} data, {os.cpu_count()} cores, load {load:.1f}"
            f" before: ready in {server.ready_seconds:.2f} s"
            f" ({server.ready_processor_seconds:.2f} s of processor time)"
            f" with {server.megabytes():.0f} MB\n"
        )
        print(
            "| sessions | calls | steps/s | x original | p50 ms | p99 ms | server us/step |"
            " resets/s | server MB |\n|---|---|---|---|---|---|---|---|---|"
        )
        for batch in (False, True):
            for sessions in options.sessions:
                report(server, options, sessions, batch)
        if options.memory_sessions:
            session_memory(server, options, options.memory_sessions)
    finally:
        server.stop()


if __name__ == "__main__":
    main()
