"""The real vLLM in a process of its own, started as its documentation says."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

import requests

START_SECONDS = 300.0
"""Time for a server to start; on two busy cores it takes a minute."""


class ServedVllm(NamedTuple):
    """A server that is ready."""

    url: str
    process: subprocess.Popen[bytes]
    """Leads a process group; its engine is in another process of the group."""
    log: Path

    def kill(self) -> None:
        """End all processes of the server at once, as `kill -9` does."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


@contextmanager
def served_vllm(
    folder: Path, log: Path, *options: str, name: str = "smollm2", port: int = 0
) -> Iterator[ServedVllm]:
    """Serve the model in a folder; port 0: a free one. The output goes to `log`."""
    port = port or free_port()
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server"]
    command += ["--model", str(folder), "--served-model-name", name, "--port", str(port)]
    command += ["--dtype", "float32", "--enforce-eager", "--max-model-len", "2048", *options]
    environment = {
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_SERVER_DEV_MODE": "1",  # TRL asks for the settings of a server
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            env={**os.environ, **environment},
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    served = ServedVllm(f"http://127.0.0.1:{port}", process, log)
    try:
        _wait_until_ready(served)
        yield served
    finally:
        served.kill()


def free_port() -> int:
    """Return a port that nothing listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


def _wait_until_ready(served: ServedVllm) -> None:
    end = time.monotonic() + START_SECONDS
    while time.monotonic() < end and served.process.poll() is None:
        try:
            if requests.get(f"{served.url}/health", timeout=5).ok:
                return
        except requests.RequestException:
            pass
        time.sleep(0.5)
    state = f"ended with {served.process.returncode}" if served.process.returncode else "is late"
    tail = served.log.read_text(errors="replace")[-3000:]
    raise RuntimeError(f"vLLM {state}; the end of {served.log}:\n{tail}")
