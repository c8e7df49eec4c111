"""What the deploy stage holds the served model to: held-out conversations, as training saw them and as the trained model scores them."""

from __future__ import annotations

from pathlib import Path

import torch

from serve.deploy import Replay
from trainers import agreement
from trainers.chat import Chat
from trainers.errors import RowError, TuneyardError
from trainers.records import ModelRecord, RunDir
from trainers.sources import first_rows
from trainers.spec import JobSpec, QLora
from trainers.store import TokenStore
from trainers.tensors import ModelFolder

COUNT = 4
_ROWS = 20_000  # of a source that are looked through for the conversations


def replays(spec: JobSpec, model_dir: Path, model: ModelRecord, store: Path, chat: Chat, run: RunDir) -> list[Replay]:
    """A few validation examples (of training, where nothing was held out), each with the log-probabilities of its answer's last tokens.

    They are the trained model's: base + adapter as PEFT computes them, in fp32, or the whole model's own weights, which the merge held to
    the checkpoint's.
    """
    split = TokenStore(store, "validation")
    if not len(split):
        split = TokenStore(store, "train")
    chosen = [i * len(split) // COUNT for i in range(COUNT)] if len(split) > COUNT else list(range(len(split)))
    examples = [(split.example_id(i), *split.get(i)) for i in chosen]
    logits_NV = trained_logits(spec, model_dir, model, run, [ids.tolist() for _, ids, _ in examples])
    rows = _conversations(spec, {id for id, _, _ in examples})
    found, row = [], 0
    for id, ids, weights in examples:
        start = max(0, len(ids) - agreement.LONGEST)  # the reference sees no more, so the server is shown no more
        shown, count = ids[start:].tolist(), min(len(ids) - start, agreement.POSITIONS)
        logprobs_TV = logits_NV[row : row + count].log_softmax(-1)
        row += count
        first = len(shown) - count  # position of the first logits; they are about the token after it
        scored = {
            first + t + 1: float(logprobs_TV[t, shown[first + t + 1]])
            for t in range(count - 1)
            if weights[start + first + t + 1] > 0
        }  # fmt: skip
        messages, prompt = _as_written(rows.get(id), ids.tolist(), chat, spec) if not start else (None, None)
        found.append(Replay(id, shown, scored, messages, prompt))
    return found


def trained_logits(spec: JobSpec, model_dir: Path, model: ModelRecord, run: RunDir, prompts: list[list[int]]) -> torch.Tensor:
    """Logits (N, V) of what was trained at the last positions of each prompt."""
    if model.adapter is None:
        assert model.merged is not None  # a model without an adapter is served as a whole
        folder = run.path(model.merged)
        return agreement.of_weights(folder, agreement.reader(ModelFolder(folder)), prompts)
    adapter, read = run.path(model.adapter), agreement.reader(ModelFolder(model_dir))
    if isinstance(spec.method, QLora):
        dtype = torch.bfloat16 if spec.scale.precision == "bf16" else torch.float32
        read = agreement.in_four_bits(read, adapter, spec.method.double_quant, dtype)
    return agreement.of_adapter(model_dir, adapter, read, prompts)[0]


def _conversations(spec: JobSpec, ids: set[str]) -> dict[str, list[dict[str, str]]]:
    """The rows of these ids, as far as they are plain and found soon."""
    found: dict[str, list[dict[str, str]]] = {}
    validation = spec.data.validation if isinstance(spec.data.validation, list) else []
    for source in (*validation, *spec.data.train):
        try:
            for number, row in enumerate(first_rows(source)):
                if not isinstance(row, RowError) and row["id"] in ids and not row.get("tools") and not row.get("text"):
                    found.setdefault(row["id"], row["messages"])
                if number >= _ROWS or len(found) == len(ids):
                    break
        except TuneyardError:  # it is gone since: ids and log-probabilities are compared all the same
            continue
    return found


def _as_written(
    messages: list[dict[str, str]] | None, ids: list[int], chat: Chat, spec: JobSpec
) -> tuple[list[dict[str, str]] | None, list[int] | None]:
    """(the conversation before its last answer, the ids before that answer), where the example is the row as it was written."""
    if messages is None or messages[-1]["role"] != "assistant":
        return None, None
    try:
        example = chat.example(messages, spec.data.train_on)
    except TuneyardError:
        return None, None
    if example.ids.tolist() != ids:
        return None, None
    plain = [{"role": turn["role"], "content": turn["content"]} for turn in messages[:-1]]
    return plain, ids[: example.spans[-1][0]]
