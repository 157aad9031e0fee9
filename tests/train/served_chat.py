"""A small server of chat completions that decides from the prompt, and misbehaves when told to."""

from __future__ import annotations

import json
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from http.server import BaseHTTPRequestHandler
from typing import Any

from quiet_server import QuietServer

HEADING = "You can do one of these now:\n"


def first_action(messages: Sequence[dict[str, str]]) -> str:
    """The first admissible action of the prompt, as a completion."""
    listed = messages[-1]["content"].rpartition(HEADING)[2]
    return f"<think>the first</think><action>{listed.splitlines()[0]}</action>"


class FakeChat:
    """Answers POST /v1/chat/completions.

    The next requests meet `mishaps`, one each: a status; `no usage`, `garbage`, `page`, `no
    choices`, `hang`, `cut`; or a pair of a status and a body. Then it answers what `answer` says.
    """

    def __init__(self, answer: Callable[[Any], str] = first_action) -> None:
        self.answer = answer
        self.mishaps: deque[Any] = deque()
        self.always: Any = None
        """A mishap of all requests from `healthy` on."""
        self.healthy = 10**9
        self.retry_after = ""
        self.thoughts = 0
        """Tokens of reasoning, which usage counts apart."""
        self.message: dict[str, Any] = {}
        """Fields of a message, which override its own."""
        self.most_characters = 10**9
        """Longer prompts are too long."""
        self.stops = False
        """It takes stop strings and leaves out the one it stopped at, as OpenAI does."""
        self.says_why = False
        """It says which one that was, as vLLM does."""
        self.seconds = 0.0
        self.posts: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.times: list[float] = []
        self.most_at_once = self._at_once = 0
        self.released = threading.Event()
        self._lock = threading.Lock()
        handler = type("Handler", (_Handler,), {"fake": self})
        self._server = QuietServer(handler)
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}/v1"

    def __enter__(self) -> FakeChat:
        return self

    def __exit__(self, *_: object) -> None:
        self.released.set()
        self._server.shutdown()
        self._server.server_close()

    def respond(self, body: dict[str, Any], headers: dict[str, str]) -> tuple[int, Any]:
        """Status and body of an answer; a body of bytes is sent as it is."""
        with self._lock:
            self.posts.append(body)
            self.headers.append(headers)
            self.times.append(time.monotonic())
            self._at_once += 1
            self.most_at_once = max(self.most_at_once, self._at_once)
            mishap = self.mishaps.popleft() if self.mishaps else None
            if len(self.posts) > self.healthy:
                mishap = self.always
        try:
            time.sleep(self.seconds)
            return self._answered(body, mishap)
        finally:
            with self._lock:
                self._at_once -= 1

    def _answered(self, body: dict[str, Any], mishap: Any) -> tuple[int, Any]:
        if isinstance(mishap, tuple):
            return mishap
        if isinstance(mishap, int):
            return mishap, {"error": {"message": f"oh, {mishap}"}}
        if mishap == "hang":
            self.released.wait(20)
        if mishap == "garbage":
            return 200, b'{"choices": [{"mess'
        if mishap == "page":
            return 200, b"<html>Welcome</html>"
        characters = sum(len(message["content"]) for message in body["messages"])
        if characters > self.most_characters:
            message = "This model's maximum context length is 8 tokens."
            return 400, {"error": {"message": message, "code": "context_length_exceeded"}}
        text = self.answer(body["messages"])
        stop_reason = None
        if self.stops:
            found = [(text.find(stop), stop) for stop in body.get("stop", ()) if stop in text]
            if found:
                end, stop_reason = min(found)
                text = text[:end]
        message = {"role": "assistant", "content": text, **self.message}
        choice = {
            "index": 0,
            "message": message,
            "finish_reason": "length" if mishap == "cut" else "stop",
            **({"stop_reason": stop_reason} if self.says_why else {}),
        }
        answer: dict[str, Any] = {
            "id": "1", "object": "chat.completion", "created": 1, "model": body["model"],
            "choices": [] if mishap == "no choices" else [choice],
        }  # fmt: skip
        if mishap != "no usage":
            said = len(text.split())
            answer["usage"] = {
                "prompt_tokens": characters,
                "completion_tokens": said,
                "total_tokens": characters + said,
            }
            if self.thoughts:
                answer["usage"]["completion_tokens_details"] = {"reasoning_tokens": self.thoughts}
        return 200, answer


class _Handler(BaseHTTPRequestHandler):
    fake: FakeChat
    protocol_version = "HTTP/1.1"
    # Headers and body are two packets, of which the second would wait for the first's receipt.
    disable_nagle_algorithm = True

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path != "/v1/chat/completions":
            status, content = 404, {"detail": "Not Found"}
        else:
            headers = {name.lower(): value for name, value in self.headers.items()}
            status, content = self.fake.respond(body, headers)
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        page = data.startswith(b"<")
        self.send_response(status)
        self.send_header("Content-Type", "text/html" if page else "application/json")
        self.send_header("Content-Length", str(len(data)))
        if status != 200 and self.fake.retry_after:
            self.send_header("Retry-After", self.fake.retry_after)
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: Any) -> None:
        """Says nothing."""
