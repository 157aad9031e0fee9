"""The server that holds a teacher: how to reach it, its name, and the longest prompt it takes."""

from __future__ import annotations

import os

from atod_gym.errors import AtodError, ServerError
from atod_gym.serving.http import JsonClient
from atod_train.config import TeacherApi

TOKEN_VARIABLE = "ATOD_TEACHER_TOKEN"
"""Environment variable with the bearer token of servers that want one."""

REMEDY: dict[TeacherApi, str] = {
    "completions": "The server must answer /v1/completions with prompt_logprobs, as vLLM does",
    "sglang": "The server must answer /generate with return_logprob, as SGLang does",
}


def connect(url: str, api: TeacherApi, timeout: float = 600.0) -> JsonClient:
    """A client of the server; it connects at the first request.

    Args:
        url: where the server listens, such as http://10.0.0.2:8000.
        api: its dialect.
        timeout: seconds to wait for an answer.

    Raises:
        InvalidSettingError: a URL that is none.
    """
    return JsonClient(
        url,
        advice=f"{REMEDY[api]}; or start one: atod-train serve-teacher",
        token=os.environ.get(TOKEN_VARIABLE),
        timeout=timeout,
    )


def describe(client: JsonClient, api: TeacherApi, model: str = "") -> tuple[str, int | None]:
    """Name of the model at the server and its longest prompt, where the server tells.

    Args:
        client: from `connect`.
        api: the server's dialect.
        model: name of the model there; empty: the first that it lists.

    Returns:
        The name, and a number of tokens or None.

    Raises:
        ServerError: the server does not answer.
        AtodError: it has no such model.
    """
    try:
        listed = client.get("/v1/models").get("data")
    except ServerError as error:
        # Older SGLang has no list of models.
        if error.status != 404 or api != "sglang":
            raise
        return model or _path_of_model(client), None
    entries = listed if isinstance(listed, list) else []
    found = [entry for entry in entries if isinstance(entry, dict) and "id" in entry]
    chosen = next((entry for entry in found if entry["id"] == model or not model), None)
    if chosen is None and api == "completions":
        names = ", ".join(str(entry["id"]) for entry in found) or "none"
        raise AtodError(f"The server at {client.url} has no model {model!r}; it lists {names}.")
    name = model or str((chosen or {"id": "teacher"})["id"])
    # Adapters are listed without a length; it is their base model's.
    lengths = [(entry or {}).get("max_model_len") for entry in (chosen, *found)]
    length = next((length for length in lengths if isinstance(length, int)), 0)
    # Both servers refuse a prompt that leaves no room for one token more.
    return name, length - 1 if length > 0 else None


def _path_of_model(client: JsonClient) -> str:
    try:
        return str(client.get("/get_model_info")["model_path"])
    except (KeyError, ServerError):
        return "teacher"
