"""Texts that say the same thing again and again: in training data, and in what a model answers."""

from __future__ import annotations

import re

# Scripts that put no blanks between words (Thai, Lao, Burmese, Khmer, kana, Han): each character counts as a word.
UNSPACED = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff"
WORD = re.compile(rf"[{UNSPACED}]|[^\W{UNSPACED}]+")
_GRAM = 6
LOOP_WORDS = 24
_STUTTER = re.compile(r"([^\W\d_]{1,4}?)\1{24}")


def repeats(text: str) -> tuple[str, int] | None:
    """(kind, where) of a passage that stands at least four times in a row, or of a text more than half of which was said before.

    Words are compared in runs of six. Numbers alone count for nothing: a table may well hold the same ones again and again.
    """
    words = [(match[0], match.start()) for match in WORD.finditer(text.lower())]
    for word, start in words:
        if len(word) > 24 and (found := _STUTTER.search(word)):
            return "the same syllable again and again", start + found.start()
    grams = list(zip(*([word for word, _ in words[i:]] for i in range(_GRAM)), strict=False))
    last: dict[tuple[str, ...], int] = {}
    run = period = repeated = 0
    for i, gram in enumerate(grams):
        before = last.get(gram)
        last[gram] = i
        if before is None or not any(word.isalpha() for word in gram):
            run = 0
            continue
        repeated += 1
        run = run + 1 if i - before == period else 1
        period = i - before
        if run >= max(3 * period, LOOP_WORDS):
            return "the same passage again and again", words[i - run][1]
    if len(grams) >= 2 * LOOP_WORDS and repeated > len(grams) / 2:
        return "more than half was said before", 0
    return None
