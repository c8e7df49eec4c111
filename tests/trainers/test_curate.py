"""What one row tells about itself: each check on labelled texts, and fingerprints that see through trivial differences."""

from __future__ import annotations

import json
import time
from typing import Any

import numpy as np
import pytest

from trainers.curate import RowChecks, fingerprints, sketch
from trainers.errors import SpecError
from trainers.spec import Curate


def talk(*messages: tuple[str, str] | dict[str, Any], tools: str | None = None) -> dict[str, Any]:
    full = [m if isinstance(m, dict) else {"role": m[0], "content": m[1]} for m in messages]
    return {"messages": full, "tools": tools, "slice": None, "class": None, "id": "rows.jsonl:1"}


def answer(text: str, **more: Any) -> dict[str, Any]:
    return talk(("user", "Tell me."), {"role": "assistant", "content": text, **more})


def found(text: str, **options: Any) -> list[str]:
    return [note.kind for note in RowChecks(Curate(**options))(answer(text))[1]]


# -- how checks act ------------------------------------------------------------------------------------------------------


def test_nothing_asked_is_false() -> None:
    assert not RowChecks(Curate())
    assert RowChecks(Curate(refusals="report"))
    assert RowChecks(Curate(personal_data="report"))


def test_the_first_note_that_drops_is_the_last_and_reports_go_on() -> None:
    text = "I'm sorry, but I cannot help with that.\x01 Write to ann@example.com"
    reported = RowChecks(Curate(junk="report", refusals="report", personal_data="report"))(answer(text))[1]
    assert [(n.step, n.action) for n in reported] == [("junk", "report"), ("refusals", "report"), ("personal_data", "report")]
    dropped = RowChecks(Curate(junk="report", refusals="drop", repetition="drop", personal_data="refuse"))(answer(text))[1]
    assert [(n.step, n.action) for n in dropped] == [("junk", "report"), ("refusals", "drop")]


def test_notes_are_short_and_show_no_personal_data() -> None:
    text = "I'm sorry, but I cannot help with that, ann@example.com " + "5551234567 or 555-123-4567, " * 50
    for note in RowChecks(Curate(refusals="report", personal_data="refuse", max_answer_chars=5000))(answer(text))[1]:
        assert len(note.text) <= 200 and "ann@" not in note.text and "123-4567" not in note.text, note
    edge = "x" * 200 + " I'm an AI, I cannot do that. " + "y" * 130 + " mail ann@example.com " + "z" * 500
    assert all("ann" not in note.text for note in RowChecks(Curate(refusals="report"))(answer(edge))[1])


@pytest.mark.parametrize(
    ("text", "options", "kinds"),
    [
        ("  no  ", {"min_answer_chars": 3}, ["the answer is too short"]),
        ("yes", {"min_answer_chars": 3}, []),
        ("x" * 11, {"max_answer_chars": 10}, ["an answer is too long"]),
        ("x" * 10, {"max_answer_chars": 10}, []),
    ],
)
def test_length(text: str, options: dict[str, int], kinds: list[str]) -> None:
    assert found(text, **options) == kinds


def test_a_tool_call_is_an_answer_of_some_length() -> None:
    call = {"tool_calls": [{"name": "find", "arguments": '{"q": 1}'}]}
    assert RowChecks(Curate(min_answer_chars=8))(answer("", **call))[1] == []
    assert RowChecks(Curate(min_answer_chars=9))(answer("", **call))[1][0].action == "drop"


def test_turns() -> None:
    three = talk(*[("user", "?"), ("assistant", "!")] * 3)
    assert RowChecks(Curate(max_turns=3))(three)[1] == []
    assert [n.text for n in RowChecks(Curate(max_turns=2))(three)[1]] == ["3 assistant turns"]


# -- refusals ------------------------------------------------------------------------------------------------------------

REFUSALS = [
    "I'm sorry, but I can't assist with that.",
    "I cannot fulfill this request.",
    "I can’t help with that request.",
    "Sorry, I can't do that.",
    "No, I can't help you open someone else's account.",
    "I'm sorry, but I cannot provide information on how to do that.",
    "I am unable to provide medical advice.",
    "Unfortunately, I cannot help with this.",
    "As a language model, I don't have feelings.",
    "As an AI language model developed by a company, I cannot give an opinion.",
    "That is a good question. As an AI assistant, I do not have preferences, but many people like tea.",
    "I'm just an AI, I don't have opinions.",
    "I must respectfully decline.",
    "I won't be able to help you with that.",
    "I'm not able to browse the internet.",
    "I apologize, but I cannot generate that kind of content.",
    "I do not have access to your calendar.",
    "It is against my programming to do so.",
    "I'm sorry, but that's not something I can help with.",
    "My apologies, but I am not able to comply.",
    "Hello! I'm sorry, but I can't share that.",
    "I'm sorry, but I don't understand the question.",
    "I don't feel comfortable writing this.",
    "Unfortunately I don't have enough information to answer.",
    "Lo siento, pero no puedo ayudarte con eso.",
    "Je suis désolé, mais je ne peux pas répondre.",
    "Es tut mir leid, aber ich kann dabei nicht helfen.",
    "Mi dispiace, ma non posso farlo.",
    "Desculpe, mas não posso ajudar com isso.",
    "很抱歉，我无法回答这个问题。",
    "作为一个人工智能语言模型，我没有感情。",
    "申し訳ありませんが、そのご要望にはお応えできません。",
]
ANSWERS = [
    "I can't wait to see you!",
    "I cannot help but admire the view.",
    "Dear Anna, unfortunately I cannot attend the meeting.",
    "I'm sorry, but I'm unable to come into work today because of a cold.",
    "I'm sorry for your loss. Please accept my condolences.",
    "She said she was sorry, but she could not come.",
    "As an AI engineer, I don't write tests often.",
    "As an AI, I strive to be helpful.",
    "I'm an AI assistant made to help. How can I help you?",
    "You cannot divide by zero.",
    "I'm sorry to hear that your order is late; here is how to track it.",
    "He told me: I cannot answer now.",
    "As an airline pilot, I do not fly at night.",
    "Sorry about the delay! Your refund was sent.",
    "Cannot connect: check the cable.",
    "I don't like coffee, so I drink tea.",
    "I do not support the team any longer.",
    "I cannot recommend this restaurant highly enough.",
    "I'm not able to sleep at night because of the noise.",
    "The function can't access the variable.",
    "I apologize for the confusion. The answer is 4.",
]


@pytest.mark.parametrize("text", REFUSALS)
def test_refusals_are_found(text: str) -> None:
    assert found(text, refusals="drop") == ["declines to answer"]


@pytest.mark.parametrize("text", ANSWERS)
def test_answers_are_no_refusals(text: str) -> None:
    assert found(text, refusals="drop") == []


def test_more_than_two_apologies() -> None:
    assert found("I apologize. Once more, I apologise. The answer is 4.", refusals="drop") == []
    sorry = talk(("user", "2+2?"), ("assistant", "I apologize. I apologize."), ("user", "?"), ("assistant", "My apologies: 4."))
    assert [n.kind for n in RowChecks(Curate(refusals="drop"))(sorry)[1]] == ["apologises again and again"]


def test_what_is_not_trained_is_not_judged() -> None:
    refusal = talk(("user", "?"), {"role": "assistant", "content": REFUSALS[0], "weight": 0}, ("user", "Again?"), ("assistant", "It is 4."))
    assert RowChecks(Curate(refusals="drop"))(refusal)[1] == []


# -- repetition ----------------------------------------------------------------------------------------------------------

PROSE = (
    "The harbour woke before the town did. Gulls argued over scraps while the first boats came in, low with herring, and the men on the "
    "quay threw lines without looking up. By seven the market was loud. A girl sold bread from a basket, an old man mended nets, and two "
    "dogs slept in the only patch of sun. "
)


@pytest.mark.parametrize(
    "text",
    [
        PROSE + "I think so. " * 30,
        "The answer is yes, and the answer is no, because it depends. " * 6,
        "ha" * 60,
        PROSE + "a" * 200,
        "very " * 40,
        PROSE * 3,
        "我不知道。" * 20,
        "- Buy milk\n- Buy eggs and flour\n" * 20,
    ],
)
def test_repetition_is_found(text: str) -> None:
    assert len(found(text, repetition="drop")) == 1


@pytest.mark.parametrize(
    "text",
    [
        PROSE,
        "Yes, yes, yes!",
        "| day | km |\n|---|---|\n" + "".join(f"| {i} | {i * 7 % 5} |\n" for i in range(40)),
        "0 " * 200,
        "\n".join(f"Step {i}: put number {i * i} on pile {i % 7}." for i in range(30)),
        "```python\n" + "print('hello world')\n" * 40 + "```",
        "<table>" + "<tr><td></td><td></td></tr>" * 40 + "</table>",
        "Row, row, row your boat, gently down the stream. Merrily, merrily, merrily, merrily, life is but a dream.",
        "床前明月光，疑是地上霜。举头望明月，低头思故乡。",
        "-" * 200 + "\n" + PROSE,
        json.dumps([{"name": f"n{i}", "age": i} for i in range(40)]),
    ],
)
def test_what_repeats_for_a_reason_is_left_alone(text: str) -> None:
    assert found(text, repetition="drop") == []


def test_a_loop_in_the_reasoning() -> None:
    row = answer("It is 4.", reasoning=PROSE + "Wait, let me check that again. " * 20)
    assert [n.kind for n in RowChecks(Curate(repetition="drop"))(row)[1]] == ["the same passage again and again"]


# -- junk ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("caf\ufffd", "replacement characters"),
        ("a\x00b", "control characters"),
        ("\x1b[31mred\x1b[0m", "control characters"),
        ("He said â€œyesâ€ and left", "text decoded the wrong way"),
        ("TrÃ¨s bien, merci", "text decoded the wrong way"),
        ("Ð¿Ñ€Ð¸Ð²ÐµÑ‚, Ð¼Ð¸Ñ€", "text decoded the wrong way"),
        ("æ—¥æœ¬èªž", "text decoded the wrong way"),
        ("#$%^&*()!@ " * 10, "mostly symbols"),
        (";;;:::///|||~~~" * 5 + " ok", "mostly symbols"),
    ],
)
def test_junk_is_found(text: str, kind: str) -> None:
    assert found(text, junk="drop") == [kind]


@pytest.mark.parametrize(
    "text",
    [
        PROSE,
        "„Spaß“ im MENÜ – CAFÉ» naïve “É”",
        "x ≤ 5 → y ± 2 °C, ½ cup, √2 × π ≈ 4.44",
        "हिन्दी में लिखा हुआ एक वाक्य जो काफी लंबा है और जिसमें मात्राएँ हैं।",
        "ภาษาไทยมีสระและวรรณยุกต์หลายตัวอยู่ในประโยคนี้",
        "日本語の文章です。",
        "🎉🎉 Well done! 👩‍👩‍👧",
        "tabs\tand\r\nline ends",
        "```\n" + "}{)(;;<<>>" * 10 + "\n```",
        "f(x) = 3x^2 + 2x - 1; f'(x) = 6x + 2",
        '{"a": [1, 2, {"b": null}], "c": "text", "d": true}',
        "!?",
    ],
)
def test_text_is_not_junk(text: str) -> None:
    assert found(text, junk="drop") == []


def test_a_tools_output_may_look_like_anything() -> None:
    row = talk(("user", "?"), ("tool", "\x1b[31m\ufffd"), ("assistant", "Fine."))
    assert RowChecks(Curate(junk="drop"))(row)[1] == []


# -- languages -----------------------------------------------------------------------------------------------------------

SENTENCES = {
    "en": ("Please send me the report before Friday so that we can discuss it.", "Photosynthesis turns sunlight and water into sugar."),
    "de": ("Bitte schicken Sie mir den Bericht vor Freitag.", "Die Katze schläft den ganzen Tag auf dem warmen Fensterbrett."),
    "fr": ("Veuillez m'envoyer le rapport avant vendredi.", "Le chat dort toute la journée sur le rebord de la fenêtre."),
    "es": ("Por favor, envíeme el informe antes del viernes.", "El gato duerme todo el día junto a la ventana."),
    "it": ("Per favore, mandami la relazione prima di venerdì.", "Il gatto dorme tutto il giorno sul davanzale della finestra."),
    "pt": ("Por favor, envie-me o relatório antes de sexta-feira.", "O gato dorme o dia inteiro ao lado da janela."),
    "nl": ("Stuur me alstublieft het verslag voor vrijdag.", "De kat slaapt de hele dag op de vensterbank."),
    "pl": ("Proszę przesłać mi raport przed piątkiem.", "Kot śpi przez cały dzień na parapecie."),
    "tr": ("Lütfen raporu cuma gününden önce bana gönderin.", "Kedi bütün gün pencerenin önünde uyuyor."),
    "ru": ("Пожалуйста, пришлите мне отчёт до пятницы.", "Кошка спит весь день на подоконнике."),
    "uk": ("Будь ласка, надішліть мені звіт до п'ятниці.", "Кішка спить увесь день на підвіконні."),
    "ar": ("من فضلك أرسل لي التقرير قبل يوم الجمعة.", "تنام القطة طوال اليوم بجانب النافذة."),
    "hi": ("कृपया शुक्रवार से पहले मुझे रिपोर्ट भेज दें।", "बिल्ली सारा दिन खिड़की के पास सोती है।"),
    "zh": ("请在星期五之前把报告发给我，以便我们讨论。", "猫整天都在窗台上睡觉。"),
    "ja": ("金曜日までに報告書を送ってください。", "猫は一日中窓のそばで眠っています。"),
    "ko": ("금요일 전에 보고서를 보내 주세요.", "고양이는 하루 종일 창가에서 잠을 잔다."),
    "th": ("กรุณาส่งรายงานให้ฉันก่อนวันศุกร์", "แมวนอนทั้งวันอยู่ข้างหน้าต่าง"),
    "vi": ("Vui lòng gửi báo cáo cho tôi trước thứ Sáu.", "Con mèo ngủ cả ngày bên cửa sổ."),
}


RELATED = {"es": {"pt"}, "pt": {"es"}, "uk": {"ru"}}  # in doubt between neighbours, one short sentence stays


@pytest.mark.parametrize("wanted", SENTENCES)
def test_every_language_stays_with_itself_and_out_of_the_others(wanted: str) -> None:
    checks = RowChecks(Curate(languages=[wanted]))
    kept = {language for language, texts in SENTENCES.items() for text in texts if not checks(answer(text))[1]}
    assert wanted in kept
    assert kept <= {wanted} | RELATED.get(wanted, set())


@pytest.mark.parametrize(
    "text", ["42", "Paris", "No hay", "Amanda, James, John, Maria", "print('hola')", "```\nEl gato duerme todo el día\n```"]
)
def test_short_texts_names_and_code_are_left_alone(text: str) -> None:
    assert found(text, languages=["en"]) == []


def test_an_unknown_language_is_refused_by_name() -> None:
    with pytest.raises(SpecError, match=r"`eng`.*Did you mean `en`"):
        RowChecks(Curate(languages=["eng"]))


# -- personal data -------------------------------------------------------------------------------------------------------


def test_personal_data_is_masked_everywhere_and_nothing_else_changes() -> None:
    row = talk(
        ("system", "You work for ops@example.com."),
        {"role": "user", "content": "Call 555-123-4567", "name": "ann"},
        {
            "role": "assistant",
            "content": "",
            "weight": 1,
            "reasoning": "SSN 123-45-6789",
            "tool_calls": [{"name": "pay", "arguments": '{"card": 4111111111111111}', "id": "c1"}],
        },
        {"role": "tool", "content": "MRN: 12345678", "tool_call_id": "c1"},
        ("assistant", "Done."),
        tools='[{"name": "pay", "description": "mail ops@example.com"}]',
    )
    before = json.dumps(row)
    masked, notes = RowChecks(Curate(personal_data="mask"))(row)
    assert json.dumps(row) == before
    said = [
        {"role": "system", "content": "You work for [EMAIL]."},
        {"role": "user", "content": "Call [PHONE]", "name": "ann"},
        {**row["messages"][2], "reasoning": "SSN [SSN]", "tool_calls": [{"name": "pay", "arguments": '{"card": "[CARD]"}', "id": "c1"}]},
        {"role": "tool", "content": "MRN: [MRN]", "tool_call_id": "c1"},
        {"role": "assistant", "content": "Done."},
    ]
    assert masked == {**row, "messages": said, "tools": '[{"name": "pay", "description": "mail [EMAIL]"}]'}
    assert {n.kind for n in notes} == {
        "an e-mail address",
        "a phone number",
        "a social security number",
        "a payment card number",
        "a medical record number",
    }


@pytest.mark.parametrize("action", ["report", "refuse"])
def test_personal_data_is_only_told_of(action: str) -> None:
    row = answer("Call 555-123-4567")
    given, notes = RowChecks(Curate.model_validate({"personal_data": action}))(row)
    assert given is row
    assert [tuple(n) for n in notes] == [("personal_data", action, "a phone number", "Call [PHONE]")]


# -- bounded work --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("unit", ["a", "I'm sorry ", "as an ai ", "<", "```", "“", "é", "Ã", "1 ", "ab", "\x00", " ", "我"])
def test_long_texts_take_no_more_than_seconds(unit: str) -> None:
    checks = RowChecks(Curate(refusals="report", repetition="report", junk="report", languages=["en"], personal_data="report"))
    checks(answer("Load the model of languages first, if it is not there."))
    row = answer(unit * (1_000_000 // len(unit)))
    begun = time.thread_time()  # of this thread alone: the machine may be busy
    checks(row)
    assert time.thread_time() - begun < 5


# -- fingerprints --------------------------------------------------------------------------------------------------------


def test_fingerprints_see_what_is_said_and_not_how_it_is_packed() -> None:
    row = talk(("user", "Café?"), ("assistant", "Yes."))
    same = talk(
        {"role": "user", "content": " Cafe\u0301?\n", "name": "ann"},
        {"role": "assistant", "content": "Yes. ", "weight": 1},
    )
    assert fingerprints(row) == fingerprints({**same, "id": "other:7", "slice": "a", "class": "b"})


@pytest.mark.parametrize(
    "other",
    [
        talk(("user", "Is it?"), ("assistant", "No.")),
        talk(("user", "Is it?"), ("assistant", "Yes."), ("user", "Sure?"), ("assistant", "Yes.")),
        talk(("system", "Is it?"), ("assistant", "Yes.")),
        talk(("user", "Is"), ("user", "it?"), ("assistant", "Yes.")),
        talk(("user", "Is it?"), {"role": "assistant", "content": "Yes.", "reasoning": "Hm."}),
        talk(("user", "Is it?"), {"role": "assistant", "content": "Yes.", "tool_calls": [{"name": "f", "arguments": "{}"}]}),
        talk(("user", "Is it?"), ("assistant", "Yes."), tools='[{"name": "f"}]'),
    ],
)
def test_fingerprints_differ_where_something_else_is_said(other: dict[str, Any]) -> None:
    assert fingerprints(other)[0] != fingerprints(talk(("user", "Is it?"), ("assistant", "Yes.")))[0]


def test_the_prompt_is_all_before_the_last_answer() -> None:
    asked = [("user", "2+2?"), ("assistant", "4"), ("user", "Sure?")]
    yes, no = (fingerprints(talk(*asked, ("assistant", text))) for text in ("Yes", "No"))
    assert yes[1] == no[1] and yes[0] != no[0]
    assert fingerprints(talk(*asked, ("assistant", "Yes"), tools="[]"))[1] != yes[1]


def test_rows_that_ask_nothing_are_their_own_prompt() -> None:
    one, two = (fingerprints(talk(("system", "Tell a story."), ("assistant", text))) for text in ("Once.", "Twice."))
    assert one[0] == one[1] and one[1] != two[1]
    alone = fingerprints(talk(("assistant", "Plain text.")))
    assert alone[0] == alone[1]


def test_sketches_estimate_the_jaccard_similarity_of_word_three_grams() -> None:
    words = [f"w{i}" for i in range(202)]

    def row(changed: int) -> dict[str, Any]:
        return answer(" ".join(words[: 200 - changed] + [f"x{i}" for i in range(changed)]))

    def grams(row: dict[str, Any]) -> set[tuple[str, ...]]:
        said = " ".join(m["content"] for m in row["messages"]).replace(".", "").lower().split()
        return set(zip(said, said[1:], said[2:], strict=False))

    for changed in (0, 10, 40, 100, 200):
        true = len(grams(row(0)) & grams(row(changed))) / len(grams(row(0)) | grams(row(changed)))
        estimate = float((sketch(row(0)) == sketch(row(changed))).mean())
        assert abs(true - estimate) < 0.12, (changed, true, estimate)
    assert sketch(row(0)).shape == (128,) and sketch(row(0)).dtype == np.uint16


def test_sketches_leave_out_what_whole_data_sets_share() -> None:
    shared = "You are a helpful assistant that answers questions about trains. " * 20
    one = talk(("system", shared), ("user", "When does it leave?"), ("assistant", "At noon from platform two."), tools='[{"name": "f"}]')
    two = talk(("system", shared), ("user", "How fast is the blue one?"), ("assistant", "Faster than you would think."))
    assert (sketch(one) == sketch(two)).mean() < 0.1


def test_sketches_of_scripts_without_blanks() -> None:
    one, two = (
        answer("猫整天都在窗台上睡觉，狗在院子里跑来跑去，鸟在树上唱歌。"),
        answer("猫整天都在窗台上睡觉，狗在院子里跑来跑去，鸟在树上叫。"),
    )
    assert 0.6 < (sketch(one) == sketch(two)).mean() < 1
