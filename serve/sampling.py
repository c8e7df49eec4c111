"""From logits to the next token of every row at once: log-probabilities, penalties, bias, a schema's mask, temperature, top-k, top-p.

What a row draws depends on its own logits and its own generator alone, one random number a token, so that a seed means the same
in every batch.

Shape legend: N rows, M rows that draw, K candidates, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from serve.engine import GenerateRequest, Likeliest

Scores = tuple[float | None, Likeliest]
"""Log-probability of a token, and the likeliest ones, where they are asked for."""

CPU = torch.device("cpu")
NOTHING: Scores = (None, ())
COLDEST = 1e-5
"""Below this temperature the likeliest token is taken: logits divided by less would not be numbers any more."""
MOST_CANDIDATES = 1024
"""Likeliest tokens that are looked at before all of a vocabulary is sorted; they hold nearly every nucleus."""


@dataclass(eq=False)
class Choice:
    """How one row chooses, and what it has chosen so far."""

    request: GenerateRequest
    vocab_size: int
    device: torch.device = CPU
    """Of the logits. Random numbers come from the CPU: a seed means the same everywhere."""
    generator: torch.Generator | None = field(init=False, default=None)
    added_V: torch.Tensor | None = field(init=False, default=None)
    """What bias and penalties add to the logits by now."""

    def __post_init__(self) -> None:
        request = self.request
        if request.temperature >= COLDEST:
            self.generator = torch.Generator()
            if request.seed is None:
                self.generator.seed()
            else:
                self.generator.manual_seed(request.seed)
        if request.logit_bias or self._penalised:
            self.added_V = torch.zeros(self.vocab_size, device=self.device)
            for id, bias in request.logit_bias.items():
                self.added_V[id] += bias
        self._chosen: set[int] = set()

    @property
    def _penalised(self) -> bool:
        return bool(self.request.frequency_penalty or self.request.presence_penalty)

    def took(self, id: int) -> None:
        """The row's token is known."""
        if self.added_V is not None and self._penalised:
            self.added_V[id] -= self.request.frequency_penalty + (0.0 if id in self._chosen else self.request.presence_penalty)
            self._chosen.add(id)


def choose(
    logits_NV: torch.Tensor, choices: Sequence[Choice], allowed: dict[int, torch.Tensor] | None = None
) -> tuple[list[int], list[Scores]]:
    """The next token of each row, and what is told of it.

    logits_NV: the model's own, fp32; they are changed. allowed: row number -> bool of shape V, the tokens that its schema permits.
    """
    told = [i for i, c in enumerate(choices) if c.request.logprobs is not None]
    # Only these rows' logits must outlive the changes that follow.
    raw_PV = logits_NV[told] if told else None
    for i, choice in enumerate(choices):
        if choice.added_V is not None:
            logits_NV[i] += choice.added_V
    for i, allowed_V in (allowed or {}).items():
        logits_NV[i].masked_fill_(~allowed_V.to(logits_NV.device), float("-inf"))
    drawing = [i for i, c in enumerate(choices) if c.generator is not None]
    ids = logits_NV.argmax(-1).tolist() if len(drawing) < len(choices) else [0] * len(choices)
    if drawing:
        drawn = draw(logits_NV if len(drawing) == len(choices) else logits_NV[drawing], [choices[i] for i in drawing])
        for i, id in zip(drawing, drawn, strict=True):
            ids[i] = id
    scores = [NOTHING] * len(choices)
    if raw_PV is not None:
        found = score(raw_PV, [ids[i] for i in told], [choices[i].request.logprobs or 0 for i in told])
        for i, one in zip(told, found, strict=True):
            scores[i] = one
    for choice, id in zip(choices, ids, strict=True):
        choice.took(id)
    return ids, scores


def draw(logits_MV: torch.Tensor, choices: list[Choice]) -> list[int]:
    """One token for each row, drawn with its own generator."""
    device = logits_MV.device
    point_M = torch.stack([torch.rand((), generator=c.generator, dtype=torch.float64) for c in choices]).to(device)
    heat_M = torch.tensor([c.request.temperature for c in choices], device=device)
    logits_MV = logits_MV / heat_M[:, None]
    top_p_M = torch.tensor([c.request.top_p for c in choices], device=device)
    top_k_M = torch.tensor([c.request.top_k or logits_MV.shape[-1] for c in choices], device=device)
    narrowed_M = (top_p_M < 1) | (top_k_M < logits_MV.shape[-1])
    if not narrowed_M.any():
        return pick(torch.softmax(logits_MV, -1), point_M).tolist()
    ids_M = torch.empty(len(choices), dtype=torch.long, device=device)
    if not narrowed_M.all():
        whole = ~narrowed_M
        ids_M[whole] = pick(torch.softmax(logits_MV[whole], -1), point_M[whole])
    narrow = narrowed_M.nonzero()[:, 0]
    ids_M[narrow] = draw_likely(logits_MV[narrow], top_k_M[narrow], top_p_M[narrow], point_M[narrow])
    return ids_M.tolist()


def draw_likely(logits_MV: torch.Tensor, top_k_M: torch.Tensor, top_p_M: torch.Tensor, point_M: torch.Tensor) -> torch.Tensor:
    """Draw among the top_k likeliest tokens and, of those, the fewest likeliest that reach top_p of their probability.

    Sorting a vocabulary takes twenty times as long as all the rest: first a few candidates are taken, which nearly always suffice.
    """
    total_M1 = logits_MV.logsumexp(-1, keepdim=True)
    num_rows, vocab_size = logits_MV.shape
    device = logits_MV.device
    ids_M = torch.empty(num_rows, dtype=torch.long, device=device)
    left = torch.arange(num_rows, device=device)
    for size in dict.fromkeys(min(k, vocab_size) for k in (64, MOST_CANDIDATES, vocab_size)):
        likely_LK, order_LK = logits_MV[left].topk(size, -1) if size < vocab_size else logits_MV[left].sort(-1, descending=True)
        probs_LK = torch.exp(likely_LK - total_M1[left])
        inside_LK = torch.arange(size, device=device) < top_k_M[left, None]
        probs_LK = torch.where(inside_LK, probs_LK, 0)
        # A token belongs to the nucleus while those before it have not reached top_p. What top-k cut away counts no more.
        whole_LK = probs_LK.cumsum(-1)
        cut_L = top_k_M[left] <= size
        mass_L = torch.where(cut_L, whole_LK[:, -1], 1.0)
        target_L1 = (top_p_M[left] * mass_L)[:, None]
        probs_LK = torch.where(whole_LK - probs_LK < target_L1, probs_LK, 0)
        probs_LK[:, 0] = torch.exp(likely_LK[:, 0] - total_M1[left, 0]).clamp_min(1e-30)  # the likeliest always belongs
        done_L = cut_L | (whole_LK[:, -1] >= target_L1[:, 0]) | (size == vocab_size)
        done = left[done_L]
        if len(done):
            place = pick(probs_LK[done_L], point_M[done])
            ids_M[done] = order_LK[done_L].gather(-1, place[:, None])[:, 0]
        left = left[~done_L]
        if not len(left):
            break
    return ids_M


def pick(probs_MK: torch.Tensor, point_M: torch.Tensor) -> torch.Tensor:
    """Which token each row's point (0 to 1) of the summed probabilities, which need not reach 1, falls on: int64 [M]."""
    sums_MK = probs_MK.cumsum(-1, dtype=torch.float64)
    place_M = torch.searchsorted(sums_MK, (point_M * sums_MK[:, -1])[:, None], right=True)[:, 0]
    return place_M.clamp_max(probs_MK.shape[-1] - 1)


def score(logits_NV: torch.Tensor, ids: list[int], num_top: list[int]) -> list[Scores]:
    """Log-probability of one token in each row, and of the row's likeliest ones (natural logarithm, fp32)."""
    total_N = logits_NV.logsumexp(-1)
    own = (logits_NV.gather(-1, torch.tensor(ids, device=logits_NV.device)[:, None])[:, 0] - total_N).tolist()
    most = min(max(num_top, default=0), logits_NV.shape[-1])
    if not most:
        return [(logprob, ()) for logprob in own]
    likely_NK, order_NK = logits_NV.topk(most, -1)
    tops = zip(order_NK.tolist(), (likely_NK - total_N[:, None]).tolist(), num_top, strict=True)
    return [(logprob, tuple(zip(order[:k], likely[:k], strict=True))) for logprob, (order, likely, k) in zip(own, tops, strict=True)]
