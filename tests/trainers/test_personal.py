"""Personal data: found by kind, masked in place, and nothing else touched."""

from __future__ import annotations

import json
import random
import time
from collections import Counter

import pytest

from trainers.personal import TAGS, mask

# A labelled corpus: (text, the text masked). All of it is made up.
CORPUS = [
    ("Write to john.doe@example.com today.", "Write to [EMAIL] today."),
    ("Contact: Mary_O'Neil <mary.oneil+work@mail.example.co.uk>", "Contact: Mary_O'Neil <[EMAIL]>"),
    ("mailto:info@müller.example", "mailto:info@müller.example"),  # international domain names are out of reach
    ("Mail a.b@c-d.io, or x_y%z@sub.domain.org.", "Mail [EMAIL], or [EMAIL]."),
    ("(jane@firma.de)", "([EMAIL])"),
    ("Email:ops@host.internal.net;", "Email:[EMAIL];"),
    ("Call me at 555-123-4567.", "Call me at [PHONE]."),
    ("Our office: (212) 555-0187 or 212.555.0188", "Our office: [PHONE] or [PHONE]"),
    ("Phone: +49 30 901820", "Phone: [PHONE]"),
    ("Reach us on +44 (0)20 7946 0958 until noon", "Reach us on [PHONE] until noon"),
    ("tel:+1-202-555-0143", "tel:[PHONE]"),
    ("1-800-555-0199 is free of charge", "[PHONE] is free of charge"),
    ("My number is 555 123 4567, text me", "My number is [PHONE], text me"),
    ("Mobile number: 07700 900123", "Mobile number: [PHONE]"),
    ("Tél. : 01 23 45 67 89", "Tél. : [PHONE]"),
    ("phone 5551234567", "phone [PHONE]"),
    ("Fax: 030/901820", "Fax: [PHONE]"),
    ("whatsapp +919876543210", "whatsapp [PHONE]"),
    ("Call 12, then 555-123-4567", "Call 12, then [PHONE]"),
    ("Room 12 555-123-4567", "Room 12 [PHONE]"),
    ("His cell is (303) 555 0110.", "His cell is [PHONE]."),
    ("SSN 123-45-6789", "SSN [SSN]"),
    ("The applicant (219-09-9999) was approved.", "The applicant ([SSN]) was approved."),
    ("social security number: 123456789", "social security number: [SSN]"),
    ("My social security number is 123 45 6789.", "My social security number is [SSN]."),
    ("ssn=987-65-4321", "ssn=[SSN]"),
    ("Card 4111 1111 1111 1111, exp 12/27", "Card [CARD], exp 12/27"),
    ("4111-1111-1111-1111", "[CARD]"),
    ("pay with 5555555555554444 please", "pay with [CARD] please"),
    ("Amex 3782 822463 10005", "Amex [CARD]"),
    ("378282246310005", "[CARD]"),
    ("Discover: 6011111111111117", "Discover: [CARD]"),
    ("MRN: 00123456", "MRN: [MRN]"),
    ("Patient with medical record number 4839201 was admitted.", "Patient with medical record number [MRN] was admitted."),
    ("(MRN A1234567)", "(MRN [MRN])"),
    ("Patient ID: 88-44-221", "Patient ID: [MRN]"),
    ("Medical record no. 12-34-56", "Medical record no. [MRN]"),
    ("MRN is 7654321; call 555-123-4567 or a@b.org", "MRN is [MRN]; call [PHONE] or [EMAIL]"),
    ("Ring 020 7946 0018 after six", "Ring 020 7946 0018 after six"),  # missed: nothing says that it is a telephone
]
CORPUS += [
    (text, text)
    for text in (
        "In 2024 the population was 1234567890.",
        "pi is 3.14159265358979 and e is 2.718281828",
        "Order 1234567 shipped on 2024-01-15 at 10:30:00",
        "The sum 100 200 3000 is not a number you dial",
        "ISBN 978-3-16-148410-0",
        "IP 192.168.100.1000 and 10.0.0.1",
        "4111 1111 1111 1112 fails Luhn's sum",
        "1234 5678 9012 3456",
        "The price rose from 1,200,000 to 1,450,000 dollars",
        "call the function with 12 arguments",
        "call 911 or 112",
        "phone 2 and phone 3 cost 199 each",
        "x = 123456789 + 987654321",
        "@media (min-width: 1024px) and @param name",
        "git clone git@github.com:org/repo.git",
        "logo@2x.png",
        "user@localhost",
        "a decorator @app.route and an e-mail without a host: me@",
        "000-12-3456 and 666-12-3456 were never issued",
        "2023-11-05T12:34:56.789Z",
        "Version 1.2.3-4567, build 20240115.1",
        "f(x) = 12x^2 - 345x + 6789",
        "The years 1914-1918 and 1939-1945",
        "lat 40.712776, lon -74.005974",
        "UUID 123e4567-e89b-12d3-a456-426614174000",
        "sha 0123456789abcdef0123456789abcdef",
        "1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18",
        "48/2 = <<48/2=24>>24 clips; 48+24 = <<48+24=72>>72",
        "patients aged 18-65 (n=1234)",
        "The patient took 500 mg at 8:00",
        "Text 12 of the 1789 edition",
        "Serial number 123-456-78901",
    )
]


@pytest.mark.parametrize(("text", "masked"), CORPUS)
def test_each_row_of_the_corpus(text: str, masked: str) -> None:
    assert mask(text)[0] == masked


def test_recall_and_precision_on_rows_that_nothing_was_fitted_to() -> None:
    """Numbers drawn at random in every usual form, inside sentences, beside as many look-alikes."""
    draw = random.Random(0)

    def digits(count: int) -> str:
        return "".join(str(draw.randrange(10)) for _ in range(count))

    def luhn(prefix: str, length: int) -> str:
        body = prefix + digits(length - len(prefix) - 1)
        total = sum(d if i % 2 else (2 * d - 9 if d > 4 else 2 * d) for i, d in enumerate(map(int, reversed(body))))
        return body + str(-total % 10)

    def four(number: str, gap: str) -> str:
        return gap.join(number[i : i + 4] for i in range(0, 16, 4))

    def word() -> str:
        return "".join(draw.choice("abcdefghijklmnopqrstuvwxyz") for _ in range(draw.randint(3, 9)))

    personal = {
        "an e-mail address": lambda: draw.choice((f"{word()}@{word()}.com", f"{word()}.{word()}{digits(2)}@{word()}.{word()}.org")),
        "a phone number": lambda: draw.choice(
            (
                f"({digits(3)}) {digits(3)}-{digits(4)}",
                f"{digits(3)}-{digits(3)}-{digits(4)}",
                f"+{draw.randint(1, 9)}{digits(1)} {digits(3)} {digits(6)}",
                f"+1{digits(10)}",
            )
        ),
        "a social security number": lambda: f"{draw.randint(100, 599)}-{draw.randint(10, 99)}-{draw.randint(1000, 9999)}",
        "a payment card number": lambda: draw.choice(
            (luhn("4", 16), four(luhn("51", 16), " "), four(luhn("6011", 16), "-"), luhn("37", 15))
        ),
        "a medical record number": lambda: f"{draw.choice(('MRN', 'MRN:', 'medical record number'))} {digits(draw.randint(6, 9))}",
    }
    alike = (
        lambda: f"{draw.randint(1900, 2030)}-{draw.randint(10, 12)}-{draw.randint(10, 28)}",
        lambda: f"{draw.random():.9f}",
        lambda: f"order {digits(8)}",
        lambda: f"{digits(3)} {digits(3)} {digits(4)}",
        lambda: f"{draw.randint(1, 999)},{digits(3)},{digits(3)}",
        lambda: f"{digits(2)}:{digits(2)}:{digits(2)}",
        lambda: f"192.168.{draw.randint(0, 255)}.{draw.randint(0, 255)}",
        lambda: f"978-{digits(1)}-{digits(2)}-{digits(6)}-{digits(1)}",
        lambda: f"@{word()} {word()}@ {digits(5)}",
        lambda: f"{digits(12)}",
    )
    right: Counter[str] = Counter()
    wrong: Counter[str] = Counter()
    for _ in range(400):
        for kind, make in personal.items():
            found = mask(f"{word()} {word()}, {make()} {word()}. {word()}")[1]
            right[kind] += found == {kind: 1}
        for make in alike:
            wrong.update(mask(f"{word()} {make()} {word()} {make()}.")[1])
    assert {kind: right[kind] / 400 for kind in TAGS if right[kind] < 0.95 * 400} == {}
    assert {kind: n for kind, n in wrong.items() if n > 0.05 * right[kind]} == {}


def test_json_stays_json_as_it_was_written_and_its_names_introduce_its_values() -> None:
    text = r"""{"to":"ann@example.com", "phone_number" : 5551234567,
  "ssn":"123456789", "note": "she said \"call:\n555-123-4567\" \u00e9", "ids": [1234567,true, null,1.50],
  "fax": [5551234567, "5551234568"], "ann@example.com": {"mrn": "00998877", "total": 1234567}}"""
    masked, found = mask(text)
    wanted = r"""{"to":"[EMAIL]", "phone_number" : "[PHONE]",
  "ssn":"[SSN]", "note": "she said \"call:\n[PHONE]\" é", "ids": [1234567,true, null,1.50],
  "fax": ["[PHONE]", "[PHONE]"], "[EMAIL]": {"mrn": "[MRN]", "total": 1234567}}"""
    assert masked == wanted and json.loads(masked)["to"] == "[EMAIL]"
    assert found == Counter({"an e-mail address": 2, "a phone number": 4, "a social security number": 1, "a medical record number": 1})


@pytest.mark.parametrize(
    "text", ['{"a" : 1.50, "b":\t"\\u00e9 2024-01-15"}', "[1234567, 12345678]", "[note] call 12345", "{1234567", "[" * 100_000 + "1234"]
)
def test_what_holds_no_personal_data_is_left_as_it_was_written(text: str) -> None:
    assert mask(text) == (text, Counter())


@pytest.mark.parametrize(
    "unit",
    ["a", "a.", "1", "1 ", "1-", "(1", "+1", "a@", "a@a.", "@", " ", "phone ", "1234 ", "123-45-", "é", "mrn 1234 ", "\n", '"1234\\\\'],
)
def test_time_is_linear_in_the_text(unit: str) -> None:
    def seconds(size: int) -> float:
        text = unit * (size // len(unit))
        begun = time.thread_time()  # of this thread alone: the machine may be busy
        mask(text)
        return time.thread_time() - begun

    small, large = (min(seconds(size) for _ in range(3)) for size in (10_000, 100_000))
    assert large < 40 * max(small, 0.002)
