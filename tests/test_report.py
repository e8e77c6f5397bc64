"""The scoreboard as text, Markdown and a page; the figures."""

from types import SimpleNamespace

import pytest

from slmops_course import plots
from slmops_course.evaluation import Score
from slmops_course.report import COLUMNS, format_scoreboard, markdown_scoreboard, scoreboard_frame, write_report
from slmops_course.textmetrics import calibration


def row(name: str, value: float, size: int) -> dict:
    share = {"value": value, "low": max(0.0, value - 0.1), "high": min(1.0, value + 0.1), "count": 20}
    return {
        "name": name, "messages": 20, "scores": {"exact_match": share, "json_valid": share | {"value": 1.0}},
        "size_bytes": size, "memory_bytes": 2 * size, "process_bytes": 3 * size, "time_to_first_token_s": 0.125,
        "output_tokens_per_s": 80.4, "latency_s": 0.5,
    }  # fmt: skip


@pytest.fixture
def rows():
    return [row("teacher <b>", 0.9, 538_000_000), row("student int4", 0.85, 38_000_000)]


def test_a_row_shows_score_interval_size_and_times(rows):
    header, first, _ = format_scoreboard(rows).splitlines()
    assert header.startswith("name")
    assert "90.0% [80.0%, 100.0%]" in first
    assert first.split()[-5:] == ["538", "1076", "125", "80", "500"]


def test_a_task_without_out_of_scope_messages_shows_a_dash(rows):
    assert scoreboard_frame(rows).loc["student int4", "out of scope"] == "-"


def test_the_markdown_table_has_a_cell_for_every_column(rows):
    lines = markdown_scoreboard(rows).splitlines()
    assert len(lines) == 4
    assert {line.count("|") for line in lines} == {len(COLUMNS) + 1}


def test_the_page_is_self_contained_and_escapes_names(rows, tmp_path):
    course = SimpleNamespace(task=SimpleNamespace(name="desk"), profile_name="fast")
    page = write_report(tmp_path, course, rows).read_text("utf-8")
    assert "teacher &lt;b&gt;" in page
    assert "teacher <b>" not in page.replace("<!--", "")
    assert "<svg" in page
    assert "http://" not in page.split("<svg")[0]
    assert (tmp_path / "scoreboard.md").exists()


def test_executed_chapters_are_rendered_and_linked(rows, tmp_path):
    import nbformat

    (tmp_path / "chapters").mkdir()
    nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell("# A chapter")])
    nbformat.write(nb, tmp_path / "chapters" / "01_a.ipynb")
    course = SimpleNamespace(task=SimpleNamespace(name="desk"), profile_name="fast")
    assert 'href="chapters/01_a.html"' in write_report(tmp_path, course, rows).read_text("utf-8")
    assert "A chapter" in (tmp_path / "chapters" / "01_a.html").read_text("utf-8")


def figures(rows):
    history = [{"epoch": i / 10, "loss": 1 / (i + 1)} for i in range(20)]
    return {
        "size": plots.plot_size_against_score(rows, with_frontier=True),
        "losses": plots.plot_losses({"a": history, "b": history}, title="Loss"),
        "scores": plots.plot_scores({"a": Score(0.5, 0.5, 0.5, 4)}, title="Scores"),
        "bars": plots.plot_bars({"a": 1.0, "b": 2.0}, title="Bars", xlabel="MB"),
        "reliability": plots.plot_reliability(calibration([0.2, 0.9, 0.9], [False, True, True]), title="Reliability"),
        "lines": plots.plot_lines({"a": ([1, 2], [3, 4])}, title="Lines", xlabel="x (s)", ylabel="y (MB)"),
    }


def test_every_figure_has_a_title_and_a_labelled_axis(rows):
    for name, figure in figures(rows).items():
        (axes,) = figure.axes
        assert axes.get_title(), name
        assert axes.get_xlabel(), name


def test_a_figure_as_html_carries_its_alternative_text():
    text = plots.image_html(plots.plot_bars({"a": 1.0}, title="Bars", xlabel="MB"), 'Bars with "quotes"')
    assert 'alt="Bars with &quot;quotes&quot;"' in text
    assert "data:image/png;base64,iVBOR" in text


def test_the_frontier_holds_what_no_smaller_model_beats():
    rows = [
        {"name": name, "size_bytes": size, "scores": {"exact_match": {"value": value}}}
        for name, size, value in (("c", 3, 0.6), ("a", 1, 0.5), ("b", 2, 0.4), ("d", 3, 0.7), ("e", 4, 0.7))
    ]
    assert [row["name"] for row in plots.frontier(rows)] == ["a", "d"]
    assert plots.frontier([]) == []
