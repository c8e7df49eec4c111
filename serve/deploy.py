"""The deploy stage: the tuned model's name answers, and the server reads a conversation, and computes, just as training did."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx

from trainers.errors import ServingDiffers, Unavailable
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


TOLERANCE = (0.1, 1.0)
"""Nats that log-probabilities may lie apart, in the mean and at most: the app computes in bf16, the reference in fp32. Measured on
SmolLM2-135M: 0.036 and 0.34 over 248 tokens; each job's own figures stand in its `deploy.json`."""


@dataclass(frozen=True)
class Replay:
    """A held-out conversation as training saw it."""

    id: str
    """Where it comes from, `file:line`."""
    ids: list[int]
    logprobs: dict[int, float]
    """Position of a supervised token in `ids` -> its log-probability by what was trained."""
    messages: Conversation | None = None
    """The conversation up to the last answer; None where the example is no longer the row as it was written (shortened, masked)."""
    prompt_ids: list[int] | None = None
    """What training put before that answer."""


REMEDY = "See the serving app's log on Ray's dashboard, then run the job again: it goes on with this stage."


def application(name: str, model_dir: Path, token_file: Path, **more: Any) -> dict[str, Any]:
    """The entry of one model, a base or a whole tuned one, in `applications` of Ray's `PUT /api/serve/applications/`; `more` of
    serve.app.build's args."""
    return {
        "name": name,
        "route_prefix": f"/{name}",
        "import_path": "serve.app:build",
        "args": {"name": name, "model_dir": str(model_dir), "token_file": str(token_file), **more},
    }


def deploy(
    run: RunDir,
    model: ModelRecord,
    model_name: str,
    url: str,
    token: str,
    chat: Chat,
    conversations: Sequence[Conversation] = PROBES,
    wait_s: float = 300.0,
    replays: Sequence[Replay] = (),
) -> DeployRecord:
    """Wait for the serving app at `url`, check that it reads `conversations` as `chat` does and computes what training did for `replays`,
    and let the tuned model answer once.

    The app is the base's, which is asked with the adapter, or, for a whole tuned model, its own. Raises Unavailable if the app is not
    healthy within `wait_s` seconds or cannot answer, and ServingDiffers, with the first difference, if it reads or computes otherwise.
    """
    wait_until_healthy(url, run, "deploy", wait_s)
    adapter = str(adapter_of(run, model) or "").encode("utf-8")  # httpx takes other than ASCII only as bytes
    headers = {b"authorization": f"Bearer {token}".encode(), b"x-tuneyard-model": model_name.encode(), b"x-tuneyard-adapter": adapter}
    with httpx.Client(base_url=url, headers=headers, timeout=wait_s, trust_env=False) as client:
        run.progress("deploy", doing="checking that serving reads conversations as training did")
        for messages in conversations:
            served = _post(client, "/v1/tuneyard/prompt", {"messages": messages})["prompt_ids"]
            if served != chat.prompt(messages):
                raise ServingDiffers(
                    f"The serving app gives the model other tokens than training did for {messages!r}.",
                    "Deploy the app again: its base model's folder was changed since it was started.",
                )
        run.progress("deploy", doing="asking the tuned model")
        asked = time.monotonic()
        _post(client, "/v1/chat/completions", {"model": model_name, "messages": conversations[0], "max_tokens": 16, "temperature": 0})
        record = DeployRecord(model=model_name, first_answer_s=time.monotonic() - asked)
        if replays:
            run.progress("deploy", doing="replaying held-out conversations")
            record = record.model_copy(update=_replay(client, model_name, replays, chat))
    run.write("deploy.json", record)
    return record


def _replay(client: httpx.Client, model_name: str, replays: Sequence[Replay], chat: Chat) -> dict[str, Any]:
    """Hold the app to what training saw and computed; the numbers for the record. Raises ServingDiffers."""
    differences: list[tuple[float, str]] = []
    for replay in replays:
        if replay.messages is not None and replay.prompt_ids is not None:
            served = _post(client, "/v1/tuneyard/prompt", {"messages": replay.messages})["prompt_ids"]
            if served != replay.prompt_ids:
                at = next((i for i, (a, b) in enumerate(zip(served, replay.prompt_ids, strict=False)) if a != b), None)
                at = min(len(served), len(replay.prompt_ids)) if at is None else at
                got, want = (chat.decode(ids[at : at + 4]) for ids in (served, replay.prompt_ids))
                raise ServingDiffers(
                    f"{replay.id}: from token {at} on, the serving app gives the model {got!r} where training had {want!r}.",
                    "Deploy the app again: its base model's folder was changed since it was started.",
                )
        body = {"model": model_name, "prompt": [replay.ids], "max_tokens": 0, "echo": True, "logprobs": 0}
        found = _post(client, "/v1/completions", body)["choices"][0]["logprobs"]["token_logprobs"]
        for at, want in replay.logprobs.items():
            token = f"{replay.id}, token {at} ({chat.tokenizer.decode([replay.ids[at]], skip_special_tokens=False)!r})"
            told = f"{token}: log-probability {found[at]:.3f} served, {want:.3f} trained"
            differences.append((abs(found[at] - want), told))
    sizes = [size for size, _ in differences]
    mean, most = (sum(sizes) / len(sizes), max(sizes)) if sizes else (0.0, 0.0)
    if not (mean <= TOLERANCE[0] and most <= TOLERANCE[1]):
        first = next((told for size, told in differences if size > TOLERANCE[1]), max(differences)[1])
        raise ServingDiffers(
            f"The served model does not compute what was trained: {first}; over {len(sizes)} tokens, {mean:.3f} nats apart in the mean and "
            f"{most:.3f} at most, where {TOLERANCE[0]} and {TOLERANCE[1]} are allowed.",
            "Deploy the app again, and report this if it stays.",
        )
    return {
        "replayed": len(replays),
        "compared_tokens": len(sizes),
        "mean_difference": mean,
        "max_difference": most,
        "tolerance": TOLERANCE,
    }


def adapter_of(run: RunDir, model: ModelRecord) -> Path | None:
    """The adapter that the base is asked with; None for a whole tuned model, which is asked as it is."""
    return run.path(model.adapter) if model.served == "adapter" and model.adapter else None


def wait_until_healthy(url: str, run: RunDir, stage: str, wait_s: float = 300.0) -> None:
    """Return once the app at `url` is loaded; raises Unavailable after `wait_s` seconds."""
    started, cause = time.monotonic(), ""
    while (waited := time.monotonic() - started) < wait_s:
        run.progress(stage, doing="waiting for the serving app", waited_s=round(waited))
        try:
            response = httpx.get(f"{url}/healthz", timeout=5, trust_env=False)
            if response.status_code == 200:
                return
            cause = f"HTTP {response.status_code}"
        except httpx.TransportError as error:
            cause = type(error).__name__
        time.sleep(1)
    raise Unavailable(
        f"{url} was not ready after {wait_s:.0f} s ({cause}).",
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
