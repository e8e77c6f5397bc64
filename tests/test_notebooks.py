"""The chapters: their form, and that they run. nbval compares the cells marked NBVAL_CHECK_OUTPUT."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import papermill
import pytest

from slmops_course.authoring.execute import CHAPTERS, ChapterError, check_parameters, clean, execute_chapter, section_headings

ROOT = Path(__file__).parent.parent
NOTEBOOKS = ROOT / "notebooks"
PARAMETERS = {"ARTIFACTS", "TASK", "MODEL", "PROFILE"}


@pytest.fixture(params=CHAPTERS)
def chapter(request):
    return nbformat.read(NOTEBOOKS / f"{request.param}.ipynb", as_version=4)


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def output_text(notebook):
    return "".join(
        out.get("text", "") + str(out.get("data", {}).get("text/plain", ""))
        for cell in code_cells(notebook)
        for out in cell.outputs
    )


def test_a_chapter_is_valid_and_its_cell_ids_are_unique(chapter):
    nbformat.validate(chapter)
    ids = [cell.id for cell in chapter.cells]
    assert len(ids) == len(set(ids))


def test_a_chapter_has_one_parameters_cell_with_a_comment_a_line(chapter):
    (cell,) = [c for c in chapter.cells if "parameters" in c.metadata.get("tags", [])]
    lines = cell.source.strip().splitlines()
    assert {line.split(" = ")[0] for line in lines} == PARAMETERS
    assert all("  # " in line for line in lines)


def test_a_chapter_is_committed_with_outputs_and_without_litter(chapter):
    cells = [cell for cell in code_cells(chapter) if cell.source.strip()]
    assert all(cell.execution_count for cell in cells)
    outputs = [out for cell in cells for out in cell.outputs]
    assert not [out for out in outputs if out.output_type == "error" or out.get("name") == "stderr"]
    text = output_text(chapter)
    assert not re.search(r"(?:/home|/root|/tmp|/work|C:\\\\Users)/", text)
    assert "%|" not in text, "a progress bar"
    assert "Warning" not in text


def test_cells_are_short_and_follow_prose(chapter):
    kinds = [cell.cell_type for cell in chapter.cells]
    assert all(cell.source.count("\n") < 25 for cell in code_cells(chapter))
    assert kinds.count("markdown") >= 0.8 * kinds.count("code")


def test_every_section_with_code_ends_with_an_assert_that_teaches(chapter):
    asserts = [
        node for cell in code_cells(chapter) for node in ast.walk(ast.parse(re.sub(r"(?m)^[%!].*$", "", cell.source)))
        if isinstance(node, ast.Assert)
    ]  # fmt: skip
    assert len(asserts) >= 4
    assert all(node.msg is not None for node in asserts)


def test_a_chapter_has_marked_cells_for_nbval(chapter):
    assert sum("NBVAL_CHECK_OUTPUT" in cell.source for cell in code_cells(chapter)) >= 3


def test_figures_carry_alternative_text(chapter):
    for cell in code_cells(chapter):
        for out in cell.outputs:
            data = out.get("data", {})
            if "text/html" in data and "<img" in data["text/html"]:
                assert re.search(r'<img alt="[^"]{30,}"', data["text/html"])
            assert "image/png" not in data, "shown without alternative text: use plots.show"


def test_links_between_chapters_lead_somewhere(chapter):
    for cell in chapter.cells:
        if cell.cell_type == "markdown":
            for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", cell.source):
                assert (NOTEBOOKS / target).exists(), target


def test_section_headings_point_at_the_first_code_cell_below():
    nb = nbformat.v4.new_notebook(cells=[
        nbformat.v4.new_markdown_cell("# T\n\n## One"), nbformat.v4.new_markdown_cell("more"),
        nbformat.v4.new_code_cell("1"), nbformat.v4.new_code_cell("2"), nbformat.v4.new_markdown_cell("## Two"),
    ])  # fmt: skip
    assert section_headings(nb) == {2: "One"}


def test_papermill_knows_every_parameter_and_an_unknown_one_is_refused():
    path = NOTEBOOKS / f"{CHAPTERS[0]}.ipynb"
    assert set(papermill.inspect_notebook(str(path))) >= PARAMETERS
    with pytest.raises(ChapterError, match=r"has no parameter 'TASKS': expected one of"):
        check_parameters(path, {"TASKS": "x"})


def test_a_failing_cell_stops_the_chapter_and_names_the_output(tmp_path):
    nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("1 / 0")])
    nb.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
    nbformat.write(nb, tmp_path / "bad.ipynb")
    with pytest.raises(ChapterError, match=r"bad.ipynb failed \(ZeroDivisionError"):
        execute_chapter(tmp_path / "bad.ipynb", tmp_path / "out" / "bad.ipynb")


def test_cleaning_takes_times_out():
    nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("1")], metadata={"papermill": {"duration": 3}})
    nb.cells[0].metadata["papermill"] = {"start_time": "now"}
    cleaned = clean(nb)
    assert "papermill" not in cleaned.metadata
    assert "papermill" not in cleaned.cells[0].metadata


@pytest.mark.slow
@pytest.mark.parametrize("name", CHAPTERS)
def test_nbval_runs_the_chapter_and_finds_its_marked_outputs(name):
    """Builds what is missing in build/artifacts: many minutes the first time, about a minute when it is there."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--nbval-lax", "--nbval-cell-timeout=3000",
         f"notebooks/{name}.ipynb", "-W", "default", "-o", "addopts="],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-4000:]


def test_translated_chapters_are_executed_and_never_saved(tmp_path):
    command = [sys.executable, "-m", "slmops_course.cli", "--build", str(tmp_path), "--lang", "hi", "chapters", "--save"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 1
    assert "translations/hi/notebooks is rendered: expected --save for English only" in done.stderr
    assert list(tmp_path.iterdir()) == []


LANGUAGES = sorted(path.parent.name for path in (ROOT / "translations").glob("*/language.toml"))


@pytest.mark.slow
@pytest.mark.parametrize("name", CHAPTERS)
@pytest.mark.parametrize("language", LANGUAGES)
def test_a_translated_chapter_runs_and_prints_what_its_marked_cells_hold(language, name, tmp_path):
    """After the English ones, so that all artifacts are there."""
    rendered = ROOT / "translations" / language / "notebooks" / f"{name}.ipynb"
    execute_chapter(rendered, tmp_path / rendered.name)
    kept, ran = (nbformat.read(path, as_version=4) for path in (rendered, tmp_path / rendered.name))
    after = {cell.id: cell for cell in ran.cells}
    marked = [cell for cell in code_cells(kept) if "NBVAL_CHECK_OUTPUT" in cell.source]
    assert len(marked) >= 3
    for cell in marked:
        assert texts_of(after[cell.id]) == texts_of(cell), cell.id


def texts_of(cell) -> str:
    """What a cell prints and shows as plain text, as nbval compares it."""
    outputs = (out.get("text", "") or out.get("data", {}).get("text/plain", "") for out in cell.outputs)
    return "".join(outputs)
