"""The deploy stage: the tuned model's name answers, and the server reads a conversation just as training did."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx

from trainers.errors import Unavailable
from trainers.records import DeployRecord, ModelRecord, RunDir

if TYPE_CHECKING:
    from trainers.chat import Chat

Conversation = list[dict[str, str]]

PROBES: tuple[Conversation, ...] = (
    [{"role": "user", "content": "What is 2 + 2?"}],
    [
        {"role": "system", "content": "Answer in one word."},
        {"role": "user", "content": "  naïve café \N{HOURGLASS WITH FLOWING SAND}\n\n<filename>x</filename> "},
    ],
    [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}, {"role": "user", "content": "1234567 * 89?"}],
)
"""Where renderers differ: a default or a given system message, blanks at the ends, other scripts, digits, several turns."""


REMEDY = "See the serving app's log on Ray's dashboard, then run the job again: it goes on with this stage."


def application(base: str, model_dir: Path, token_file: Path) -> dict[str, Any]:
    """The entry of one base model in `applications` of Ray's `PUT /api/serve/applications/`."""
    return {
        "name": base,
        "route_prefix": f"/{base}",
        "import_path": "serve.app:build",
        "args": {"base": base, "model_dir": str(model_dir), "token_file": str(token_file)},
    }


def deploy(
    run: RunDir,
    model: ModelRecord,
    model_name: str,
    serve_url: str,
    token: str,
    chat: Chat,
    conversations: Sequence[Conversation] = PROBES,
    wait_s: float = 300.0,
) -> DeployRecord:
    """Wait for the base's serving app, check that it reads `conversations` as `chat` does, and let the adapter answer once.

    Raises Unavailable if the app is not healthy within `wait_s` seconds, reads otherwise than training, or cannot answer.
    """
    adapter = str(run.path(model.adapter)).encode("utf-8")  # httpx takes other than ASCII only as bytes
    headers = {b"authorization": f"Bearer {token}".encode(), b"x-tuneyard-model": model_name.encode(), b"x-tuneyard-adapter": adapter}
    with httpx.Client(base_url=serve_url, headers=headers, timeout=wait_s, trust_env=False) as client:
        _wait_until_healthy(client, run, wait_s)
        run.progress("deploy", doing="checking that serving reads conversations as training did")
        for messages in conversations:
            served = _post(client, "/v1/tuneyard/prompt", {"messages": messages})["prompt_ids"]
            if served != chat.prompt(messages):
                raise Unavailable(
                    f"The serving app gives the model other tokens than training did for {messages!r}.",
                    "Deploy the app again: its base model's folder was changed since it was started.",
                )
        run.progress("deploy", doing="asking the tuned model")
        asked = time.monotonic()
        _post(client, "/v1/chat/completions", {"model": model_name, "messages": conversations[0], "max_tokens": 16, "temperature": 0})
        record = DeployRecord(model=model_name, first_answer_s=time.monotonic() - asked)
    run.write("deploy.json", record)
    return record


def _wait_until_healthy(client: httpx.Client, run: RunDir, wait_s: float) -> None:
    started, cause = time.monotonic(), ""
    while (waited := time.monotonic() - started) < wait_s:
        run.progress("deploy", doing="waiting for the serving app", waited_s=round(waited))
        try:
            response = client.get("/healthz", timeout=5)
            if response.status_code == 200:
                return
            cause = f"HTTP {response.status_code}"
        except httpx.TransportError as error:
            cause = type(error).__name__
        time.sleep(1)
    raise Unavailable(
        f"{client.base_url} was not ready after {wait_s:.0f} s ({cause}).",
        "See the serving app's status on Ray's dashboard, then run the job again.",
    )


def _post(client: httpx.Client, path: str, body: dict[str, Any]) -> dict[str, Any]:
    try:
        response = client.post(path, json=body)
        value = response.json()
    except (httpx.TransportError, ValueError) as error:
        raise Unavailable(f"{str(client.base_url).rstrip('/')}{path} gave no answer ({type(error).__name__}).", REMEDY) from None
    if response.status_code != 200:
        raise Unavailable(f"{str(client.base_url).rstrip('/')}{path} answered {response.status_code}: {value}.", REMEDY)
    return value
