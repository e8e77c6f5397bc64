"""What Markdown holds, as markdown-it reads it: blocks that messages are made of, and the parts a translation must keep."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

import regex
from markdown_it import MarkdownIt
from markdown_it.token import Token

# JupyterLab too takes formulas out before it reads Markdown, or their underscores would turn into emphasis.
FORMULA = regex.compile(r"\$\$.+?\$\$|(?<![\w$\\])\$(?=\S)[^$\n`]+?(?<=\S)\$(?![\w$])", regex.DOTALL)
PLACE = "\ufffc"  # stands where a formula or a piece of code was taken out of the prose
WORD = regex.compile(r"\p{L}[\p{L}\p{M}]+")


@dataclass(frozen=True)
class Block:
    """A stretch of a Markdown document: its lines, and the blank lines or table rule after them."""

    id: str  # the heading it stands under, its kind and number, such as "start/paragraph-2"
    kind: str  # heading, paragraph, list, row, quote, html, code or start
    text: str
    after: str

    @property
    def is_message(self) -> bool:
        """Whether there is something to translate in it."""
        if self.kind == "row":
            # A row of figures has words in its first cell only, a name that the program prints too.
            return any(has_words(cell) for cell in regex.split(r"(?<!\\)\|", self.text.strip().strip("|"))[1:])
        return self.kind not in ("code", "start") and has_words(self.text)


@dataclass(frozen=True)
class Markup:
    """The parts of a piece of Markdown that a translation keeps, and its prose."""

    headings: list[int] = field(default_factory=list)  # their levels, in order
    blocks: list[str] = field(default_factory=list)  # kinds of blocks, in order
    code: Counter = field(default_factory=Counter)  # fenced or indented
    inline_code: Counter = field(default_factory=Counter)
    links: Counter = field(default_factory=Counter)
    images: Counter = field(default_factory=Counter)
    formulas: Counter = field(default_factory=Counter)
    tags: Counter = field(default_factory=Counter)
    prose: list[str] = field(default_factory=list)  # one text a paragraph, heading, list item or table cell
    titles: list[str] = field(default_factory=list)  # the texts of its headings


def _parser() -> MarkdownIt:
    return MarkdownIt("commonmark", {"html": True}).enable("table")


def split_blocks(text: str) -> list[Block]:
    """Cut a document into blocks; a table is cut into its rows. Nothing is lost.

    Example: "# A\\n\\nb\\n" -> blocks "a/heading-1" and "a/paragraph-1"; joining every `text + after` gives the document.
    """
    lines = text.splitlines(keepends=True)
    spans = [span for span in _spans(_parser().parse(text)) if span[1] > span[0]]
    blocks, numbers, section = [], Counter(), ""
    if not spans or spans[0][0] > 0:
        blocks.append(Block("start", "start", "", "".join(lines[: spans[0][0] if spans else len(lines)])))
    for number, (first, last, kind) in enumerate(spans):
        following = spans[number + 1][0] if number + 1 < len(spans) else len(lines)
        whole = "".join(lines[first : min(last, following)])
        body = whole.rstrip("\n")
        after = whole[len(body) :] + "".join(lines[min(last, following) : following])
        section = slug(body.lstrip("# ")) if kind == "heading" else section
        numbers[section, kind] += 1
        blocks.append(Block(f"{section}/{kind}-{numbers[section, kind]}", kind, body, after))
    return blocks


_KINDS = {
    "heading_open": "heading", "paragraph_open": "paragraph", "bullet_list_open": "list", "ordered_list_open": "list",
    "blockquote_open": "quote", "html_block": "html", "fence": "code", "code_block": "code", "hr": "code",
}  # fmt: skip


def _spans(tokens: list[Token]) -> Iterator[tuple[int, int, str]]:
    for token in tokens:
        if token.map and token.nesting >= 0:
            if token.type == "tr_open":
                yield token.map[0], token.map[1], "row"
            elif token.level == 0 and token.type in _KINDS:
                yield token.map[0], token.map[1], _KINDS[token.type]


def slug(heading: str) -> str:
    """The anchor that GitHub gives a heading.

    Source: PUNCTUATION_REGEXP in https://github.com/gjtorikian/html-pipeline/blob/v2.14.3/lib/html/pipeline/toc_filter.rb

    Example: "What a run prints" -> "what-a-run-prints"; marks of Indic scripts stay.
    """
    return regex.sub(r"[^\p{L}\p{M}\p{N}\p{Pc}\- ]", "", heading.strip().lower()).replace(" ", "-")


def read_markup(text: str) -> Markup:
    """Read a piece of Markdown.

    Example: "See `x` in [A](b.md)." -> inline_code {"`x`": 1}, links {"b.md": 1}, prose ["See \\ufffc in A."]
    """
    markup = Markup(formulas=Counter(FORMULA.findall(text)))
    tokens = _parser().parse(FORMULA.sub(PLACE, text))
    for number, token in enumerate(tokens):
        if token.nesting >= 0 and token.type not in ("inline", "text"):
            markup.blocks.append(token.type.removesuffix("_open") + (token.info if token.type == "fence" else ""))
        if token.type == "heading_open":
            markup.headings.append(int(token.tag[1:]))
            markup.titles.append(_read_inline(tokens[number + 1], Markup()))
        elif token.type in ("fence", "code_block"):
            markup.code[token.content] += 1
        elif token.type == "html_block":
            _read_html(token.content, markup)
        elif token.type == "inline":
            markup.prose.append(_read_inline(token, markup))
    return markup


def _read_html(content: str, markup: Markup) -> None:
    markup.tags.update(regex.findall(r"</?\w[^>]*>", content))
    words = regex.sub(r"<!--.*?-->|<[^>]+>", " ", content, flags=regex.DOTALL).strip()
    if words:
        markup.prose.append(words)


def _read_inline(token: Token, markup: Markup) -> str:
    """The prose of an inline token; what else it holds is counted in `markup`."""
    parts = []
    for child in token.children or []:
        if child.type == "code_inline":
            markup.inline_code[f"`{child.content}`"] += 1
            parts.append(PLACE)
        elif child.type == "link_open":
            markup.links[str(child.attrGet("href"))] += 1
        elif child.type == "image":
            markup.images[str(child.attrGet("src"))] += 1
            parts.append(child.content)
        elif child.type == "html_inline":
            markup.tags[child.content] += 1
        elif child.type in ("softbreak", "hardbreak"):
            parts.append(" ")
        else:
            parts.append(child.content)
    return "".join(parts).strip()


def has_words(text: str) -> bool:
    """Whether there is a word beside code, formulas, tags and addresses. Example: "`x` = 3" -> False"""
    return any(WORD.search(part) for part in read_markup(text).prose)
