"""The pages to read: every document in every language, each leading to the others."""

import re
import shutil
from pathlib import Path

import nbformat
import pytest

from slmops_course.authoring.site import page_of, write_site
from slmops_course.errors import CourseError

ROOT = Path(__file__).parent.parent
TEXTS = {"": ("# Course", "# One"), "translations/hi/": ("# पाठ्यक्रम", "# एक")}


@pytest.fixture
def small(tmp_path):
    """A course of a README and a notebook, in English and Hindi."""
    for place, (readme, chapter) in TEXTS.items():
        folder = tmp_path / place / "notebooks"
        folder.mkdir(parents=True)
        up = "../../" if place else ""
        folder.with_name("README.md").write_text(
            f"{readme}\n\n[a](notebooks/01_one.ipynb), [b]({up}pins.txt), [c](https://example.org), [d](nowhere.md)\n", "utf-8"
        )
        cells = [nbformat.v4.new_markdown_cell(chapter), nbformat.v4.new_code_cell("1 + 1")]
        nbformat.write(nbformat.v4.new_notebook(cells=cells), folder / "01_one.ipynb")
    (tmp_path / "pins.txt").write_text("a==1\n", "utf-8")
    shutil.copy(ROOT / "translations" / "hi" / "language.toml", tmp_path / "translations" / "hi")
    return tmp_path


def links(page: Path) -> dict[str, str]:
    """The targets of a page's links, by their text."""
    return {text: target for target, text in re.findall(r'<a[^>]*href="([^"]*)"[^>]*>([^<]+)</a>', page.read_text("utf-8"))}


def test_every_document_is_a_page_in_every_language_and_leads_to_the_others(small):
    pages = write_site(small, small / "build" / "site")
    assert [page.relative_to(small / "build" / "site").as_posix() for page in pages] == [
        "index.html", "notebooks/01_one.html", "hi/index.html", "hi/notebooks/01_one.html",
    ]  # fmt: skip
    for page in pages:
        found = links(page)
        code, title = ("hi", "एक") if "hi" in page.parts else ("en", "One")
        assert f'<html lang="{code}">' in page.read_text("utf-8")
        if page.name == "index.html":
            assert (page.parent / found[title]).resolve() == (page.parent / "notebooks" / "01_one.html").resolve()
        other = "English" if code == "hi" else "हिन्दी"
        place = small / "build" / "site" / page_of("en" if code == "hi" else "hi", _document(page))
        assert (page.parent / found[other]).resolve() == place.resolve()
    assert "<title>एक</title>" in pages[3].read_text("utf-8")


def _document(page: Path) -> Path:
    return Path("README.md") if page.name == "index.html" else Path("notebooks") / page.with_suffix(".ipynb").name


def test_links_lead_to_pages_to_files_of_the_course_and_out(small):
    for page in write_site(small, small / "build" / "site")[::2]:
        found = links(page)
        assert found["a"] == "notebooks/01_one.html"
        assert (page.parent / found["b"]).resolve() == (small / "pins.txt").resolve()
        assert (found["c"], found["d"]) == ("https://example.org", "nowhere.md")


def test_a_folder_without_the_course_is_refused(tmp_path):
    with pytest.raises(CourseError, match=r"no README\.md here: expected the course's folder"):
        write_site(tmp_path, tmp_path / "site")
