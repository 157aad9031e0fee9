"""Compares the client time of a small POST on an open connection.

Three ways in turn, in rounds, against one server in a process of its own: bare urllib3,
`JsonClient`, and `requests.Session.post`. The figure is processor time of the client's thread per
call, in milliseconds: the median of all rounds, and the ratio to urllib3.

    python tests/benchmarks/http_client.py [--calls 500] [--rounds 10]
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import requests
import urllib3

from atod_gym.serving.http import JsonClient

SERVER = """
import asyncio

async def serve(reader, writer):
    answer = b'{"text": "' + b"x" * 1000 + b'"}'
    head = b"HTTP/1.1 200 OK\\r\\nContent-Length: %d\\r\\n\\r\\n"
    while True:
        try:
            lines = (await reader.readuntil(b"\\r\\n\\r\\n")).decode().lower().splitlines()
        except asyncio.IncompleteReadError:
            return
        length = [int(line.split(":")[1]) for line in lines if line.startswith("content-length")]
        await reader.readexactly(sum(length))
        writer.write(head % len(answer) + answer)

async def main():
    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()

asyncio.run(main())
"""
BODY = {"turn_index": 3, "action": "click[description]"}


def with_urllib3(url: str) -> Callable[[], object]:
    """Return a call as bare urllib3 makes it."""
    pool = urllib3.connection_from_url(url, maxsize=64, timeout=urllib3.Timeout(5, 60))
    headers = {"Content-Type": "application/json", "Accept": "application/json"}

    def call() -> object:
        response = pool.urlopen(
            "POST", "/step", body=json.dumps(BODY).encode(), headers=headers, retries=False,
            redirect=False, preload_content=False,
        )  # fmt: skip
        answer = response.read(1_000_000)
        response.release_conn()
        return json.loads(answer)

    return call


def with_requests(url: str) -> Callable[[], object]:
    """Return a call as a plain session of requests makes it."""
    session = requests.Session()
    session.trust_env = False
    return lambda: session.post(f"{url}/step", json=BODY, timeout=(5, 60)).json()


def with_json_client(url: str) -> Callable[[], object]:
    """Return a call of `JsonClient`."""
    client = JsonClient(url, advice="")
    return lambda: client.post("/step", BODY)


def milliseconds(call: Callable[[], object], calls: int) -> float:
    """Return the processor time of one call."""
    start = time.thread_time()
    for _ in range(calls):
        call()
    return 1000 * (time.thread_time() - start) / calls


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--calls", type=int, default=500)
    parser.add_argument("--rounds", type=int, default=10)
    options = parser.parse_args()
    server = subprocess.Popen([sys.executable, "-c", SERVER], stdout=subprocess.PIPE, text=True)
    assert server.stdout is not None
    try:
        url = f"http://127.0.0.1:{int(server.stdout.readline())}"
        ways = {
            "urllib3": with_urllib3(url),
            "JsonClient": with_json_client(url),
            "requests": with_requests(url),
        }
        times: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(options.rounds):
            for name, call in ways.items():
                times[name].append(milliseconds(call, options.calls))
    finally:
        server.kill()
        server.wait()
    base = statistics.median(times["urllib3"])
    for name, values in times.items():
        median = statistics.median(values)
        print(f"{name:12} {median:.3f} ms  {median / base:.2f} x  {median - base:+.3f} ms")


if __name__ == "__main__":
    main()
