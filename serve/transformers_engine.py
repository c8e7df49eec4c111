"""Continuous batching on transformers' own Llama: one scheduler thread, one forward pass per step for all requests.

Every step packs one token of each decoding row and a piece of the waiting prompts into a single row of tokens, without
padding; only attention looks at the sequences apart. Requests join and leave between steps, whatever adapter they use.

Shape legend: T tokens of a step, N decoding rows, S slots, L layers, H heads, K key/value heads, G = H / K, C capacity of a
slot in tokens, W width (the longest decoding row), D head size, V vocabulary.
"""

from __future__ import annotations

import asyncio
import logging
import math
import mmap
import os
import threading
from collections import deque
from collections.abc import AsyncGenerator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from serve.adapters import Adapter, AdapterRegistry, make_adaptable
from serve.engine import GenerateRequest, TokenEvent
from serve.text import AnswerText
from trainers import model as base_model
from trainers.chat import Chat
from trainers.errors import TuneyardError, Unavailable, UserError

log = logging.getLogger(__name__)

ATTENTION = "tuneyard_slots"
MAX_ROWS = 64
"""Sequences generated at a time; further ones wait."""
PREFILL_TOKENS = 512
"""Prompt tokens per step: more would make running streams stutter."""
STOPPED = Unavailable("The engine was stopped.", "Ask again shortly.")


class SlotCache:
    """Keys and values of the running rows: a slot for each row, all of one capacity, grown by doubling."""

    def __init__(self, config: Any, dtype: torch.dtype) -> None:
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        self._shape = (config.num_hidden_layers, config.num_key_value_heads, head_dim)
        self._dtype = dtype
        self.reset()

    def reset(self) -> None:
        """Forget all rows and give back their memory."""
        self.num_slots, self.capacity = 8, 256
        self.keys_LSKCD, self.values_LSKCD = self._zeros(), self._zeros()

    def reserve(self, num_slots: int, capacity: int, used_slots: int, used_length: int) -> None:
        """Make room for this many slots of this many tokens; the first `used_length` tokens of the first `used_slots` slots stay."""
        if num_slots <= self.num_slots and capacity <= self.capacity:
            return
        self.num_slots, self.capacity = doubled(self.num_slots, num_slots), doubled(self.capacity, capacity)
        for name in ("keys_LSKCD", "values_LSKCD"):
            grown, used = self._zeros(), (slice(None), slice(used_slots), slice(None), slice(used_length))
            grown[used] = getattr(self, name)[used]
            setattr(self, name, grown)

    def move(self, source: int, target: int, length: int) -> None:
        """Copy the first `length` tokens of one slot into another."""
        for cache in (self.keys_LSKCD, self.values_LSKCD):
            cache[:, target, :, :length] = cache[:, source, :, :length]

    def _zeros(self) -> torch.Tensor:
        # Zeros, because attention reads (and masks) what lies behind a row's end, and 0 * NaN is NaN. Small pages straight from
        # the system cost no memory until they are written: a slot may be far wider than its row.
        num_layers, num_heads, head_dim = self._shape
        shape = (num_layers, self.num_slots, num_heads, self.capacity, head_dim)
        pages = mmap.mmap(-1, math.prod(shape) * self._dtype.itemsize, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        pages.madvise(mmap.MADV_NOHUGEPAGE)
        return torch.frombuffer(pages, dtype=self._dtype).view(shape)


def doubled(now: int, needed: int) -> int:
    return now if needed <= now else max(2 * now, needed)


@dataclass
class Segment:
    """Tokens of one row in a step that attend by themselves: a piece of a prompt, or a row too long for the common batch."""

    slot: int
    start: int
    """Tokens of the row that are in the cache already."""
    first: int
    """Where the segment's tokens begin in the step."""
    length: int
    mask: torch.Tensor | None = None
    """Needed when there is both a past and more than one token: length x (start + length), True = visible."""


@dataclass
class Step:
    """What attention must know: tokens 0..N-1 are one new token each of slots 0..N-1, the rest are segments."""

    cache: SlotCache
    position_N: torch.Tensor
    mask_N11W: torch.Tensor
    """Added to the scores: 0 inside a row, -inf behind its end."""
    segments: list[Segment]
    slot_N: torch.Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.slot_N = torch.arange(len(self.position_N))


def attend(
    module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: None, *, scaling: float, step: Step, **_: Any
) -> tuple[torch.Tensor, None]:
    """Store the step's keys and values (1 x K x T x D) and attend for query (1 x H x T x D) -> 1 x T x H x D."""
    keys_SKCD, values_SKCD = step.cache.keys_LSKCD[module.layer_idx], step.cache.values_LSKCD[module.layer_idx]
    q_THD, k_KTD, v_KTD = query[0].transpose(0, 1), key[0], value[0]
    num_tokens, num_heads, head_dim = q_THD.shape
    num_kv = k_KTD.shape[0]
    out_THD = query.new_empty(num_tokens, num_heads, head_dim)
    n, width = len(step.slot_N), step.mask_N11W.shape[-1]
    if n:
        keys_SKCD[step.slot_N, :, step.position_N] = k_KTD[:, :n].transpose(0, 1)
        values_SKCD[step.slot_N, :, step.position_N] = v_KTD[:, :n].transpose(0, 1)
        # The G heads that share a key/value head go in as G queries of it: no copy of the cache is made.
        q_NKGD = q_THD[:n].reshape(n, num_kv, -1, head_dim)
        o_NKGD = scaled_dot_product_attention(
            q_NKGD, keys_SKCD[:n, :, :width], values_SKCD[:n, :, :width], attn_mask=step.mask_N11W, scale=scaling
        )
        out_THD[:n] = o_NKGD.reshape(n, num_heads, head_dim)
    for s in step.segments:
        here, end = slice(s.first, s.first + s.length), s.start + s.length
        keys_SKCD[s.slot, :, s.start : end] = k_KTD[:, here]
        values_SKCD[s.slot, :, s.start : end] = v_KTD[:, here]
        o_1HTD = scaled_dot_product_attention(
            query[:, :, here],
            keys_SKCD[None, s.slot, :, :end],
            values_SKCD[None, s.slot, :, :end],
            attn_mask=s.mask,
            is_causal=s.mask is None and s.length > 1,
            scale=scaling,
            enable_gqa=True,
        )
        out_THD[here] = o_1HTD[0].transpose(0, 1)
    return out_THD[None], None


AttentionInterface.register(ATTENTION, attend)  # no mask function goes with it: the step carries its own masks


@dataclass(eq=False)
class Row:
    """One running request."""

    request: GenerateRequest
    max_tokens: int
    text: AnswerText
    loop: asyncio.AbstractEventLoop
    events: asyncio.Queue[TokenEvent | Exception]
    generator: torch.Generator | None
    adapter: Adapter | None = None
    length: int = 0
    """Tokens in the cache."""
    num_generated: int = 0
    last_id: int = -1
    cancelled: bool = False

    @property
    def num_unread(self) -> int:
        """Prompt tokens that are not in the cache yet."""
        return max(0, len(self.request.prompt_ids) - self.length)


class TransformersEngine:
    """Implements serve.engine.Engine. Its scheduler thread owns the model, the cache and all rows."""

    def __init__(
        self, model_dir: Path, dtype: torch.dtype = torch.bfloat16, max_adapter_bytes: int = 1 << 30, num_threads: int | None = None
    ) -> None:
        self._model = base_model.load(model_dir, dtype, attn=ATTENTION)
        self._chat = Chat.load(model_dir)
        self._mix, shapes = make_adaptable(self._model)
        self._cache = SlotCache(self._model.config, dtype)
        self._dtype = dtype
        self._num_threads = num_threads or len(os.sched_getaffinity(0))
        self.context: int = self._model.config.max_position_embeddings
        self.adapters = AdapterRegistry(shapes, dtype, max_adapter_bytes)
        self._loader = ThreadPoolExecutor(1, "adapter-loader")
        self._decoding: list[Row] = []  # the row at index i has slot i
        self._prefilling: list[Row] = []  # their slots follow; between steps at most one, with a part of its prompt in the cache
        self._waiting: deque[Row] = deque()
        self._wake = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="scheduler", daemon=True)
        self._thread.start()

    # -- the consumer's side (any event loop) ------------------------------------------------------------------------

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[TokenEvent, None]:
        for name in ("top_k", "logprobs", "prompt_logprobs", "grammar", "logit_bias", "frequency_penalty", "presence_penalty"):
            if getattr(request, name) not in (None, 0.0, {}):
                raise UserError(f"This engine does not do `{name}`.", "Leave it out.", name)
        room = self.context - len(request.prompt_ids)
        max_tokens = room if request.max_tokens is None else request.max_tokens
        if max_tokens > room or room < 1:
            raise UserError(
                f"The prompt has {len(request.prompt_ids)} tokens and the answer may have {max(max_tokens, 1)}: "
                f"more than this model's context of {self.context} tokens.",
                "Shorten the messages or lower max_tokens.",
                "messages" if room < 1 else "max_tokens",
            )
        row = Row(
            request=request,
            max_tokens=max_tokens,
            text=AnswerText(self._chat.decode, request.stop),
            loop=asyncio.get_running_loop(),
            events=asyncio.Queue(),
            generator=make_generator(request),
        )
        try:
            if request.adapter:
                self._loader.submit(self._load_adapter, row, request.adapter)
            else:
                self._enqueue(row)
            finished = False
            while not finished:
                event = await row.events.get()
                if isinstance(event, Exception):
                    raise event
                finished = event.finish_reason is not None
                yield event
        finally:
            row.cancelled = True  # the scheduler, which owns the row, lets go of it at its next step

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

    def close(self) -> None:
        with self._wake:
            self._closed = True
            self._wake.notify()
        self._thread.join()
        self._loader.shutdown()

    @property
    def num_running(self) -> int:
        return len(self._decoding) + len(self._prefilling)

    # -- the scheduler's side (its own thread) -----------------------------------------------------------------------

    @torch.inference_mode()
    def _run(self) -> None:
        torch.set_num_threads(self._num_threads)  # Ray sets one thread for actors that reserve no CPU
        while True:
            with self._wake:
                if not (self._waiting or self._decoding or self._prefilling):
                    self._cache.reset()
                    self._mix.clear()
                while not (self._closed or self._waiting or self._decoding or self._prefilling):
                    self._wake.wait()
                if self._closed:
                    return self._abandon(STOPPED)
            try:
                self._drop_cancelled()
                self._step()
            except Exception as error:  # whatever it is, the next requests deserve an engine
                log.exception("a decoding step failed")
                self._abandon(as_shown(error))

    def _step(self) -> None:
        pieces = self._take_prompts()
        decoding = list(self._decoding)
        if not decoding and not pieces:
            return
        ids = [row.last_id for row in decoding]
        positions = [row.length for row in decoding]
        owners = [row.adapter for row in decoding]
        segments: list[Segment] = []
        last_at = list(range(len(decoding)))  # the tokens whose logits are wanted
        for slot, (row, length) in enumerate(pieces, len(decoding)):
            segments.append(Segment(slot, row.length, len(ids), length, causal_mask(row.length, length)))
            ids += row.request.prompt_ids[row.length : row.length + length]
            positions += range(row.length, row.length + length)
            owners += [row.adapter] * length
            last_at.append(len(ids) - 1)
        rows = decoding + self._prefilling
        self._cache.reserve(len(rows), 1 + max(positions), sum(row.length > 0 for row in rows), max(row.length for row in rows))
        self._mix.choose(owners)
        logits = self._forward(ids, positions, len(decoding), segments, last_at)

        for row in decoding:
            row.length += 1
        for row, length in pieces:
            row.length += length
        rows = decoding + [row for row, _ in pieces if not row.num_unread]
        self._decoding, self._prefilling = rows, [row for row, _ in pieces if row.num_unread]
        self._advance(rows, sample(logits[: len(rows)], rows))  # a part of a prompt comes last, and its logits mean nothing yet

    def _take_prompts(self) -> list[tuple[Row, int]]:
        """The prompts, or the pieces of them, that this step reads: (row, number of tokens), oldest first."""
        with self._wake:
            while self._waiting and self.num_running < MAX_ROWS and sum(r.num_unread for r in self._prefilling) < PREFILL_TOKENS:
                self._prefilling.append(self._waiting.popleft())
        pieces: list[tuple[Row, int]] = []
        budget = PREFILL_TOKENS
        for row in self._prefilling:
            pieces.append((row, min(budget, row.num_unread)))
            budget -= pieces[-1][1]
        return pieces

    def _forward(
        self, ids: list[int], positions: list[int], num_decoding: int, segments: list[Segment], last_at: list[int]
    ) -> torch.Tensor:
        """Logits (fp32) at the tokens `last_at`."""
        lengths = [p + 1 for p in positions[:num_decoding]]
        if lengths and max(lengths) * len(lengths) > 2 * sum(lengths) + 4096:
            # One long row would make attention read its width for every row: let each row attend alone.
            segments = [Segment(i, p, i, 1) for i, p in enumerate(positions[:num_decoding])] + segments
            lengths = []
        length_N = torch.tensor(lengths, dtype=torch.long)
        visible_NW = torch.arange(max(lengths, default=0)) < length_N[:, None]
        mask = torch.zeros(visible_NW.shape, dtype=self._dtype).masked_fill_(~visible_NW, float("-inf"))
        step = Step(self._cache, length_N - 1, mask[:, None, None], segments)
        hidden_1TE = self._model.get_decoder()(
            torch.tensor([ids]), position_ids=torch.tensor([positions]), use_cache=False, step=step
        ).last_hidden_state
        return self._model.get_output_embeddings()(hidden_1TE[0, last_at]).float()  # type: ignore[operator]

    def _advance(self, rows: list[Row], ids: list[int]) -> None:
        """Give each row its new token; the finished ones leave."""
        news: list[tuple[Row, TokenEvent | Exception]] = []
        for row, id in zip(rows, ids, strict=True):
            row.last_id = id
            row.num_generated += 1
            stop_ids = row.request.stop_ids
            is_end = id in (self._chat.stop_ids if stop_ids is None else stop_ids)
            text = "" if is_end else row.text.push(id)
            reason = "stop" if is_end or row.text.stopped else "length" if row.num_generated == row.max_tokens else None
            if reason and not row.text.stopped:
                text += row.text.flush()
            news.append((row, TokenEvent(id, text, "stop" if row.text.stopped else reason)))
        for row, event in news:
            if isinstance(event, TokenEvent) and event.finish_reason:
                self._leave(row)
        self._deliver(news)

    def _drop_cancelled(self) -> None:
        for row in [r for r in self._decoding if r.cancelled]:
            self._leave(row)
        with self._wake:
            gone = [r for r in (*self._prefilling, *self._waiting) if r.cancelled]
            self._prefilling = [r for r in self._prefilling if not r.cancelled]
            self._waiting = deque(r for r in self._waiting if not r.cancelled)
        for row in gone:
            self._let_go(row)

    def _leave(self, row: Row) -> None:
        """Take a decoding row out; the last ones move up so that slots stay without gaps."""
        slot, last = self._decoding.index(row), len(self._decoding) - 1
        moved = self._decoding.pop()
        if slot != last:
            self._decoding[slot] = moved
            self._cache.move(last, slot, moved.length)
        for row_after in self._prefilling:
            self._cache.move(last + 1, last, row_after.length)
        self._let_go(row)

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

    def _deliver(self, news: list[tuple[Row, TokenEvent | Exception]]) -> None:
        """Hand events to their consumers, with one wake-up for each event loop."""
        for loop in {row.loop for row, _ in news}:
            batch = [(row.events, event) for row, event in news if row.loop is loop]
            try:
                loop.call_soon_threadsafe(put_all, batch)
            except RuntimeError:  # the loop is closed: its consumers are gone
                for row, _ in news:
                    row.cancelled = row.cancelled or row.loop is loop


def put_all(batch: list[tuple[asyncio.Queue[TokenEvent | Exception], TokenEvent | Exception]]) -> None:
    for queue, event in batch:
        queue.put_nowait(event)


def as_shown(error: Exception) -> Exception:
    """The error as a user may see it."""
    return (
        error
        if isinstance(error, TuneyardError)
        else Unavailable(f"The engine failed: {type(error).__name__}.", "Its log says more; ask again.")
    )


def make_generator(request: GenerateRequest) -> torch.Generator | None:
    if request.temperature == 0:
        return None
    generator = torch.Generator()
    if request.seed is None:
        generator.seed()
    else:
        generator.manual_seed(request.seed)
    return generator


def causal_mask(start: int, length: int) -> torch.Tensor | None:
    """Which tokens a piece of a prompt sees; None where the plain causal rule or no rule is enough."""
    return torch.ones(length, start + length, dtype=torch.bool).tril_(start) if start and length > 1 else None


def sample(logits_NV: torch.Tensor, rows: list[Row]) -> list[int]:
    """The next token of each row: the likeliest, or one drawn with the row's own generator."""
    ids = logits_NV.argmax(-1).tolist()
    drawn = [(i, row.request, row.generator) for i, row in enumerate(rows) if row.generator]
    if drawn:
        temperature_M = torch.tensor([request.temperature for _, request, _ in drawn])
        probs_MV = torch.softmax(logits_NV[[i for i, _, _ in drawn]] / temperature_M[:, None], -1)
        sums_MV = probs_MV.cumsum(-1)
        for (i, request, generator), probs_V, sums_V in zip(drawn, probs_MV, sums_MV, strict=True):
            point = torch.rand((), generator=generator)  # one number per token, so that a seed means the same in every batch
            if request.top_p < 1:
                sums_V, order_V = nucleus(probs_V, request.top_p)
                ids[i] = int(order_V[pick(sums_V, point)])
            else:
                ids[i] = pick(sums_V, point)
    return ids


def pick(sums_V: torch.Tensor, point: torch.Tensor) -> int:
    """Which token the point (0 to 1) of the summed probabilities falls on."""
    return min(int(torch.searchsorted(sums_V, point * sums_V[-1], right=True)), len(sums_V) - 1)


def nucleus(probs_V: torch.Tensor, top_p: float) -> tuple[torch.Tensor, torch.Tensor]:
    """The fewest likeliest tokens that reach top_p: (their summed probabilities, their ids)."""
    likely, order = probs_V.topk(min(1024, len(probs_V)))  # nearly always enough, and 30 times faster than sorting all
    sums = likely.cumsum(-1)
    if sums[-1] < top_p:
        likely, order = probs_V.sort(descending=True)
        sums = likely.cumsum(-1)
    size = min(int(torch.searchsorted(sums, top_p)) + 1, len(sums))
    return sums[:size], order[:size]
