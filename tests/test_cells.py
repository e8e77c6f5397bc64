"""What cells show is looked up in the reader's language, and their code means what it meant."""

import contextlib
import io

import pandas
import polib
import pytest
from IPython.core.interactiveshell import InteractiveShell

from slmops_course import cells, language
from slmops_course.cells import Cells, say, shown_texts, speak, translate_frame
from slmops_course.language import use

HINDI = {
    "{0} rows of {1}": "{1} में से {0} पंक्तियाँ", "met": "पूरा", "not met": "अधूरा", "The goal is {0}.": "लक्ष्य {0} है।",
    "size MB": "आकार MB", "name": "नाम", "student": "छात्र", "whole": "पूरा", "{{braces}} and words": "{{कोष्ठक}} और शब्द",
}


@pytest.fixture
def hindi(tmp_path):
    catalog = polib.POFile()
    catalog.metadata = {"Language": "hi", "Content-Type": "text/plain; charset=UTF-8"}
    catalog.extend(polib.POEntry(msgid=english, msgstr=other) for english, other in HINDI.items())
    path = tmp_path / "hi" / "LC_MESSAGES" / "slmops.mo"
    path.parent.mkdir(parents=True)
    path.write_bytes(catalog.to_binary())
    before = list(language._in_use)
    use("hi", folder=tmp_path)
    yield
    language._in_use[:] = before


@pytest.fixture
def shell():
    return InteractiveShell()


def printed(shell, code):
    with contextlib.redirect_stdout(io.StringIO()) as out:
        shell.run_cell(code).raise_error()
    return out.getvalue()


@pytest.mark.parametrize(
    ("code", "texts"),
    [
        ("print(f'{a:,} rows of {b!r}')", ["{0} rows of {1}"]),
        ("print('plain words', x, sep='no words')", ["plain words"]),
        ("print(f'The goal is {\"met\" if a else \"not met\"}.')", ["The goal is {0}.", "met", "not met"]),
        ("print(*(f'{n} rows of {m}' for n in x), sep='')", ["{0} rows of {1}"]),
        ("print(x or 'nothing here', [f'{y} words'])", ["nothing here", "{0} words"]),
        ("print(f'{a}: {b}', '%', 'x', data['key words'])", []),
        ("plots.show(figure, f'Bars of {n}.')", ["Bars of {0}."]),
        ("plots.plot_bars(x, title='Sizes', xlabel=f'{n} of all', y='no')", ["Sizes", "{0} of all"]),
        ("plots.plot_lines({'by doubt': a, n: b}, title='T')", ["by doubt"]),
        ("figure, axes = plots.new_figure('One', 'two', 'three')", ["One", "two", "three"]),
        ("print('{braces} and words')", ["{{braces}} and words"]),
        ("experiments.show(course, 'no figure')\nx = 'not shown'", []), ("", []),
    ],
)  # fmt: skip
def test_the_texts_that_a_cell_shows_are_found_and_no_others(code, texts):
    assert sorted(shown_texts(code)) == sorted(texts)


def test_values_come_where_the_translation_wants_them_in_the_format_of_the_code(hindi, shell):
    speak(shell)
    assert printed(shell, "a, b = 1234, 'x'\nprint(f'{a:,} rows of {b!r}')") == "'x' में से 1,234 पंक्तियाँ\n"
    assert printed(shell, "print(f'The goal is {\"met\" if a > 5 else \"not met\"}.')") == "लक्ष्य पूरा है।\n"
    assert printed(shell, "print('{braces} and words')") == "{कोष्ठक} और शब्द\n"


def test_what_has_no_translation_is_printed_as_the_code_says(hindi, shell):
    speak(shell)
    code = "a = {'k': 2}\nprint(f'no {a[\"k\"]:>4} translation', '{x} of it', a, sep=' | ', end='!')"
    plain = printed(InteractiveShell(), code)
    assert printed(shell, code) == plain == "no    2 translation | {x} of it | {'k': 2}!"


def test_english_cells_are_left_alone_and_speaking_twice_is_speaking_once(hindi, shell):
    before = language._in_use[0]
    language._in_use[:] = [("en", before[1])]
    speak(shell)
    assert not [one for one in shell.ast_transformers if isinstance(one, Cells)]
    language._in_use[:] = [before]
    speak(shell)
    speak(shell)
    assert len([one for one in shell.ast_transformers if isinstance(one, Cells)]) == 1


def test_a_table_is_named_in_the_language_when_it_is_shown_and_stays_what_it_is(hindi, shell):
    frame = pandas.DataFrame({"size MB": [1], "other": [2]}, index=pandas.Index(["student"], name="name"))
    named = translate_frame(frame)
    assert (list(named.columns), list(named.index), named.index.name) == (["आकार MB", "other"], ["छात्र"], "नाम")
    assert list(frame.columns) == ["size MB", "other"]
    speak(shell)
    assert "आकार MB" in shell.display_formatter.format(frame)[0]["text/html"]
    assert "आकार MB" in shell.display_formatter.format(frame)[0]["text/plain"]
    columns = pandas.MultiIndex.from_tuples([("size MB", "student")], names=["name", None])
    assert translate_frame(pandas.DataFrame([[1]], columns=columns)).columns[0] == ("आकार MB", "छात्र")
    assert translate_frame(pandas.DataFrame()).empty


def test_a_template_without_values_says_itself():
    assert say("three words here") == "three words here"
    assert cells.say("{0} rows", "7") == "7 rows"
