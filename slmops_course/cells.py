"""What a notebook's cells say, in the reader's language, their code left as it is.

A cell says `print(f"{count:,} messages")`. In another language than English the kernel looks up "{0} messages" just before
the cell runs, and puts the value in where the translation wants it. So code cells are the same in every language, and what
is not translated stays English. Tables are looked up when they are shown: the names of their columns, rows and axes.
"""

import ast
import re
from collections.abc import Iterator

from slmops_course.language import ENGLISH, _, current

LOOK_UP = "_slmops_say"  # how the lookup is called in a cell that was changed
WORD = re.compile(r"[^\W\d_]{2,}")
TITLES = ("title", "xlabel", "ylabel")


class Cells(ast.NodeTransformer):
    """Puts a lookup around each text that a cell shows. `texts` are those that it found.

    Shown are what `print` is given, a text's choice by `if` and the texts of a list or a comprehension included, and the
    titles, descriptions and named lines of figures. A text without a word, such as f"{a}: {b}", is left alone.
    """

    def __init__(self):
        self.texts: list[str] = []

    def visit_Call(self, node):
        self.generic_visit(node)
        name = ast.unparse(node.func)
        if name == "print":
            node.args = [self._say(argument) for argument in node.args]
        elif name == "plots.show":
            node.args[1:] = [self._say(argument) for argument in node.args[1:]]
        elif name.removeprefix("plots.") == "new_figure":
            node.args = [self._say(argument) for argument in node.args]
        elif name.startswith("plots.plot_"):
            for named in (one for one in node.args if isinstance(one, ast.Dict)):
                named.keys = [self._say(key) for key in named.keys]
        for keyword in node.keywords:
            if keyword.arg in TITLES:
                keyword.value = self._say(keyword.value)
        return node

    def _say(self, node):
        """What stands for an expression that is shown."""
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            return self._look_up(node, node.value.replace("{", "{{").replace("}", "}}"), [])
        if isinstance(node, ast.JoinedStr):
            return self._look_up(node, *self._template(node))
        if isinstance(node, ast.IfExp):
            node.body, node.orelse = self._say(node.body), self._say(node.orelse)
        elif isinstance(node, ast.BoolOp):
            node.values = [self._say(value) for value in node.values]
        elif isinstance(node, ast.Starred):
            node.value = self._say(node.value)
        elif isinstance(node, ast.GeneratorExp | ast.ListComp):
            node.elt = self._say(node.elt)
        elif isinstance(node, ast.List | ast.Tuple):
            node.elts = [self._say(element) for element in node.elts]
        return node

    def _template(self, node: ast.JoinedStr) -> tuple[str, list[ast.JoinedStr]]:
        """The text of an f-string with numbered places, and what belongs there."""
        text, values = "", []
        for part in node.values:
            if isinstance(part, ast.Constant):
                text += part.value.replace("{", "{{").replace("}", "}}")
            else:
                part.value = self._say(part.value) if isinstance(part.value, ast.IfExp | ast.BoolOp) else part.value
                text += f"{{{len(values)}}}"
                values.append(ast.JoinedStr([part]))
        return text, values

    def _look_up(self, node, template: str, values: list):
        if not WORD.search(re.sub(r"\{\d+\}", " ", template)):
            return node
        self.texts.append(template)
        call = ast.Call(ast.Name(LOOK_UP, ast.Load()), [ast.Constant(template), *values], [])
        return ast.copy_location(call, node)

    def visit_Module(self, node):
        return ast.fix_missing_locations(self.generic_visit(node))


def shown_texts(code: str) -> Iterator[str]:
    """The texts that a cell shows, as its readers' catalogues have them. Example: 'print(f"{n} rows")' -> "{0} rows" """
    cells = Cells()
    cells.visit(ast.parse(code))
    yield from cells.texts


def say(template: str, *values: str) -> str:
    """A text in the reader's language, with its values. Example: say("{0} rows", "7") -> "7 rows" """
    return _(template).format(*values)


def speak(shell) -> None:
    """Have a kernel's further cells speak the reader's language; English needs nothing. Doing it twice does it once."""
    if current() == ENGLISH or any(isinstance(one, Cells) for one in shell.ast_transformers):
        return
    shell.user_ns[LOOK_UP] = say
    shell.ast_transformers.append(Cells())
    for kind in ("text/html", "text/plain"):
        formatter = shell.display_formatter.formatters[kind]
        formatter.for_type_by_name("pandas", "DataFrame", lambda frame, *printer, kind=kind: _show(frame, kind, *printer))


def _show(frame, kind: str, printer=None, cycle=False):
    named = translate_frame(frame)
    if kind == "text/html":
        return named._repr_html_()
    printer.text(repr(named))


def translate_frame(frame):
    """A pandas DataFrame whose columns, rows and axes are named in the reader's language."""
    named = frame.rename(columns=_word, index=_word)
    return named.rename_axis(index=[_word(n) for n in frame.index.names], columns=[_word(n) for n in frame.columns.names])


def _word(name):
    return _(name) if isinstance(name, str) else name
