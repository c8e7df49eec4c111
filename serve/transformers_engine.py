"""Continuous batching on transformers' own Llama: one scheduler thread, one forward pass per step for all requests.

Every step packs one token of each decoding row and a piece of the waiting prompts into a single row of tokens, without
padding; only attention looks at the sequences apart. Requests join and leave between steps, whatever adapter they use.

Shape legend: T tokens of a step, N rows, E embedding size, V vocabulary, W width (the longest decoding row).
"""

from __future__ import annotations

import asyncio
import logging
import os
import threading
from collections import deque
from collections.abc import AsyncGenerator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from serve.adapters import Adapter, AdapterRegistry, make_adaptable
from serve.engine import GenerateRequest, PromptEvent, TokenEvent
from serve.grammar import Follower, Grammars
from serve.limits import most_tokens
from serve.packed import packed
from serve.prefixes import SHORTEST, Prefix, PrefixStore, shared
from serve.sampling import NOTHING, Choice, Scores, choose, score
from serve.slots import ATTENTION, Segment, SlotCache, Step, causal_mask, usual_room
from serve.text import AnswerText, pieces
from trainers import model as base_model
from trainers.chat import Chat
from trainers.errors import TuneyardError, Unavailable, UserError

log = logging.getLogger(__name__)

MAX_ROWS = 64
"""Sequences generated at a time; further ones wait."""
MAX_OPEN = 1024
"""Sequences running and waiting; further ones are refused."""
PREFILL_TOKENS = 512
"""Prompt tokens per step: more would make running streams stutter."""
HEADROOM = 64
"""Tokens that a row must have memory for beyond those known when it begins, or it would soon have to wait again."""
SCORED_LOGITS = 16_000_000
"""Logits of prompt tokens that are in memory at a time."""
STOPPED = Unavailable("The engine was stopped.", "Ask again shortly.")

Event = TokenEvent | PromptEvent


@dataclass(eq=False)
class Row:
    """One running request."""

    request: GenerateRequest
    max_tokens: int
    stop_ids: frozenset[int]
    text: AnswerText
    choice: Choice
    loop: asyncio.AbstractEventLoop
    events: asyncio.Queue[Event | Exception] = field(default_factory=asyncio.Queue)
    follower: Follower | None = None
    adapter: Adapter | None = None
    ids_T: np.ndarray = field(init=False)
    """int32: the prompt, then the answer; valid up to num_ids."""
    num_ids: int = field(init=False)
    length: int = 0
    """Tokens in the cache."""
    prompt_scores: list[Scores] = field(default_factory=lambda: [NOTHING])
    cancelled: bool = False

    def __post_init__(self) -> None:
        prompt = self.request.prompt_ids
        self.num_ids = len(prompt)
        self.ids_T = np.empty(len(prompt) + self.max_tokens, np.int32)  # the system gives memory only to what is written
        self.ids_T[: len(prompt)] = prompt

    @property
    def num_unread(self) -> int:
        """Known tokens that are not in the cache yet; of a decoding row its newest one."""
        return self.num_ids - self.length

    @property
    def is_scored(self) -> bool:
        """Its prompt's log-probabilities are asked for, and not yet told."""
        return self.request.prompt_logprobs is not None and self.num_ids == len(self.request.prompt_ids)

    @property
    def cached_T(self) -> np.ndarray:
        """The ids whose keys and values are in the cache."""
        return self.ids_T[: self.length]

    @property
    def reader(self) -> int | None:
        """Which weights read it: adapters read otherwise than the base."""
        return self.adapter.serial if self.adapter else None


class TransformersEngine:
    """Implements serve.engine.Engine. Its scheduler thread owns the model, the cache and all rows."""

    def __init__(
        self,
        model_dir: Path,
        dtype: torch.dtype = torch.bfloat16,
        device: torch.device | str | None = None,
        max_adapter_bytes: int = 1 << 30,
        max_prefix_bytes: int = 256 << 20,
        max_cache_bytes: int | None = None,
        num_threads: int | None = None,
    ) -> None:
        """On the first GPU unless `device` says otherwise, or on the CPU where there is none. `max_cache_bytes`: of the running requests'
        keys and values; where they do not fit, some requests wait."""
        self._device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self._model = base_model.load(model_dir, dtype, self._device, attn=ATTENTION)
        self._chat = Chat.load(model_dir)
        self._pieces = pieces(self._chat)
        self._mix, shapes = make_adaptable(self._model)
        self._head = packed(self._model.get_output_embeddings())  # type: ignore[arg-type]
        self._cache = SlotCache(self._model.config, dtype, self._device, max_cache_bytes or usual_room(self._device))
        self._prefixes = PrefixStore(max_prefix_bytes)
        self._dtype = dtype
        self._num_threads = num_threads or len(os.sched_getaffinity(0))
        self.context: int = min(self._model.config.max_position_embeddings, self._cache.max_tokens)
        self.vocab_size: int = self._model.get_output_embeddings().weight.shape[0]  # type: ignore[union-attr]
        self.adapters = AdapterRegistry(shapes, dtype, max_adapter_bytes, self._device)
        self._grammars = Grammars(self._chat, self.vocab_size)
        self._loader = ThreadPoolExecutor(1, "adapter-loader")
        self._compiler = ThreadPoolExecutor(1, "grammar-compiler")
        self._decoding: list[Row] = []  # the row at index i has slot i
        self._prefilling: list[Row] = []  # their slots follow; between steps at most one, with a part of its prompt in the cache
        self._waiting: deque[Row] = deque()
        self._num_open = 0
        self._num_preempted = 0
        self._wake = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="scheduler", daemon=True)
        self._thread.start()

    # -- the consumer's side (any event loop) ------------------------------------------------------------------------

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[Event, None]:
        row = self._row(request)
        with self._wake:
            if self._closed:
                raise STOPPED
            if self._num_open >= MAX_OPEN:
                raise Unavailable(f"{self._num_open} requests run or wait at this model, which is all that it holds.", "Ask again shortly.")
            self._num_open += 1
        try:
            if request.json_schema:
                row.follower = await asyncio.wrap_future(self._in(self._compiler, self._grammars.follow, request.json_schema))
            row.adapter = self.adapters.hold(request.adapter) if request.adapter else None
            if request.adapter and not row.adapter:
                self._in(self._loader, self._load_adapter, row, request.adapter)
            else:
                self._enqueue(row)
            finished = False
            while not finished:
                event = await row.events.get()
                if isinstance(event, Exception):
                    raise event
                finished = row.max_tokens == 0 if isinstance(event, PromptEvent) else event.finish_reason is not None
                yield event
        finally:
            row.cancelled = True  # the scheduler, which owns the row, lets go of it at its next step
            with self._wake:
                self._num_open -= 1

    def piece(self, id: int) -> bytes:
        return self._pieces[id] if 0 <= id < len(self._pieces) else b""

    def evict(self, adapter: str) -> None:
        self.adapters.evict(adapter)
        with self._wake:
            self._wake.notify()  # an idle scheduler lets go of its weights

    def stats(self) -> dict[str, Any]:
        with self._wake:
            waiting, rows = len(self._waiting), [*self._decoding, *self._prefilling]
        return {
            "waiting": waiting,
            "running": len(rows),
            "adapters": len(self.adapters.loaded()),
            "adapter_bytes": self.adapters.num_bytes,
            "cache_bytes": self._cache.num_bytes([row.length for row in rows]) + self._prefixes.num_bytes,
            "preempted": self._num_preempted,
        }

    def close(self) -> None:
        with self._wake:
            self._closed = True
            self._wake.notify()
        self._thread.join()
        self._loader.shutdown()
        self._compiler.shutdown()

    @property
    def num_running(self) -> int:
        return len(self._decoding) + len(self._prefilling)

    def _row(self, request: GenerateRequest) -> Row:
        """Raises UserError for what this model cannot be asked."""
        return Row(
            request=request,
            max_tokens=most_tokens(request, self.context, self.vocab_size),
            stop_ids=self._chat.stop_ids if request.stop_ids is None else request.stop_ids,
            text=AnswerText(self._chat.decode, request.stop),
            choice=Choice(request, self.vocab_size, self._device),
            loop=asyncio.get_running_loop(),
        )

    def _in(self, executor: ThreadPoolExecutor, work: Any, *args: Any) -> Any:
        try:
            return executor.submit(work, *args)
        except RuntimeError:  # it was shut down
            raise STOPPED from None

    def _load_adapter(self, row: Row, path: str) -> None:
        try:
            row.adapter = self.adapters.acquire(path)
        except Exception as error:
            self._deliver([(row, as_shown(error))])
        else:
            self._enqueue(row)

    def _enqueue(self, row: Row) -> None:
        with self._wake:
            if not self._closed:
                self._waiting.append(row)
                return self._wake.notify()
        self._let_go(row)
        self._deliver([(row, STOPPED)])

    # -- the scheduler's side (its own thread) -----------------------------------------------------------------------

    @torch.inference_mode()
    def _run(self) -> None:
        torch.set_num_threads(self._num_threads)  # Ray sets one thread for actors that reserve no CPU
        while True:
            with self._wake:
                while not (self._closed or self._waiting or self._decoding or self._prefilling):
                    self._cache.reset()
                    self._mix.let_go()
                    self._wake.wait()
                if self._closed:
                    return self._abandon(STOPPED)
            try:
                self._drop_cancelled()
                self._admit()
                self._step()
            except Exception as error:  # whatever it is, the next requests deserve an engine
                log.exception("a decoding step failed")
                self._abandon(as_shown(error))

    def _admit(self) -> None:
        """Give slots to waiting requests, oldest first, each with what is known of its beginning."""
        with self._wake:
            waiting = list(self._waiting)
        admitted: set[Row] = set()
        for row in waiting:
            if self.num_running >= MAX_ROWS or sum(r.num_unread for r in self._prefilling) >= PREFILL_TOKENS:
                break
            source, known = self._known(row)
            if any(self._in_common(other.ids_T[: other.num_ids], other, row) >= known + SHORTEST for other in self._prefilling):
                continue  # its beginning is about to be read for another one: it waits for that
            slot, lengths = self.num_running, [r.length for r in (*self._decoding, *self._prefilling)]
            if slot and not self._cache.fits([min(len(r.ids_T), r.num_ids + HEADROOM) for r in (*self._decoding, *self._prefilling, row)]):
                break
            self._cache.reserve(slot + 1, known, slot, max(lengths, default=0))
            if isinstance(source, Prefix):
                self._cache.copy_in(slot, source.keys_LKTD[:, :, :known], source.values_LKTD[:, :, :known])
            elif source is not None:
                self._cache.move(source, slot, known)
            row.length = known
            self._prefilling.append(row)
            admitted.add(row)
        if admitted:
            with self._wake:
                self._waiting = deque(r for r in self._waiting if r not in admitted)

    def _known(self, row: Row) -> tuple[Prefix | int | None, int]:
        """Where the longest beginning of a prompt was read (something kept, or a slot), and its length."""
        if row.is_scored:
            return None, 0  # every token's scores are asked for, so every token is read
        needed_T = row.ids_T[: row.num_ids - 1]  # the last one is read in any case: what follows it is the question
        best: Prefix | int | None
        best, longest = self._prefixes.find(row.reader, needed_T)
        for slot, other in enumerate(self._decoding):
            if (length := self._in_common(other.cached_T, other, row)) > max(longest, SHORTEST - 1):
                best, longest = slot, length
        return best, longest

    @staticmethod
    def _in_common(ids_T: np.ndarray, other: Row, row: Row) -> int:
        if other.adapter is not row.adapter or row.is_scored:
            return 0
        return shared(ids_T, row.ids_T[: row.num_ids - 1])

    def _step(self) -> None:
        """Read one token of each decoding row and some of the prompts, and choose what follows."""
        self._make_room()
        decoding, prefilling = list(self._decoding), list(self._prefilling)
        if not decoding and not prefilling:
            return
        ids = [int(row.ids_T[row.length]) for row in decoding]
        positions = [row.length for row in decoding]
        owners = [row.adapter for row in decoding]
        segments: list[Segment] = []
        last_at = list(range(len(decoding)))  # the tokens whose logits are wanted
        budget = PREFILL_TOKENS
        for slot, row in enumerate(prefilling, len(decoding)):
            start, length = row.length, min(budget, row.num_unread)
            budget -= length
            segments.append(Segment(slot, start, len(ids), length, causal_mask(start, length, self._device)))
            ids += row.ids_T[start : start + length].tolist()
            positions += range(start, start + length)
            owners += [row.adapter] * length
            last_at.append(len(ids) - 1)
        rows = decoding + prefilling
        self._cache.reserve(len(rows), 1 + max(positions), len(rows), max(row.length for row in rows))
        self._mix.choose(owners)
        hidden_TE = self._read(ids, positions, len(decoding), segments)

        for row in decoding:
            row.length += 1
        for row, segment in zip(prefilling, segments, strict=True):
            if row.is_scored:
                self._score_prompt(row, hidden_TE[segment.first : segment.first + segment.length])
            row.length += segment.length
        # A row that is not read to its end comes last, and its logits mean nothing yet.
        self._decoding, self._prefilling = [r for r in rows if not r.num_unread], [r for r in rows if r.num_unread]
        self._advance(self._logits(hidden_TE[last_at[: len(self._decoding)]]))

    def _read(self, ids: list[int], positions: list[int], num_decoding: int, segments: list[Segment]) -> torch.Tensor:
        """Hidden states (T x E) of a step's tokens."""
        lengths = [p + 1 for p in positions[:num_decoding]]
        if lengths and max(lengths) * len(lengths) > 2 * sum(lengths) + 4096:
            # One long row would make attention read its width for every row: let each row attend alone.
            segments = [Segment(i, p, i, 1) for i, p in enumerate(positions[:num_decoding])] + segments
            lengths = []
        length_N = torch.tensor(lengths, dtype=torch.long, device=self._device)
        visible_NW = torch.arange(max(lengths, default=0), device=self._device) < length_N[:, None]
        mask = torch.zeros(visible_NW.shape, dtype=self._dtype, device=self._device).masked_fill_(~visible_NW, float("-inf"))
        step = Step(self._cache, length_N - 1, mask[:, None, None], segments)
        decoder: Any = self._model.get_decoder()
        ids_1T, position_ids_1T = torch.tensor([ids], device=self._device), torch.tensor([positions], device=self._device)
        return decoder(ids_1T, position_ids=position_ids_1T, use_cache=False, step=step).last_hidden_state[0]

    def _logits(self, hidden_NE: torch.Tensor) -> torch.Tensor:
        """fp32, N x V."""
        return self._head(hidden_NE).float()

    def _score_prompt(self, row: Row, hidden_TE: torch.Tensor) -> None:
        """Log-probabilities of the prompt tokens that follow those just read; never many logits at a time."""
        following = row.ids_T[row.length + 1 : row.num_ids].tolist()
        size = max(1, SCORED_LOGITS // self.vocab_size)
        for first in range(0, min(len(hidden_TE), len(following)), size):
            targets = following[first : min(first + size, len(hidden_TE))]
            logits_NV = self._logits(hidden_TE[first : first + len(targets)])
            row.prompt_scores += score(logits_NV, targets, [row.request.prompt_logprobs or 0] * len(targets))

    def _advance(self, logits_NV: torch.Tensor) -> None:
        """Give each row its new token; the finished ones leave."""
        rows, news = list(self._decoding), list[tuple[Row, Event | Exception]]()
        done: list[Row] = []
        allowed: dict[int, torch.Tensor] = {}
        broken: dict[Row, UserError] = {}
        for i, row in enumerate(rows):
            if row.is_scored:
                logprobs, tops = zip(*row.prompt_scores, strict=True)
                news.append((row, PromptEvent(logprobs, tops)))
            if row.follower and row.max_tokens:
                try:
                    allowed[i] = row.follower.allowed(row.stop_ids)
                except UserError as error:
                    broken[row] = error
        ids, scores = choose(logits_NV, [row.choice for row in rows], allowed)
        for row, id, (logprob, top) in zip(rows, ids, scores, strict=True):
            if row.max_tokens == 0:
                done.append(row)
                continue
            if row not in broken:
                try:
                    event = self._take(row, id, logprob, top)
                    news.append((row, event))
                    if event.finish_reason:
                        done.append(row)
                except UserError as error:
                    broken[row] = error
            if row in broken:
                news.append((row, broken[row]))
                done.append(row)
        for row in done:
            self._leave(row)
        self._deliver(news)

    @staticmethod
    def _take(row: Row, id: int, logprob: float | None, top: tuple[tuple[int, float], ...]) -> TokenEvent:
        row.ids_T[row.num_ids] = id
        row.num_ids += 1
        is_end = id in row.stop_ids
        if row.follower and not is_end:
            row.follower.take(id)
            is_complete = row.follower.is_complete
        else:
            is_complete = False
        text = "" if is_end else row.text.push(id)
        reason = "stop" if is_end or is_complete or row.text.stopped else "length" if row.num_ids == len(row.ids_T) else None
        if reason and not row.text.stopped:
            text += row.text.flush()
        return TokenEvent(id, text, "stop" if row.text.stopped else reason, logprob, top)

    def _drop_cancelled(self) -> None:
        for row in [r for r in self._decoding if r.cancelled]:
            self._leave(row)
        with self._wake:
            gone = [r for r in (*self._prefilling, *self._waiting) if r.cancelled]
            if any(r.cancelled for r in self._prefilling):  # there is one at most
                self._prefilling = []
                self._cache.vacate(len(self._decoding))
            self._waiting = deque(r for r in self._waiting if not r.cancelled)
        for row in gone:
            self._let_go(row)

    def _make_room(self) -> None:
        """Let the last rows wait until the others have memory for their next tokens. One alone has: the context is no longer."""
        while len(rows := [*self._decoding, *self._prefilling]) > 1:
            budget, lengths = PREFILL_TOKENS, [row.length + 1 for row in self._decoding]
            for row in self._prefilling:
                lengths.append(row.length + min(budget, row.num_unread))
                budget -= lengths[-1] - row.length
            if self._cache.fits(lengths):
                return
            row, slot = rows[-1], len(rows) - 1
            self._remember(row, slot)
            (self._prefilling or self._decoding).pop()
            self._cache.vacate(slot)
            row.length, row.prompt_scores = 0, [NOTHING] if row.is_scored else row.prompt_scores
            self._num_preempted += 1
            with self._wake:
                self._waiting.appendleft(row)

    def _remember(self, row: Row, slot: int) -> None:
        if self._prefixes.wants(row.reader, row.cached_T, self._cache.bytes_per_token):
            self._prefixes.keep(Prefix(row.reader, row.cached_T.copy(), *self._cache.copy_out(slot, row.length)))

    def _leave(self, row: Row) -> None:
        """Take a decoding row out; the last ones move up so that slots stay without gaps."""
        slot, last = self._decoding.index(row), len(self._decoding) - 1
        self._remember(row, slot)
        self._cache.vacate(slot)
        moved = self._decoding.pop()
        if slot != last:
            self._decoding[slot] = moved
            self._move(last, slot, moved)
        for row_after in self._prefilling:
            self._move(last + 1, last, row_after)
        self._let_go(row)

    def _move(self, source: int, target: int, row: Row) -> None:
        self._cache.move(source, target, row.length)
        self._cache.vacate(source)

    def _let_go(self, row: Row) -> None:
        if row.adapter:
            self.adapters.release(row.adapter)

    def _abandon(self, error: Exception) -> None:
        """End every request with this error."""
        with self._wake:
            rows = [*self._decoding, *self._prefilling, *self._waiting]
            self._decoding, self._prefilling = [], []
            self._waiting.clear()
        for row in rows:
            self._let_go(row)
        self._deliver([(row, error) for row in rows])

    def _deliver(self, news: list[tuple[Row, Event | Exception]]) -> None:
        """Hand events to their consumers, with one wake-up for each event loop."""
        for loop in {row.loop for row, _ in news}:
            batch = [(row.events, event) for row, event in news if row.loop is loop]
            try:
                loop.call_soon_threadsafe(put_all, batch)
            except RuntimeError:  # the loop is closed: its consumers are gone
                for row, _ in news:
                    row.cancelled = row.cancelled or row.loop is loop


def put_all(batch: list[tuple[asyncio.Queue[Event | Exception], Event | Exception]]) -> None:
    for queue, event in batch:
        queue.put_nowait(event)


def as_shown(error: Exception) -> Exception:
    """The error as a user may see it."""
    return (
        error
        if isinstance(error, TuneyardError)
        else Unavailable(f"The engine failed: {type(error).__name__}.", "Its log says more; ask again.")
    )
