"""What a translated message must keep. Each check looks at a pair and returns what is wrong, one sentence each."""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import regex

from slmops_course.authoring.translate.glossary import Term, english_words, find_terms, has_form
from slmops_course.authoring.translate.languages import Language
from slmops_course.authoring.translate.markup import PLACE, Markup, read_markup


@dataclass(frozen=True)
class Pair:
    """A message and its translation, with what is needed to judge it."""

    english: str
    translation: str
    language: Language
    terms: Sequence[Term] = ()
    names: frozenset[str] = frozenset()  # words that stay in English letters: of people, products, files

    @cached_property
    def source(self) -> Markup:
        return read_markup(self.english)

    @cached_property
    def target(self) -> Markup:
        return read_markup(self.translation)

    @cached_property
    def prose(self) -> str:
        """The prose of the translation, one paragraph a line."""
        return "\n".join(self.target.prose)


Check = Callable[[Pair], Iterator[str]]


def check_pair(pair: Pair) -> list[tuple[str, str]]:
    """The names of the checks that a pair fails, with what is wrong. An untranslated pair fails none: `status` counts those."""
    if not pair.translation.strip():
        return []
    return [(name, sentence) for name, check in CHECKS.items() for sentence in check(pair)]


def check_headings(pair: Pair) -> Iterator[str]:
    """The same headings, by level."""
    if pair.source.headings != pair.target.headings:
        yield f"has headings of levels {pair.target.headings}: expected {pair.source.headings}"


def check_blocks(pair: Pair) -> Iterator[str]:
    """The same paragraphs, lists, tables and quotes, in the same order."""
    if pair.source.headings == pair.target.headings and pair.source.blocks != pair.target.blocks:
        missing, extra = Counter(pair.source.blocks), Counter(pair.target.blocks)
        what = ", ".join([f"{n} {k} too few" for k, n in (missing - extra).items()])
        what += ", ".join([f"{n} {k} too many" for k, n in (extra - missing).items()])
        yield f"has other blocks than the English: {what or 'their order differs'}; expected the same ones in the same order"


def _check_same(found: Counter, expected: Counter, what: str) -> Iterator[str]:
    for one, count in (expected - found).items():
        yield f"lacks the {what} {one!r}" + (f" ({count} times)" if count > 1 else "") + ": expected it as in the English"
    for one in found - expected:
        yield f"has the {what} {one!r}, which the English does not have: expected the same ones"


def check_fences(pair: Pair) -> Iterator[str]:
    """The same code, in fences or indented."""
    return _check_same(pair.target.code, pair.source.code, "code")


def check_links(pair: Pair) -> Iterator[str]:
    """The same addresses. Rendering moves those that lead to files."""
    return _check_same(pair.target.links, pair.source.links, "link")


def check_images(pair: Pair) -> Iterator[str]:
    """The same images."""
    return _check_same(pair.target.images, pair.source.images, "image")


def check_inline_code(pair: Pair) -> Iterator[str]:
    """The same pieces of code in the text."""
    return _check_same(pair.target.inline_code, pair.source.inline_code, "inline code")


def check_formulas(pair: Pair) -> Iterator[str]:
    """The same formulas."""
    return _check_same(pair.target.formulas, pair.source.formulas, "formula")


def check_tags(pair: Pair) -> Iterator[str]:
    """The same HTML tags, such as those of a folded answer."""
    return _check_same(pair.target.tags, pair.source.tags, "tag")


def check_numbers(pair: Pair) -> Iterator[str]:
    """The same numbers, in whichever digits; groups of digits may be set off in another way."""
    found, expected = (Counter(_numbers("\n".join(markup.prose))) for markup in (pair.target, pair.source))
    return _check_same(found, expected, "number")


def _numbers(text: str) -> list[str]:
    ascii_digits = regex.sub(r"\p{Nd}", lambda match: str(int(match[0])), text)
    return [regex.sub(r",(?=\d)", "", number) for number in regex.findall(r"\d+(?:[.,]\d+)*", ascii_digits)]


PLACEHOLDER = regex.compile(r"%\(\w+\)[a-z]|%[sdr]|\{[A-Za-z_]?[\w.\[\]]*(?:![rsa])?(?::[^{}\s]*)?\}")


def check_placeholders(pair: Pair) -> Iterator[str]:
    """The same places for values, such as {name}."""
    found, expected = (Counter(PLACEHOLDER.findall(text)) for text in (pair.translation, pair.english))
    return _check_same(found, expected, "placeholder")


def check_markup(pair: Pair) -> Iterator[str]:
    """No mark of emphasis, code or link that Markdown did not understand, as happens beside letters of other scripts."""
    english = "\n".join(pair.source.prose)
    for mark in ("**", "`", "](", "__"):
        if mark in pair.prose and mark not in english:
            yield f"has {mark!r} as text, which Markdown takes for no mark there: put a space or punctuation beside it"


def check_scripts(pair: Pair) -> Iterator[str]:
    """No letter of a script that is neither the language's nor in the English."""
    allowed = "".join(rf"\p{{Script={script}}}" for script in ("Common", "Inherited", "Latin", *pair.language.scripts))
    foreign = set(regex.findall(rf"[^{allowed}]", pair.translation)) - set(pair.english)
    if foreign:
        yield f"has {' '.join(sorted(foreign))}: expected letters of {', '.join(pair.language.scripts)} or Latin only"


def check_digits(pair: Pair) -> Iterator[str]:
    """Digits as the language's settings say."""
    native = sorted(set(regex.findall(r"(?![0-9])\p{Nd}", pair.translation)))
    if pair.language.digits == "latin" and native:
        yield f"has the digits {' '.join(native)}: expected 0 to 9 in {pair.language.english_name}"
    latin = regex.findall(r"(?<![A-Za-z\d.-])[0-9]+(?![A-Za-z\d])", pair.prose)
    if pair.language.digits == "native" and latin:
        yield f"has {latin[0]!r}: expected the digits of {pair.language.scripts[0]}"


def check_glossary(pair: Pair) -> Iterator[str]:
    """Terms as they are agreed."""
    for term in find_terms("\n".join(pair.source.prose), pair.terms):
        if (term.forms or term.keep) and not has_form(pair.prose, term):
            agreed = " or ".join([*term.forms, *([term.english] if term.keep else [])])
            yield f"has no agreed word for {term.english!r}: expected {agreed}"


ERROR_TEXT = regex.compile(
    r"traceback \(most recent|translation (?:error|failed)|failed to translate|rate limit|quota exceeded|internal server error|"
    r"too many requests|as an ai\b|i(?:'m| am) sorry|i can(?:'|no)t (?:help|assist|translate)|here is the translation|"
    r"\bundefined\b|\[object object\]|\bTODO\b|\bFIXME\b|�|(?-i:\bERROR\b|\b\w+Error:)",
    regex.IGNORECASE,
)


def check_error_text(pair: Pair) -> Iterator[str]:
    """Nothing that a translating program says about itself."""
    for found in ERROR_TEXT.findall(pair.translation):
        if found.lower() not in pair.english.lower():
            yield f"has {found!r}, which looks like the message of a program: expected a translation"


def check_untranslated(pair: Pair) -> Iterator[str]:
    """No paragraph left as it was."""
    for paragraph in set(pair.target.prose) & set(pair.source.prose):
        if len([word for word in _latin_words(paragraph) if not _stays(word, pair)]) >= 3:
            yield f"has a paragraph in English, {_shorten(paragraph)!r}: expected a translation"


STAGES = regex.compile(r"\b(?:student|teacher|lora|alone|sequence|logit)\b")


def check_leftover_english(pair: Pair) -> Iterator[str]:
    """No English word but names, terms kept in English, quotations, and terms in brackets beside the translated one."""
    quoted = regex.compile(r"“[^”]+”|\"[^\"]+\"")
    kept = {quotation[1:-1] for quotation in quoted.findall("\n".join(pair.source.prose))}
    # A quoted line of output keeps the names of rows: "student घटा teacher".
    prose = quoted.sub(lambda match: " " if match[0][1:-1] in kept else STAGES.sub(" ", match[0]), pair.prose)
    known = english_words(pair.terms)
    in_brackets = regex.compile(r"\(([A-Za-z][A-Za-z ,/-]*)\)")
    prose = in_brackets.sub(lambda match: " " if _is_term(match[1], known) else match[0], prose)
    left = sorted({word for word in _latin_words(prose) if not _stays(word, pair)})
    if left:
        yield f"has English words, {', '.join(left[:8])}: expected a translation, or their names in translations/names.txt"


def _is_term(text: str, known: Mapping[str, bool]) -> bool:
    return all(word in known or word.removesuffix("s") in known for word in regex.findall(r"[a-z]+", text.lower()))


def _latin_words(text: str) -> list[str]:
    """Words in Latin letters, apart from addresses and placeholders. Example: "SmolLM2 के weights" -> ["SmolLM2", "weights"]"""
    text = PLACEHOLDER.sub(" ", regex.sub(r"https?://\S+", " ", text))
    return [word for word in regex.findall(r"[\p{Latin}\d][\p{Latin}\d_.'’/-]*", text) if regex.search(r"\p{Latin}{2}", word)]


UNITS = {"ms", "kb", "mb", "gb", "tb", "kib", "mib", "gib", "gbit", "hz", "khz", "mhz", "ghz", "kwh", "wh", "usd", "eur", "cc"}


def _stays(word: str, pair: Pair) -> bool:
    """Whether a word may be in Latin letters: a name, a unit, an abbreviation, a term kept in English, one with a digit."""
    word = word.strip(".'’/-")
    if regex.search(r"\d|_|\p{Ll}\p{Lu}|^\p{Lu}{2,}s?$", word) or word.lower() in UNITS or word in pair.names:
        return True
    known = english_words([term for term in pair.terms if term.keep])
    parts = [part for part in regex.split(r"[-/.'’]", word) if part]
    if len(parts) > 1:
        return all(_stays(part, pair) for part in parts)
    return word.lower() in known or word.lower().removesuffix("s") in known


def check_length(pair: Pair) -> Iterator[str]:
    """Neither cut off nor drawn out. Short messages vary more."""
    english, translated = (len("".join(markup.prose).replace(PLACE, "")) for markup in (pair.source, pair.target))
    low, high = pair.language.length_ratio
    if english and not low * english - 12 <= translated <= high * english + 24:
        yield f"has {translated} characters where the English has {english}: expected {low:g} to {high:g} times as many"


def _shorten(text: str, width: int = 60) -> str:
    return text if len(text) <= width else text[: width - 1] + "…"


CHECKS: dict[str, Check] = {
    "headings": check_headings, "blocks": check_blocks, "fences": check_fences, "links": check_links, "images": check_images,
    "inline code": check_inline_code, "formulas": check_formulas, "tags": check_tags, "numbers": check_numbers,
    "placeholders": check_placeholders, "markup": check_markup, "scripts": check_scripts, "digits": check_digits,
    "glossary": check_glossary, "error text": check_error_text, "untranslated": check_untranslated,
    "leftover English": check_leftover_english, "length": check_length,
}  # fmt: skip
