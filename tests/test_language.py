"""The reader's language is found, spoken, and drawn; what has no translation stays English."""

import os
import subprocess
import sys
from pathlib import Path

import polib
import pytest

from slmops_course import language, plots, report
from slmops_course.language import (
    LanguageError,
    _,
    available,
    choose,
    current,
    jupyterlab_settings,
    read_jupyterlab_locale,
    use,
)

HINDI = {"epoch": "एपॉक", "frontier": "सीमा", "Two bars.": "दो पट्टियाँ।", "size MB": "आकार MB", "name": "नाम"}


@pytest.fixture
def catalogs(tmp_path):
    """A folder with a few Hindi messages, and a fuzzy one, as gettext reads them."""
    catalog = polib.POFile()
    catalog.metadata = {"Language": "hi", "Content-Type": "text/plain; charset=UTF-8"}
    catalog.extend(polib.POEntry(msgid=english, msgstr=hindi) for english, hindi in HINDI.items())
    catalog.append(polib.POEntry(msgid="this model", msgstr="पुराना", flags=["fuzzy"]))
    path = tmp_path / "hi" / "LC_MESSAGES" / "slmops.mo"
    path.parent.mkdir(parents=True)
    path.write_bytes(catalog.to_binary())
    return tmp_path


@pytest.fixture
def hindi(catalogs):
    before = list(language._in_use)
    use("hi", folder=catalogs)
    yield
    language._in_use[:] = before


def test_a_message_is_in_the_readers_language_and_english_where_it_has_no_sound_translation(hindi):
    assert (_("epoch"), _("no such message"), _("")) == ("एपॉक", "no such message", "")
    assert _("this model") == "this model", "a fuzzy translation was shown"


def test_english_needs_no_catalogue(catalogs, hindi):
    use("en", folder=catalogs)
    assert (_("epoch"), current()) == ("epoch", "en")


def test_a_language_that_is_not_there_is_refused_with_those_that_are(catalogs):
    assert available(catalogs) == ["en", "hi"]
    with pytest.raises(LanguageError, match=r"no translation into 'xx': expected one of en, hi"):
        use("xx", folder=catalogs)


@pytest.mark.parametrize(
    ("variable", "setting", "expected"),
    [
        ("hi", None, "hi"), ("ne_NP.UTF-8", None, "ne"), ("mr-IN", "hi_IN", "mr"), ("", "hi_IN", "hi"), ("", "default", "en"),
        ("", "xx_XX", "en"), ("", None, "en"), ("", "broken", "en"),
    ],
)  # fmt: skip
def test_the_variable_comes_before_jupyterlab_and_both_before_english(catalogs, tmp_path, variable, setting, expected):
    file = tmp_path / "settings" / language.JUPYTERLAB_SETTING
    file.parent.mkdir(parents=True)
    if setting:
        file.write_text("{" if setting == "broken" else f'{{\n // Language\n "locale": "{setting}",\n}}', "utf-8")
    assert choose({"SLMOPS_LANG": variable}, tmp_path / "settings", folder=catalogs) == expected


def test_a_translated_notebook_speaks_its_language_unless_the_variable_says_another(catalogs):
    place = Path("/course/translations/hi/notebooks")
    assert choose({}, None, place=place, folder=catalogs) == "hi"
    assert choose({"SLMOPS_LANG": "en"}, None, place=place, folder=catalogs) == "en"
    for other in ("/course/translations/xx/notebooks", "/course/notebooks", "/translations/hi", "/"):
        assert choose({}, None, place=Path(other), folder=catalogs) == "en", other


def test_jupyterlabs_settings_are_read_only_in_a_kernel_that_a_server_started(tmp_path):
    assert jupyterlab_settings({"JUPYTERLAB_SETTINGS_DIR": str(tmp_path)}) is None
    assert jupyterlab_settings({"JUPYTERLAB_SETTINGS_DIR": str(tmp_path), "JPY_SESSION_NAME": "a.ipynb"}) == tmp_path
    assert jupyterlab_settings({"JPY_PARENT_PID": "7"}).parts[-2:] == ("lab", "user-settings")
    assert read_jupyterlab_locale(tmp_path) == ""


def test_figures_and_tables_speak_it(hindi):
    figure = plots.plot_losses({"teacher": [{"epoch": 1, "loss": 2.0}]}, title="No translation")
    (axes,) = figure.axes
    assert (axes.get_xlabel(), axes.get_title()) == ("एपॉक", "No translation")
    score = {"value": 0.5, "low": 0.4, "high": 0.6}
    row = {"name": "student", "size_bytes": 1e6, "memory_bytes": 1e6, "time_to_first_token_s": 0.1, "latency_s": 0.1,
           "output_tokens_per_s": 9, "scores": {"exact_match": score, "json_valid": score}}  # fmt: skip
    frame = report.scoreboard_frame([row])
    assert frame.loc["student", "आकार MB"] == "1"
    assert frame.index.name == "नाम"
    assert report.markdown_scoreboard([row]).startswith("| name |"), "the README's own table is English"


def test_alternative_text_is_translated_and_fonts_of_its_script_are_tried(hindi):
    figure, axes = plots.new_figure("student", "epoch", "MB")
    axes.set_xlabel("MB")  # this machine may have no font for the other scripts, and a missing letter is a warning
    assert 'alt="दो पट्टियाँ।"' in plots.image_html(figure, "Two bars.")
    there = set().union(*language.SCRIPT_FONTS.values()) & plots.font_families()
    assert set(axes.title.get_fontfamily()) >= there
    assert axes.title.get_fontfamily()[0] == "sans-serif"


def test_fonts_in_the_environment_are_found(tmp_path):
    import matplotlib
    from fontTools.ttLib import TTFont

    font = TTFont(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "cmr10.ttf")
    for record in font["name"].names:
        record.string = "Course Test"
    font.save(tmp_path / "renamed.ttf")
    assert "Course Test" not in plots.font_families(tmp_path / "nowhere")
    assert "Course Test" in plots.font_families(tmp_path)


def test_the_command_line_says_in_one_sentence_that_a_language_is_not_there(tmp_path):
    command = [sys.executable, "-m", "slmops_course.cli", "--lang", "xx", "registry", "list"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=os.environ | {"SLMOPS_LANG": ""})
    assert done.returncode == 1
    assert done.stderr.startswith("slmops: There is no translation into 'xx': expected one of en")
    assert len(done.stderr.splitlines()) == 1
