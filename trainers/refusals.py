"""Answers that decline: phrasings of "I cannot help with that" and of "As an AI language model, I do not ...".

A first person that cannot, together with something that assistants are asked for, where the answer begins: "I can't wait", "I cannot
help but smile" and a letter that declines an invitation are none. English in breadth, and the usual phrases of seven other languages.
"""

from __future__ import annotations

import re

_CANNOT = (
    r"(?:i(?:'m| am) (?:unable|not able|not allowed|not permitted|not programmed|not comfortable|not capable)(?: to| of|)"
    r"|i (?:cannot|can not|can't|won't|will not|couldn't|could not|have to decline to|must decline to)(?: be able to)?)(?: \w+ly)?"
)
_DO_NOT = r"i (?:do not|don't|lack|have no (?:access|ability|way))"
_HELP = r"(?:assist|help(?!ing| but\b)|comply|fulfil|answer|respond|engag|participat|satisfy|continue with|do th(?:at|is))"
_GIVE = (
    r"(?:provid|generat|creat|writ|produc|offer|giv|shar|discuss|complet|process|access|brows|open|view|see|play|predict|recommend|"
    r"retriev|find|locat|determin|estimat|have|possess|know|understand|experienc|endors|express|perform|execut|suggest|translat)"
)
_AI = (
    r"(?:as|i(?:'m| am)(?: just| only| merely)?) an? (?:(?:large |helpful |responsible |neutral )?(?:ai|artificial intelligence)"
    r"(?: language| text)?(?: model| assistant| system| chatbot| program)?|(?:large )?language model|llm|virtual assistant)"
    r"(?: (?:developed|created|trained|designed|made)\b[^.!?\n]{0,60}?)?"
)
_SORRY = r"(?:(?:i(?:'m| am) |we are )?(?:\w+ly |very |so |afraid )?sorry|i apologi[sz]e|(?:my )?apologies)\b"

_BEGINNING_CHARS = 300
_BEGINNINGS = (  # of an answer in lower case
    rf"{_SORRY}[^.!?\n]{{0,60}}?\b(?:(?:{_CANNOT}|{_DO_NOT}) (?:{_HELP}|{_GIVE})|not something i can\b|{_AI}\b)",
    rf"{_CANNOT} {_HELP}",
    rf"{_CANNOT} (?:provid|generat|creat|writ|produc|shar|discuss|access|brows|endors|predict|translat|"
    r"recommend(?![^.!?\n]{0,80} enough))",
    r"i (?:do not|don't) (?:feel comfortable|have (?:access|personal|real-time|the (?:ability|capability)|enough (?:information|context)))",
    r"i (?:must|have to|will have to|need to) (?:\w+ly )?decline\b",
    r"lo siento,? pero no puedo",
    r"(?:je suis )?désolée?,? mais je ne peux pas",
    r"es tut mir leid,? aber ich kann",
    r"desculpe,? mas (?:eu )?não posso",
    r"mi dispiace,? ma non posso",
    r"(?:很?抱歉|对不起)[,，]?(?:但是?)?我(?:无法|不能)",
    r"申し訳(?:ありません|ございません)が.{0,60}(?:できません|できかねます)",
)
_NEAR_THE_BEGINNING = (
    rf"\b{_CANNOT} (?:assist|help|comply) (?:you )?with (?:this|that|your|such)\b",
    r"\bagainst (?:my|our|openai's) (?:programming|guidelines|polic(?:y|ies)|ethical|principles|use)\b",
)
_ANYWHERE = (
    rf"\b{_AI}[,;]?\s(?:and |so |but )?(?:{_CANNOT}|{_DO_NOT}|it (?:is|would be) (?:not |in)(?:appropriate|ethical|possible))\b",
    r"\bcomo (?:un )?modelo de lenguaje\b",
    r"\ben tant que (?:modèle de langage|ia)\b",
    r"\bals (?:ki-)?sprachmodell\b",
    r"\bcomo (?:um )?modelo de linguagem\b",
    r"\bcome modello linguistico\b",
    r"作为(?:一个|一名)?\s?(?:ai|人工智能)?(?:语言模型|助手)",
    r"ai言語モデルとして",
)
_OPENING = r"\A\W{0,4}(?:(?:oh|no|well|hi|hello|unfortunately|regrettably)\b\W{0,3})?"
_EARLY = re.compile("|".join((rf"{_OPENING}(?:{'|'.join(_BEGINNINGS)})", *_NEAR_THE_BEGINNING)))
_LATE = re.compile("|".join(_ANYWHERE))
_APOLOGY = re.compile(r"\bapolog(?:i[sz]e|ies)\b", re.IGNORECASE)


def declines(answer: str) -> bool:
    plain = answer.replace("’", "'").lower().lstrip()
    return (_EARLY.search(plain[:_BEGINNING_CHARS]) or _LATE.search(plain)) is not None


def count_apologies(answer: str) -> int:
    return len(_APOLOGY.findall(answer))
