"""Taking out of a text what tells who wrote it, before it is stored.

Numbers are found by what they are: check digits by python-stdnum, telephone numbers by phonenumbers, Google's library.
Presidio would also look for names, by a spaCy model that has to be fetched first; scrubadub has rested since 2023; datafog's
patterns are those of the United States. So the patterns that join the two libraries are ours, and tested.
"""

import functools
import ipaddress
import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

REGIONS = ("IN", "NP", "GB", "US")  # whose telephone numbers are known without their country's code

Span = tuple[int, int]


@dataclass(frozen=True)
class Masked:
    """A text without personal data, and what kinds were taken out, one for each place."""

    text: str
    found: tuple[str, ...]


def mask_personal_data(text: str, *, regions: Sequence[str] = REGIONS) -> Masked:
    """Put `[e-mail]`, `[card number]` and the like in the place of what tells who somebody is or opens their accounts.

    Found are e-mail addresses, UPI ids, links with something private in them, IP addresses, card numbers, IBANs, PAN and
    Aadhaar numbers, telephone numbers of the `regions`, and numbers that are called an account, a PIN, an OTP or a CVV; in
    digits of any script. A number that may be one of these is masked: a false mask costs a word, a missed one a person.
    Not found are names of people, postal addresses, dates of birth, bare account numbers and anything in words: that takes
    a model that knows names, and even this misses some. So keep what is stored on the device, and not for long.
    Example: "Call +91 98765 43210 about Rs 1,200" -> Masked("Call [phone number] about Rs 1,200", ("phone number",))
    """
    plain, positions = _plain(text)
    spans: list[tuple[int, int, int, str]] = []
    # Two numbers with a space between them can hide each other: what was found is blanked, and the rest looked at again.
    while found := _find(plain, regions):
        spans += found
        for start, end, *_ in found:
            plain = plain[:start] + "\n" * (end - start) + plain[end:]
    pieces, last = [], 0
    for start, end, _, kind in sorted(spans):
        pieces += [text[last : positions[start]], f"[{kind}]"]
        last = positions[end - 1] + 1
    return Masked("".join([*pieces, text[last:]]), tuple(kind for *_, kind in sorted(spans)))


def _find(plain: str, regions: Sequence[str]) -> list[tuple[int, int, int, str]]:
    """What is found in one look: start, end, rank and kind. Two readings of a number are one, under the likelier kind."""
    found = [(*span, rank, kind) for rank, (kind, find) in enumerate(_FINDERS) for span in find(plain)]
    found += [(match.start, match.end, len(_FINDERS), "phone number") for match in _telephones(plain, regions)]
    merged: list[tuple[int, int, int, str]] = []
    for start, end, rank, kind in sorted(found):
        if merged and start < merged[-1][1]:
            before = merged.pop()
            rank, kind = min(before[2:], (rank, kind))
            start, end = before[0], max(before[1], end)
        merged.append((start, end, rank, kind))
    return merged


def _plain(text: str) -> tuple[str, list[int]]:
    """The text with every digit as 0 to 9, one kind of space and hyphen, nothing invisible; and where each character was."""
    kept, positions = [], []
    for position, character in enumerate(text):
        wide = unicodedata.normalize("NFKC", character)
        character = wide if len(wide) == 1 else character
        category = unicodedata.category(character)
        if category == "Cf":  # zero-width joiners and the like, which would hide a number
            continue
        kept.append({"Nd": str(unicodedata.decimal(character, "")), "Zs": " ", "Pd": "-"}.get(category, character))
        positions.append(position)
    return "".join(kept), positions


def _matches(pattern: str, *, group: int = 0, check: Callable[[str], bool] = bool) -> Callable[[str], list[Span]]:
    """A finder of what matches a pattern and passes a check."""
    compiled = re.compile(pattern, re.IGNORECASE)
    return lambda plain: [match.span(group) for match in compiled.finditer(plain) if check(match[group])]


def _links(plain: str) -> Iterator[Span]:
    """Links that hold a user, a query or a long part with digits; `https://example.org/help` stays."""
    for match in re.finditer(r"(?:https?://|www\.|(?<!\S)[\w-]+(?:\.[\w-]+)+/)[^\s<>\"]+", plain, re.IGNORECASE):
        link = match[0].rstrip(".,;:!?)'")
        if re.search(r"[@?#]|/(?=[^/]*\d)[^/]{10,}", link):
            yield match.start(), match.start() + len(link)


def _is_ip(text: str) -> bool:
    try:
        return bool(ipaddress.ip_address(text)) and (text.count(".") == 3 or text.count(":") > 2)  # 12::30 is one too
    except ValueError:
        return False


def _number_runs(plain: str, *, digits: tuple[int, int], is_private: Callable[[list[str]], bool]) -> Iterator[Span]:
    """Neighbouring groups of digits that together have so many digits and pass a check of the groups."""
    for run in re.finditer(r"(?<![\w.,])\d+(?:[ -]\d+)*(?![\w]|[.,]\d)", plain):
        groups = list(re.finditer(r"\d+", run[0]))
        for first in range(len(groups)):
            for last in range(first, min(first + digits[1], len(groups))):
                chosen = [group[0] for group in groups[first : last + 1]]
                if digits[0] <= sum(map(len, chosen)) <= digits[1] and is_private(chosen):
                    yield run.start() + groups[first].start(), run.start() + groups[last].end()


def _is_card(groups: list[str]) -> bool:
    from stdnum import luhn

    number = "".join(groups)
    written_so = tuple(map(len, groups)) in ((4, 4, 4, 4), (4, 6, 5))  # a card's, even with a wrong digit
    return number[0] in "234568" and (written_so or luhn.is_valid(number))


def _is_aadhaar(groups: list[str]) -> bool:
    from stdnum.in_ import aadhaar

    number = "".join(groups)
    return number[0] in "23456789" and (tuple(map(len, groups)) == (4, 4, 4) or aadhaar.is_valid(number))


def _ibans(plain: str) -> Iterator[Span]:
    """An IBAN may be followed by words, so the longest beginning that is a valid one is taken."""
    from stdnum import iban

    for match in re.finditer(r"\b[A-Z]{2}\d{2}(?:[ -]?[A-Z0-9]){11,36}", plain, re.IGNORECASE):
        for end in range(len(match[0]), 14, -1):
            if iban.is_valid(match[0][:end]) and not plain[match.start() + end :][:1].isalnum():
                yield match.start(), match.start() + end
                break


def _is_pan(text: str) -> bool:
    from stdnum.in_ import pan

    return pan.is_valid(text)


def _telephones(plain: str, regions: Sequence[str]) -> Iterable:
    from phonenumbers import PhoneNumberMatcher

    return [match for region in regions for match in PhoneNumberMatcher(plain, region)]


_ENDS = r"\s@<>()\[\],;:\"।"  # what no address holds; \w would not do, because it leaves out the vowels of Indian scripts
# The likelier reading first. A number that is called an account has 9 to 18 digits; one called a PIN, 3 to 8.
_FINDERS: tuple[tuple[str, Callable[[str], Iterable[Span]]], ...] = (
    ("link", _links),
    ("e-mail", _matches(rf"[^{_ENDS}]+@[^{_ENDS}!?]+\.(?!\d)[^{_ENDS}!?.]+")),
    ("UPI id", _matches(r"[\w.-]{2,}@(?!(?:rs|inr|usd|eur)\b)[a-z]{2,}\b")),
    ("IP address", _matches(r"(?<![\w.])\d{1,3}(?:\.\d{1,3}){3}(?!\w|\.\d)|(?<![\w:])[\da-f:]{6,45}(?![\w:])", check=_is_ip)),
    ("IBAN", _ibans),
    ("card number", functools.partial(_number_runs, digits=(13, 19), is_private=_is_card)),
    ("PAN", _matches(r"\b[a-z]{5}\d{4}[a-z]\b", check=_is_pan)),
    ("Aadhaar number", functools.partial(_number_runs, digits=(12, 12), is_private=_is_aadhaar)),
    ("account number", _matches(r"\b(?:a/?c|acct|accounts?)\b[^\d\n]{0,15}(\d(?:[ -]?\d){8,17})\b", group=1)),
    ("secret number", _matches(r"\b(?:otp|[mt]?pin|cvv2?|cvc|passcode|password)(?: is)?\s*[:=#-]?\s*(\d{3,8})\b", group=1)),
)
