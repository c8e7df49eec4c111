"""Personal data in text: e-mail addresses, phone, social security, payment card and medical record numbers.

Patterns with checks (Luhn's sum, issuers' prefixes, words that stand before a number), no model: a number is told by its shape or by
what introduces it. Names and postal addresses are out of reach. Every pattern is bounded, so time is linear in the text.
On the labelled corpus of tests/trainers/test_personal.py every kind is found with a recall and a precision of at least 95%.
"""

from __future__ import annotations

import json
import re
from collections import Counter

TAGS = {
    "an e-mail address": "[EMAIL]",
    "a phone number": "[PHONE]",
    "a social security number": "[SSN]",
    "a payment card number": "[CARD]",
    "a medical record number": "[MRN]",
}
EMAIL, PHONE, SSN, CARD, MRN = TAGS

_MAYBE = re.compile(r"@|\d(?:[ .()/-]{0,2}\d){3}")
_ADDRESS = re.compile(r"(?<![\w.%+-])[\w.%+-]{1,64}@(?:[A-Za-z0-9-]{1,63}\.){1,8}([A-Za-z]{2,24})(?![\w-])")
_FILE_ENDINGS = {"png", "jpg", "jpeg", "gif", "svg", "webp", "css", "js", "ts", "json", "html", "py"}  # icon@2x.png is no address
_NUMBER = re.compile(
    r"""(?<![\w.])(?:
        (?P<ssn>\d{3}-\d{2}-\d{4})
      | (?P<card>\d{4}(?P<gap>[ -]?)\d{4}(?P=gap)\d{4}(?P=gap)\d{1,7} | 3\d{3}(?P<gap3>[ -])\d{6}(?P=gap3)\d{4,5})
      | (?P<international>\+[1-9](?:[ .()/-]{0,2}\d){7,14})
      | (?P<american>(?:1[ .-])?(?:\(\d{3}\)[ ]?|\d{3}[.-])\d{3}[ .-]\d{4})
      | (?P<digits>[(]?\d(?:[ .()/-]{0,2}\d){6,14})
      | (?P<record>(?:[A-Z]{1,3}-?)?\d(?:-?\d){3,11})
    )(?![\w-]|[.,]\d)""",
    re.VERBOSE,
)
_DIGITS = re.compile(r"\d+")
_LETTER = re.compile(r"[^\W\d]")
_NEXT_GROUP = re.compile(r"\w+|\W")
_ISSUED = re.compile(  # Visa, Mastercard, American Express, Discover, Diners Club, JCB, UnionPay
    r"4\d{12}(?:\d{3}){0,2}|5[1-5]\d{14}|2(?:22[1-9]|2[3-9]\d|[3-6]\d\d|7[01]\d|720)\d{12}|3[47]\d{13}"
    r"|6(?:011|5\d\d|4[4-9]\d)\d{12}|3(?:0[0-5]|[68]\d)\d{11}|35\d{14}|62\d{14,17}"
)


def _after(words: str) -> re.Pattern[str]:
    """Matches what stands before a number that one of the words introduces: `Phone number: `, `call me at `, `"ssn": "`."""
    links = r"(?:\W{1,3}(?:number|no|nr|num|at|on|is|was|us|me|him|her|them|id)\b){0,3}"
    return re.compile(rf"\b(?:{words})\b{links}\W{{0,5}}\Z", re.IGNORECASE)


_CONTEXT = 48  # characters before a number that are looked at
_BEFORE_RECORD = _after(r"mrn|medical records?|patient(?= (?:id|no|nr|number))|chart(?= (?:id|no|nr|number))")
_BEFORE_SSN = _after(r"ssn|social security")
_BEFORE_PHONE = _after(
    r"phones?|telephone|t[ée]l|mobile|cell|cellphone|landline|fax|whatsapp|call|dial|text|sms|hotline|telefon|handy|"
    r"t[ée]l[ée]phone|tel[ée]fono|telefone|(?:my|his|her|their|our|your|contact) number"
)


def mask(text: str) -> tuple[str, Counter[str]]:
    """The text with a tag in place of each piece of personal data, and how many of each kind there were.

    JSON stays JSON, formatted as it was: a number that is personal becomes a string, and names of fields introduce their values.
    """
    if _MAYBE.search(text) is None:
        return text, Counter()
    if text.lstrip()[:1] in ("{", "[") and _is_json(text):
        return _mask_json(text)
    return _mask_plain(text, "")


def _mask_plain(text: str, before: str) -> tuple[str, Counter[str]]:
    """The same for text that `before` introduces."""
    found: Counter[str] = Counter()

    def hide(match: re.Match[str]) -> str:
        if match[1].lower() in _FILE_ENDINGS or match[0].startswith("git@"):
            return match[0]
        found[EMAIL] += 1
        return TAGS[EMAIL]

    if "@" in text:
        text = _ADDRESS.sub(hide, text)
    whole = before + text
    pieces = []
    done = at = len(before)
    while match := _NUMBER.search(whole, at):
        kind = _kind(match, whole[max(0, match.start() - _CONTEXT) : match.start()].replace("_", " "))
        if kind is None:  # what begins with its second group of digits may still be something
            group = _NEXT_GROUP.match(whole, match.start())
            at = min(match.end(), group.end() if group else match.end())
        else:
            found[kind] += 1
            pieces += [whole[done : match.start()], TAGS[kind]]
            done = at = match.end()
    return "".join([*pieces, whole[done:]]), found


_JSON_VALUE = re.compile(r'(?P<string>"[^"\\]*(?:\\.[^"\\]*)*")(?P<name>\s*:)?|-?\d[\d.eE+-]*')


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def _mask_json(text: str) -> tuple[str, Counter[str]]:
    found: Counter[str] = Counter()
    before = ""

    def hide(match: re.Match[str]) -> str:
        nonlocal before
        said = json.loads(match["string"]) if match["string"] else match[0]
        masked, more = _mask_plain(said, "" if match["name"] else before)
        found.update(more)
        if match["name"]:
            before = f"{said}: "
        return match[0] if masked == said else json.dumps(masked, ensure_ascii=False) + (match["name"] or "")

    return _JSON_VALUE.sub(hide, text), found


def _kind(number: re.Match[str], before: str) -> str | None:
    """What kind of personal data a number is, by its shape and by what stands before it."""
    introduced = _LETTER.search(before) is not None
    if introduced and _BEFORE_RECORD.search(before):
        return MRN
    if not introduced and number.lastgroup in ("digits", "record"):
        return None
    digits = "".join(_DIGITS.findall(number[0]))
    if (number["ssn"] or (len(digits) == 9 and _BEFORE_SSN.search(before))) and _is_issued_ssn(digits):
        return SSN
    if number["card"] and _ISSUED.fullmatch(digits) and _luhn(digits):
        return CARD
    if number["international"] or number["american"]:
        return PHONE
    if not number[0][0].isalpha() and 7 <= len(digits) <= 15 and _BEFORE_PHONE.search(before):
        return PHONE
    return None


def _is_issued_ssn(digits: str) -> bool:
    """No group is all zeros and no area is 666 (Social Security Administration); 9xx are taxpayers without one."""
    return digits[:3] not in ("000", "666") and digits[3:5] != "00" and digits[5:] != "0000"


def _luhn(digits: str) -> bool:
    """ISO/IEC 7812-1, annex B."""
    doubled = [int(d) * 2 for d in digits[-2::-2]]
    return (sum(int(d) for d in digits[::-2]) + sum(d - 9 if d > 9 else d for d in doubled)) % 10 == 0
