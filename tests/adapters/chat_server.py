"""A small server that speaks chat completions, in a process of its own: a model without weights.

The name of the model says how it answers: `first` takes the first admissible action of the prompt,
`any` another one depending on the prompt's length, `malformed` no action at all, `empty` nothing,
`broken` an HTTP error. `replay:<file>` says what a JSON file has for the task and the turn.
"""

from __future__ import annotations

import contextlib
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

ACTIONS = "You can do one of these now:\n"


def completion(model: str, messages: list[dict[str, str]]) -> str:
    """Return the model's reply; equal for equal messages."""
    if model.startswith("replay:"):
        first, last = (next(m for m in ms if m["role"] == "user")["content"]
                       for ms in (messages, messages[::-1]))  # fmt: skip
        number = re.search(r"This is turn (\d+)", last)
        turn = int(number[1]) - 1 if number else sum(m["role"] == "assistant" for m in messages)
        task = re.search(r"Your task: (.*)", first)
        assert task is not None
        said = json.loads(Path(model.removeprefix("replay:")).read_text())[task[1]][turn]
        assert isinstance(said, str)
        return said
    if model == "malformed":
        return "<action>one</action><action>two</action> ] [ \U0001f600 </think>\n"
    if model == "empty":
        return ""
    prompt = messages[-1]["content"]
    if ACTIONS not in prompt:
        words = messages[0]["content"].partition("\n\n")[0]
        searched = len(messages) > 1
        return f"<answer>{words}</answer>" if searched else f"<search>{words}</search>"
    actions = prompt.partition(ACTIONS)[2].partition("\n\n")[0].splitlines()
    index = 0 if model == "first" else len(prompt) % len(actions)
    return f"<think>why not</think><action>{actions[index]}</action>"


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if not self.path.endswith("/chat/completions") or body["model"] == "broken":
            self._answer(400, {"error": {"message": "this model is broken", "type": "invalid"}})
            return
        text = completion(body["model"], body["messages"])
        message = {"role": "assistant", "content": text}
        choice = {"index": 0, "message": message, "finish_reason": "stop"}
        usage = {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2}
        self._answer(
            200,
            {"id": "1", "object": "chat.completion", "created": 0, "model": body["model"],
             "choices": [choice], "usage": usage},
        )  # fmt: skip

    def _answer(self, status: int, body: dict[str, Any]) -> None:
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: object) -> None:
        pass


@contextlib.contextmanager
def chat_server() -> Iterator[str]:
    """Runs the server; gives its base URL."""
    with subprocess.Popen([sys.executable, __file__], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            yield process.stdout.readline().strip()
        finally:
            process.terminate()


if __name__ == "__main__":
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    print(f"http://127.0.0.1:{server.server_port}/v1", flush=True)
    server.serve_forever()
