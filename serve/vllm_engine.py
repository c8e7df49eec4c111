"""vLLM behind the Engine protocol: its own asynchronous engine, in an event loop of its own thread.

vLLM decodes in another process; here requests become its sampling parameters, and its outputs token events. Text, limits and forms
come from the same code as the transformers engine's, so that a client cannot tell the engines apart but by their speed.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import secrets
import threading
from collections.abc import AsyncGenerator
from contextlib import AsyncExitStack, aclosing
from itertools import count
from pathlib import Path
from typing import Any

import torch

os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")  # nothing leaves this machine
os.environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "spawn")  # a process with threads must not be forked

from vllm import AsyncEngineArgs, SamplingParams  # pyright: ignore[reportMissingImports]
from vllm.exceptions import VLLMClientError  # pyright: ignore[reportMissingImports]
from vllm.lora.request import LoRARequest  # pyright: ignore[reportMissingImports]
from vllm.platforms import current_platform  # pyright: ignore[reportMissingImports]
from vllm.sampling_params import RequestOutputKind, StructuredOutputsParams  # pyright: ignore[reportMissingImports]
from vllm.v1.engine.async_llm import AsyncLLM  # pyright: ignore[reportMissingImports]

from serve.engine import GenerateRequest, Likeliest, PromptEvent, TokenEvent
from serve.grammar import WHITE_SPACE, Grammars
from serve.limits import most_tokens
from serve.text import AnswerText, pieces
from serve.vllm_adapters import HeldAdapters
from trainers import model as base_model
from trainers.chat import Chat
from trainers.errors import TuneyardError, Unavailable, UserError

log = logging.getLogger(__name__)

Event = TokenEvent | PromptEvent
MAX_OPEN = 1024
"""Requests that run or wait at a time; more are refused."""
STOPPED = Unavailable("The engine was stopped.", "Ask again shortly.")


class VLLMEngine:
    """Implements serve.engine.Engine. vLLM and its adapters are touched only in the engine's own event loop."""

    def __init__(
        self,
        model_dir: Path,
        dtype: torch.dtype = torch.bfloat16,
        max_adapters: int = 32,
        max_adapters_in_batch: int = 8,
        max_adapter_rank: int = 64,
        options: dict[str, Any] | None = None,
    ) -> None:
        """options: vLLM's own engine arguments, such as gpu_memory_utilization, max_model_len or tensor_parallel_size.

        Returns when the model is loaded.
        """
        most_in_vllm = max(max_adapters, max_adapters_in_batch)
        if current_platform.is_cpu():
            # On CPUs vLLM reads the bare base's tokens with the adapter in its last place, if a batch has others' (vllm#48421, open
            # at 0.32). Its first free place is filled first, so one place more than there are adapters keeps the last one empty.
            max_adapters_in_batch = most_in_vllm = max_adapters + 1
        self._chat = Chat.load(model_dir)
        self._pieces = pieces(self._chat)
        skeleton = base_model.skeleton(model_dir, dtype)
        self.vocab_size: int = skeleton.get_output_embeddings().weight.shape[0]  # type: ignore[union-attr]
        self._grammars = Grammars(self._chat, self.vocab_size)
        shapes = {
            name: (module.out_features, module.in_features)
            for name, module in skeleton.named_modules()
            if isinstance(module, torch.nn.Linear) and ".layers." in name
        }
        self._args = AsyncEngineArgs(
            **{
                "model": str(model_dir),
                "dtype": dtype,
                "enable_lora": True,
                "max_loras": max_adapters_in_batch,
                "max_cpu_loras": most_in_vllm,
                "max_lora_rank": max_adapter_rank,
                # Not the head, which no plain adapter changes: vLLM scores prompts through it with the adapters of an earlier batch,
                # and has died of it (compare vllm#16668).
                "lora_target_modules": sorted({name.rpartition(".")[2] for name in shapes}),
                "max_logprobs": -1,
                "logprobs_mode": "raw_logprobs",
                "structured_outputs_config": {"backend": "guidance"},  # the library of serve.grammar
                "generation_config": "vllm",  # the request alone says how to sample
                "seed": secrets.randbits(31),
                "enable_log_requests": False,
                "disable_log_stats": True,
                **(options or {}),
            }
        )
        self._llm: AsyncLLM | None = None
        self._adapters = HeldAdapters(self, shapes, dtype, max_adapters, max_adapter_rank)
        self._opening = asyncio.Lock()
        self._names = count()
        self._num_open, self._num_running = 0, 0
        self._closed = False
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="vllm", daemon=True)
        self._thread.start()
        try:
            llm = self._in_loop(self._alive()).result()
        except BaseException:
            self.close()
            raise
        self.context: int = llm.model_config.max_model_len

    # -- the consumer's side (any event loop) ------------------------------------------------------------------------

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[Event, None]:
        max_tokens = most_tokens(request, self.context, self.vocab_size)
        if request.json_schema and request.logprobs is not None:
            raise UserError(
                "vLLM tells the log-probabilities of an answer of a given form only after the form has ruled tokens out.",
                "Ask for one of the two, or serve the model with the transformers engine.",
                "logprobs",
            )
        if max_tokens == 0 and len(request.prompt_ids) == self.context:
            raise UserError(
                f"The prompt has {self.context} tokens, the whole context; this engine scores {self.context - 1} at most.",
                "Shorten the prompt by one token.",
                "prompt",
            )
        if self._closed:
            raise STOPPED
        if self._num_open >= MAX_OPEN:
            raise Unavailable(f"{self._num_open} requests run or wait at this model, which is all that it holds.", "Ask again shortly.")
        self._num_open += 1
        outputs: asyncio.Queue[Any] = asyncio.Queue()
        pumping = None
        try:
            follower = await asyncio.to_thread(self._grammars.follow, request.json_schema) if request.json_schema else None
            stop_ids = self._chat.stop_ids if request.stop_ids is None else request.stop_ids
            if follower:
                stop_ids |= {self._chat.eos_id}  # the only one that vLLM lets end a form
            params = sampling_params(request, max_tokens, stop_ids)
            pumping = self._in_loop(self._pump(request, params, Mailbox(outputs)))
            text = AnswerText(self._chat.decode, request.stop)
            num_generated = 0
            while True:
                output = await outputs.get()
                if isinstance(output, Exception):
                    raise output
                if output.prompt_logprobs is not None and num_generated == 0:
                    yield prompt_event(request, output.prompt_logprobs)
                if max_tokens == 0:
                    return
                said = output.outputs[0]
                for i, id in enumerate(said.token_ids):
                    num_generated += 1
                    is_end = id in stop_ids
                    added = "" if is_end else text.push(id)
                    if follower and not is_end:
                        follower.take(id)
                    is_whole = is_end or text.stopped or (follower is not None and follower.is_complete)
                    reason = "stop" if is_whole else "length" if num_generated == max_tokens else None
                    if reason and not text.stopped:
                        added += text.flush()
                    logprob, top = scores(request.logprobs, said.logprobs[i], id) if said.logprobs else (None, ())
                    yield TokenEvent(id, added, "stop" if text.stopped else reason, logprob, top)
                    if reason:
                        return
                if output.finished:  # without one of our reasons: vLLM gave it up
                    raise Unavailable("The engine gave up the answer.", "Ask again.")
        finally:
            self._num_open -= 1
            if pumping:
                pumping.cancel()  # vLLM drops the request

    def piece(self, id: int) -> bytes:
        return self._pieces[id] if 0 <= id < len(self._pieces) else b""

    def evict(self, adapter: str) -> None:
        if not self._closed:
            self._in_loop(self._adapters.evict(adapter))

    def stats(self) -> dict[str, Any]:
        return {
            "waiting": self._num_open - self._num_running,
            "running": self._num_running,
            "adapters": len(self._adapters),
            "adapter_bytes": self._adapters.num_bytes,
            "cache_bytes": 0,
        }

    @property
    def num_running(self) -> int:
        return self._num_running

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        self._in_loop(self._shut_down()).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def _in_loop(self, work: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    # -- the engine's side (its own event loop) ----------------------------------------------------------------------

    async def _pump(self, request: GenerateRequest, params: SamplingParams, mailbox: Mailbox) -> None:
        """Forward vLLM's outputs, or the error that ended them."""
        running = False
        try:
            async with AsyncExitStack() as stack:
                llm = await self._alive()
                lora = None
                if request.adapter:
                    held = await stack.enter_async_context(self._adapters.using(request.adapter))
                    lora = lora_request(held.number, held.path)
                outputs = llm.generate({"prompt_token_ids": request.prompt_ids}, params, str(next(self._names)), lora_request=lora)
                async for output in await stack.enter_async_context(aclosing(outputs)):
                    if not running:
                        running = True
                        self._num_running += 1
                    mailbox.put(output)
        except Exception as error:
            mailbox.put(as_shown(error))
        finally:
            self._num_running -= running

    async def _alive(self) -> AsyncLLM:
        """vLLM, started anew if its process has died."""
        async with self._opening:
            if self._llm and self._llm.errored:
                log.error("vLLM has died; it is started anew")
                self._llm.shutdown()
                self._llm = None
                self._adapters.forget()
            if self._llm is None:
                self._llm = AsyncLLM.from_engine_args(self._args)
            return self._llm

    async def load(self, number: int, path: str) -> None:
        await (await self._alive()).add_lora(lora_request(number, path))

    async def remove(self, number: int) -> None:
        if self._llm and not self._llm.errored:
            await self._llm.remove_lora(number)

    async def _shut_down(self) -> None:
        if self._llm:
            self._llm.shutdown()
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)


class Mailbox:
    """A queue of the consumer's loop, filled from the engine's."""

    def __init__(self, queue: asyncio.Queue[Any]) -> None:
        self._queue, self._loop = queue, asyncio.get_running_loop()

    def put(self, value: Any) -> None:
        try:
            self._loop.call_soon_threadsafe(self._queue.put_nowait, value)
        except RuntimeError:  # the loop is closed: its consumer is gone
            raise asyncio.CancelledError from None


def lora_request(number: int, path: str) -> LoRARequest:
    return LoRARequest(f"adapter-{number}", number, path)


def sampling_params(request: GenerateRequest, max_tokens: int, stop_ids: frozenset[int]) -> SamplingParams:
    """Raises UserError for what vLLM refuses."""
    try:
        return SamplingParams(
            max_tokens=max(1, max_tokens),  # it cannot only score: the token is thrown away
            temperature=request.temperature,
            top_p=request.top_p,
            top_k=request.top_k or 0,
            frequency_penalty=request.frequency_penalty,
            presence_penalty=request.presence_penalty,
            logit_bias=dict(request.logit_bias) or None,
            seed=None if request.seed is None else request.seed % (1 << 63),
            stop_token_ids=sorted(stop_ids),
            ignore_eos=True,  # the request says what ends an answer
            logprobs=request.logprobs,
            prompt_logprobs=request.prompt_logprobs,
            structured_outputs=structured(request.json_schema) if request.json_schema else None,
            detokenize=False,
            output_kind=RequestOutputKind.DELTA,
        )
    except (VLLMClientError, ValueError) as error:
        raise refused(error) from None


def structured(json_schema: str) -> StructuredOutputsParams:
    """The schema in vLLM's words, with the white space that serve.grammar allows."""
    return StructuredOutputsParams(json=json.loads(json_schema) | {"x-guidance": {"whitespace_pattern": WHITE_SPACE}})


def prompt_event(request: GenerateRequest, told: list[Any]) -> PromptEvent:
    found = [
        scores(request.prompt_logprobs, entry, id) if entry else (None, ()) for id, entry in zip(request.prompt_ids, told, strict=True)
    ]
    return PromptEvent(tuple(logprob for logprob, _ in found), tuple(top for _, top in found))


def scores(wanted: int | None, entry: dict[int, Any], id: int) -> tuple[float, Likeliest]:
    """(log-probability of a token, the likeliest ones) out of vLLM's id -> (logprob, rank)."""
    ranked = sorted((told.rank, other, told.logprob) for other, told in entry.items() if told.rank <= (wanted or 0))
    return entry[id].logprob, tuple((other, logprob) for _, other, logprob in ranked)


def refused(error: Exception) -> UserError:
    return UserError(f"The request cannot be taken: {str(error).splitlines()[0].rstrip('.')}.", "Change it.")


def as_shown(error: Exception) -> Exception:
    """The error as a user may see it."""
    if isinstance(error, TuneyardError):
        return error
    if isinstance(error, VLLMClientError):
        return refused(error)
    log.error("vLLM failed", exc_info=error)
    return Unavailable(f"The engine failed: {type(error).__name__}.", "Its log says more; ask again.")
