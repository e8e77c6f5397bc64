"""A small course is taken through extract, status, render and check; then the real one, once."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

from slmops_course.authoring.translate import commands, coop, pages
from slmops_course.authoring.translate.catalogs import catalog_path, read_catalog
from slmops_course.authoring.translate.documents import find_documents, read_messages
from slmops_course.authoring.translate.languages import TranslationError, find_languages, read_language
from slmops_course.authoring.translate.programs import compiled_path, default_texts, program_messages, table_names

ROOT = Path(__file__).parent.parent
LANGUAGES = ["hi", "ml", "mr", "ne"]
README = """# Course

Read [one](notebooks/01_one.ipynb).

    make course

## Pins

In [a file](pins.txt), [here](#pins).
"""
HINDI = {
    "# Course": "# पाठ्यक्रम", "Read [one](notebooks/01_one.ipynb).": "[पहला](notebooks/01_one.ipynb) पढ़िए।",
    "## Pins": "## संस्करण", "In [a file](pins.txt), [here](#pins).": "एक [फ़ाइल](pins.txt) में, [यहाँ](#pins)।",
    "# One": "# एक", "The model learns.": "मॉडल सीखता है।", "epoch": "एपॉक", "Two curves.": "दो रेखाएँ।", "good": "अच्छा",
}  # fmt: skip


@pytest.fixture
def small(tmp_path):
    """A course of a README, a notebook and a module, in Hindi, with everything translated and rendered."""
    (tmp_path / "README.md").write_text(README, "utf-8")
    (tmp_path / "pins.txt").write_text("a==1\n", "utf-8")
    cells = [
        nbformat.v4.new_markdown_cell("# One", id="one-title"),
        nbformat.v4.new_code_cell("from slmops_course import plots\nplots.show(figure, 'Two curves.')", id="one-code"),
        nbformat.v4.new_markdown_cell("The model learns.", id="one-end"),
    ]
    (tmp_path / "notebooks").mkdir()
    nbformat.write(nbformat.v4.new_notebook(cells=cells), tmp_path / "notebooks" / "01_one.ipynb")
    (tmp_path / "slmops_course").mkdir()
    (tmp_path / "slmops_course" / "a.py").write_text('print(_("good"))\nplot(x, xlabel="epoch")\n', "utf-8")
    (tmp_path / "slmops_course" / "plots.py").write_text('def draw(x):\n    return new_figure("epoch", x, "")\n', "utf-8")
    (tmp_path / "translations" / "hi").mkdir(parents=True)
    (tmp_path / "translations" / "glossary.csv").write_text("term,keep,hi,note\nmodel,no,मॉडल,\nLoRA,yes,,\n", "utf-8")
    shutil.copy(ROOT / "translations" / "hi" / "language.toml", tmp_path / "translations" / "hi")
    commands.extract(tmp_path)
    translate(tmp_path, HINDI)
    commands.render(tmp_path)
    return tmp_path


def translate(root: Path, words: dict[str, str]) -> None:
    for path in (root / "translations" / "hi" / "po").glob("*.po"):
        catalog = read_catalog(path)
        for entry in catalog:
            entry.msgstr = words.get(entry.msgid, entry.msgstr)
        catalog.save(str(path))


def state_of_files(root: Path) -> dict[str, str]:
    return {str(p): hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(root.rglob("*")) if p.is_file()}


def found(root: Path) -> list[str]:
    return [problem.check for problem in commands.check(root)]


def test_a_translated_and_rendered_course_has_nothing_wrong_and_looking_changes_no_file(small):
    before = state_of_files(small)
    assert commands.check(small) == []
    assert [(code, name, one.share) for code, name, one in commands.status(small)] == [
        ("hi", "README", 1.0), ("hi", "01_one", 1.0), ("hi", "messages", 1.0),
    ]  # fmt: skip
    assert state_of_files(small) == before


def test_extracting_and_rendering_again_change_no_byte(small):
    before = state_of_files(small)
    assert commands.extract(small) == []
    assert commands.render(small) == []
    assert state_of_files(small) == before


def test_rendered_files_hang_together(small):
    text = (small / "translations" / "hi" / "README.md").read_text("utf-8")
    assert "एक [फ़ाइल](../../pins.txt) में, [यहाँ](#संस्करण)।" in text
    assert "    make course\n" in text
    notebook = nbformat.read(small / "translations" / "hi" / "notebooks" / "01_one.ipynb", as_version=4)
    assert notebook.cells[0].source == "# एक"
    assert "plots.show" in notebook.cells[2].source
    assert compiled_path(small, "hi").is_file()


def test_changed_english_is_told_for_its_own_message_until_it_is_translated(small):
    (small / "README.md").write_text(README.replace("## Pins", "## The pins").replace("#pins", "#the-pins"), "utf-8")
    assert set(found(small)) == {"missing", "vanished", "rendered", "stale"}, "before it is extracted"
    commands.extract(small)
    commands.render(small)
    problems = commands.check(small)
    assert {(p.check, p.place) for p in problems} == {("fuzzy", "the-pins/heading-1"), ("fuzzy", "the-pins/paragraph-1")}
    text = (small / "translations" / "hi" / "README.md").read_text("utf-8")
    assert "## The pins" in text
    assert "[पहला](notebooks/01_one.ipynb) पढ़िए।" in text
    assert "संस्करण" not in text


def test_only_rendering_makes_a_stale_translation_fresh(small):
    path = small / "notebooks" / "01_one.ipynb"
    notebook = nbformat.read(path, as_version=4)
    notebook.cells[1].execution_count = 3
    nbformat.write(notebook, path)
    assert "stale" in found(small)
    assert "stale" in found(small), "looking made it fresh"
    commands.render(small)
    assert found(small) == []


@pytest.mark.parametrize(
    ("damage", "check"),
    [
        (lambda root: (root / "pins.txt").unlink(), "links"),
        (lambda root: (root / "translations" / "hi" / "README.md").unlink(), "rendered"),
        (lambda root: (root / "translations" / "hi" / "README.md").write_text("# एक\n", "utf-8"), "headings"),
        (lambda root: (root / "translations" / "hi" / "README.md").write_text("# क\n\n## ख\n\n[ग](#घ)\n", "utf-8"), "links"),
        (lambda root: (root / "translations" / "hi" / coop.FILE).unlink(), "stale"),
        (lambda root: (root / "translations" / "hi" / coop.FILE).write_text("{", "utf-8"), "stale"),
        (lambda root: translate(root, {"The model learns.": ""}), "missing"),
        (lambda root: translate(root, {"The model learns.": "नमूना सीखता है।"}), "glossary"),
        (lambda root: translate(root, {"good": "ERROR: rate limit"}), "error text"),
        (lambda root: compiled_path(root, "hi").write_bytes(b""), "rendered"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_found(small, damage, check):
    damage(small)
    assert check in found(small)


def test_a_message_that_left_the_english_is_said_to_have_vanished_until_it_is_deleted(small):
    path = small / "notebooks" / "01_one.ipynb"
    notebook = nbformat.read(path, as_version=4)
    del notebook.cells[2]
    nbformat.write(notebook, path)
    commands.extract(small)
    commands.render(small)
    (problem,) = commands.check(small)
    assert str(problem).startswith("hi: notebooks/01_one.ipynb one-end: vanished: 'The model learns.' is not in the English")
    catalog = read_catalog(catalog_path(small, "hi", "01_one"))
    for entry in catalog.obsolete_entries():
        catalog.remove(entry)
    catalog.save()
    assert found(small) == []


def test_outputs_of_a_run_in_the_language_are_kept_by_later_renderings(small, tmp_path):
    path = small / "notebooks" / "01_one.ipynb"
    notebook = nbformat.read(path, as_version=4)
    notebook.cells[1].outputs = [nbformat.v4.new_output("stream", text="two curves\n")]
    nbformat.write(notebook, path)
    commands.render(small)
    executed = nbformat.read(small / "translations" / "hi" / "notebooks" / "01_one.ipynb", as_version=4)
    assert executed.cells[2].outputs == []
    executed.cells[2].outputs = [nbformat.v4.new_output("stream", text="दो रेखाएँ\n")]
    (small / "ran" / "hi").mkdir(parents=True)
    nbformat.write(executed, small / "ran" / "hi" / "01_one.ipynb")
    assert len(commands.render(small, executed=small / "ran")) == 1
    assert commands.render(small) == []
    assert commands.check(small) == []


def test_a_new_language_begins_with_settings_a_column_and_empty_catalogues(small):
    made = commands.new(small, "ta")
    assert find_languages(small) == ["hi", "ta"]
    assert read_language(small, "ta").scripts == ("Tamil",)
    assert (read_language(small, "ta").name, read_language(small, "ta").english_name) == ("தமிழ்", "Tamil")
    assert len(made) == 4
    assert (small / "translations" / "glossary.csv").read_text("utf-8").startswith("term,keep,hi,ta,note\nmodel,no,मॉडल,,\n")
    assert {one.share for code, _, one in commands.status(small, ["ta"])} == {0.0}
    with pytest.raises(TranslationError, match=r"'ta' is there already"):
        commands.new(small, "ta")
    with pytest.raises(TranslationError, match=r"no language 'qqq': expected an ISO 639-1 code"):
        commands.new(small, "qqq")


@pytest.mark.parametrize(
    ("old", "new", "sentence"),
    [
        ('digits = "latin"', 'digits = "roman"', "expected 'latin' or 'native'"),
        ('scripts = ["Devanagari"]', 'scripts = ["Devnagri"]', "expected a Unicode script's name"),
        ('code = "hi"', 'code = "mr"', "expected the name of its folder"),
        ("length_ratio = [0.55, 1.6]", "length_ratio = [2.0, 1.6]", "expected two numbers around 1"),
        ('original = "', 'originel = "', r"cannot be read .*expected code, name"),
        ('original = "', "original = ", "cannot be read"),
    ],
)  # fmt: skip
def test_settings_that_cannot_be_used_are_one_sentence(small, old, new, sentence):
    path = small / "translations" / "hi" / "language.toml"
    path.write_text(path.read_text("utf-8").replace(old, new), "utf-8")
    with pytest.raises(TranslationError, match=sentence):
        commands.check(small)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("term,keep\nmodel,no\n", "expected 'hi' among them"), ("term,keep,hi\na,no,\na,no,\n", "'a' twice"),
        ("", "expected 'term'"),
    ],
)  # fmt: skip
def test_a_glossary_that_cannot_be_used_is_one_sentence(small, text, sentence):
    (small / "translations" / "glossary.csv").write_text(text, "utf-8")
    with pytest.raises(TranslationError, match=sentence):
        commands.check(small)


def test_the_messages_of_programs_are_what_they_say_and_what_cells_and_tables_show(small):
    assert [m.text for m in program_messages(small)] == ["good", "epoch", "Two curves."]
    assert list(default_texts("def f(a, *, title='T', ylabel='Y', colour='C', xlabel=None): pass")) == ["T", "Y"]
    assert list(default_texts("")) == []
    names = [
        "size MB", "card_lost", "fees", "student fp32", "base zero-shot", "fp32", "JSON", "of &amp; more",
        "llama.cpp, 4 bits", "", "7",
    ]  # fmt: skip
    table = "".join(f"<tr><th scope='row'>{name}</th><td>words</td></tr>" for name in names)
    assert list(table_names(table)) == ["size MB", "of & more", "llama.cpp, 4 bits"]
    assert list(table_names("")) == []


def test_the_metadata_is_that_of_co_op_translator(small):
    stored = json.loads((small / "translations" / "hi" / coop.FILE).read_text("utf-8"))
    assert set(stored) == {"README.md", "notebooks/01_one.ipynb"}
    assert stored["README.md"] == {
        "original_hash": hashlib.md5(README.encode()).hexdigest(), "translation_date": "", "source_file": "README.md",
        "language_code": "hi",
    }  # fmt: skip


@pytest.fixture
def review():
    """Co-op Translator's review command. It asks for an older openai than ours, so it lives in an environment of its own."""
    python = Path(os.environ.get("SLMOPS_COOP") or ROOT / ".venv" / "co-op") / "bin" / "python"
    if not python.is_file():
        pytest.skip(
            "Co-op Translator is not here, and cannot be installed beside the course's openai: `make test` makes an "
            "environment of its own for it in .venv/co-op (660 MB)."
        )
    # Its console script's first line cannot hold a path with a space.
    start = "import sys; sys.argv[0] = 'co-op-review'; from co_op_translator.__main__ import main; main()"

    def run(root: Path, languages: str = "hi"):
        documents = ["--include", "README.md", "--include", "notebooks/*.ipynb"]
        command = [python, "-c", start, "-r", root, *documents, "-l", languages, "--format", "json"]
        done = subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=300)
        return done.returncode, json.loads(done.stdout[done.stdout.index("{") :])

    return run


def test_the_outside_review_command_passes_and_sees_what_is_stale(review, small):
    code, summary = review(small)
    assert (code, summary["issues"]) == (0, [])
    (small / "README.md").write_text(README + "\nMore.\n", "utf-8")
    code, summary = review(small)
    assert code == 1
    assert {issue["check"] for issue in summary["issues"]} >= {"freshness"}


def test_the_command_line_leads_through_all_of_it(small):
    def slmops(*arguments):
        command = [sys.executable, "-m", "slmops_course.cli", "translate", *arguments]
        # The small course has a folder of the package's name: the package itself comes first.
        environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONSAFEPATH": "1"}
        return subprocess.run(command, capture_output=True, text=True, cwd=small, env=environment, timeout=120)

    done = slmops("check")
    assert (done.returncode, done.stdout) == (0, "Nothing is wrong.\n"), done.stderr
    (small / "pins.txt").unlink()
    done = slmops("check", "hi")
    assert done.returncode == 1
    assert "has a link to '../../pins.txt'" in done.stdout
    assert "There is no language 'xx'" in slmops("status", "xx").stderr


# --- The real course ---


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    """The course's own texts with catalogues brought up to them, in a folder of their own."""
    root = tmp_path_factory.mktemp("real")
    shutil.copy(ROOT / "README.md", root)
    shutil.copytree(ROOT / "translations", root / "translations")
    shutil.copytree(ROOT / "notebooks", root / "notebooks", ignore=shutil.ignore_patterns(".*"))
    shutil.copytree(ROOT / "slmops_course", root / "slmops_course", ignore=shutil.ignore_patterns("data", "__pycache__"))
    commands.extract(root)
    return root


def test_the_course_has_four_languages_and_an_agreed_word_for_every_term(real):
    assert find_languages(real) == LANGUAGES
    for code in LANGUAGES:
        terms = pages.read_glossary(real, code)
        assert len(terms) >= 60
        assert [term.english for term in terms if not (term.keep or term.forms)] == []
        language = read_language(real, code)
        for form in (form for term in terms for form in term.forms):
            assert list(pages.check_pair(pages.Pair("x" * len(form), form, language))) == [], form


def test_every_sentence_of_the_settings_is_in_the_language(real):
    for code in LANGUAGES:
        language = read_language(real, code)
        for sentence in (language.not_translated, language.outdated, language.review_machine, language.original):
            assert [name for name, _ in pages.check_pair(pages.Pair("y" * len(sentence), sentence, language))] == []
        assert "{reviewer}" in language.review_native


def test_all_english_prose_is_in_the_catalogues_and_cells_without_a_translation_are_marked(real):
    language = read_language(real, "hi")
    for document in find_documents(real):
        messages = read_messages(real / document)
        text = pages.render_document(real, language, document)
        if document.suffix == ".ipynb":
            english, notebook = nbformat.read(real / document, as_version=4), nbformat.reads(text, as_version=4)
            nbformat.validate(notebook)
            code = [[c for c in one.cells if c.cell_type == "code"] for one in (english, notebook)]
            assert [(c.id, c.source, c.metadata.get("tags")) for c in code[0]] == [
                (c.id, c.source, c.metadata.get("tags")) for c in code[1]
            ]
        catalog = read_catalog(catalog_path(real, "hi", document.stem))
        untranslated = sum(not entry.msgstr or entry.fuzzy for entry in catalog if not entry.obsolete)
        assert text.count("⚠ ") >= untranslated
        assert len(messages) == len([entry for entry in catalog if not entry.obsolete]) > 20
        assert pages.render_document(real, language, document) == text


def test_the_english_passes_its_own_structure_checks(real):
    """Whatever is written in English must be kept by a translation that keeps it: the checks find no fault in a copy."""
    language = read_language(real, "hi")
    for document in find_documents(real):
        for message in read_messages(real / document):
            wrong = {name for name, _ in pages.check_pair(pages.Pair(message.text, message.text, language))}
            assert wrong <= {"untranslated", "leftover English"}, (document, message.context)


def test_nothing_is_missing_stale_or_wrong_in_any_language():
    rows = list(commands.status(ROOT))
    assert {code for code, _, _ in rows} == set(LANGUAGES)
    assert [(code, name) for code, name, one in rows if one.share < 1] == []
    assert [str(problem) for problem in commands.check(ROOT)] == []


def test_the_outside_review_command_finds_the_translations_fresh_and_whole(review):
    code, summary = review(ROOT, " ".join(LANGUAGES))
    assert (code, summary["status"], summary["counts"]["errors"]) == (0, "passed", 0)
    # It warns of formulas and commands that are the same in every language; prose that is, the checks above find.
    assert {issue["check"] for issue in summary["issues"]} <= {"suspicious-untranslated-prose"}
