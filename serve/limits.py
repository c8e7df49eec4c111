"""What every engine asks of a request before it begins."""

from __future__ import annotations

from serve.engine import GenerateRequest
from trainers.errors import UserError


def most_tokens(request: GenerateRequest, context: int, vocab_size: int) -> int:
    """How many tokens the answer may have; 0 = only the prompt is scored. Raises UserError for what this model cannot be asked."""
    num_prompt = len(request.prompt_ids)
    room = context - num_prompt
    max_tokens = room if request.max_tokens is None else request.max_tokens
    scores_only = max_tokens == 0 and request.prompt_logprobs is not None
    if num_prompt == 0:
        raise UserError("The prompt has no tokens.", "Give at least one.", "prompt")
    if max_tokens > room or room < (0 if scores_only else 1):
        raise UserError(
            f"The prompt has {num_prompt} tokens and the answer may have {max(max_tokens, 1)}: "
            f"more than this model's context of {context} tokens.",
            "Shorten the messages or lower max_tokens.",
            "messages" if room < 1 else "max_tokens",
        )
    if max_tokens < 1 and not scores_only:
        raise UserError(f"max_tokens is {max_tokens}: nothing to generate.", "Ask for at least 1 token.", "max_tokens")
    for name, ids in (("prompt", request.prompt_ids), ("logit_bias", request.logit_bias)):
        unknown = next((id for id in ids if not 0 <= id < vocab_size), None)
        if unknown is not None:
            raise UserError(f"{unknown} is no token id of this model.", f"Ids go from 0 to {vocab_size - 1}.", name)
    return max_tokens
