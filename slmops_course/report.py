"""The scoreboard as text, as Markdown and as a self-contained web page with the executed chapters linked."""

import html
from collections.abc import Sequence
from datetime import date
from pathlib import Path

from slmops_course.language import _, marked

COLUMNS = (
    (marked("name"), 22), (marked("exact match [95 %]"), 22), ("JSON", 6), (marked("out of scope"), 13), (marked("size MB"), 8),
    (marked("memory MB"), 10), (marked("first token ms"), 15), (marked("tokens/s"), 9), (marked("message ms"), 10),
)  # fmt: skip


def table_rows(rows: Sequence[dict]) -> list[list[str]]:
    """The scoreboard's cells as text, one list a model, in the order of COLUMNS."""
    cells = []
    for row in rows:
        scores = row["scores"]
        exact = scores["exact_match"]
        outside = scores.get("out_of_scope")
        cells.append(
            [
                row["name"],
                f"{exact['value']:.1%} [{exact['low']:.1%}, {exact['high']:.1%}]",
                f"{scores['json_valid']['value']:.0%}",
                f"{outside['value']:.0%}" if outside else "-",
                f"{row['size_bytes'] / 1e6:.0f}",
                f"{row['memory_bytes'] / 1e6:.0f}",
                f"{row['time_to_first_token_s'] * 1e3:.0f}",
                f"{row['output_tokens_per_s']:.0f}",
                f"{row['latency_s'] * 1e3:.0f}",
            ]
        )
    return cells


def format_scoreboard(rows: Sequence[dict], *, header: bool = True) -> str:
    """The scoreboard for a terminal."""
    lines = [[title for title, width in COLUMNS]] * header + table_rows(rows)
    widths = [width for title, width in COLUMNS]
    return "\n".join(
        "".join(
            cell.ljust(width + 1) if number == 0 else cell.rjust(width + 1)
            for number, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    )


def scoreboard_frame(rows: Sequence[dict]):
    """The scoreboard as a pandas DataFrame of texts, for a notebook, its columns named in the reader's language."""
    import pandas

    return pandas.DataFrame(table_rows(rows), columns=[_(title) for title, width in COLUMNS]).set_index(_("name"))


def markdown_scoreboard(rows: Sequence[dict]) -> str:
    """The scoreboard as a Markdown table, for the README."""
    lines = [[title for title, width in COLUMNS], ["---"] + ["---:"] * (len(COLUMNS) - 1), *table_rows(rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def write_report(build: Path, course, rows: Sequence[dict]) -> Path:
    """Write `report.html` under the build folder, and each executed chapter as a page beside it; returns its path."""
    links = "".join(f'<li><a href="chapters/{page.name}">{page.stem}</a></li>' for page in _chapter_pages(build))
    body = "".join("<tr>" + "".join(f"<td>{html.escape(c)}</td>" for c in line) + "</tr>" for line in table_rows(rows))
    head = "".join(f"<th>{html.escape(_(title))}</th>" for title, width in COLUMNS)
    figure = scoreboard_svg(rows)
    page = _PAGE.format(
        task=html.escape(course.task.name), profile=course.profile_name, day=date.today().isoformat(),
        messages=max(row["messages"] for row in rows), head=head, body=body, figure=figure,
        chapters=f"<h2>Chapters</h2><ul>{links}</ul>" if links else "",
    )  # fmt: skip
    build.mkdir(parents=True, exist_ok=True)
    path = build / "report.html"
    path.write_text(page, "utf-8")
    (build / "scoreboard.md").write_text(markdown_scoreboard(rows) + "\n", "utf-8")
    return path


def scoreboard_svg(rows: Sequence[dict]) -> str:
    """Score against size for every model, as SVG text."""
    import io

    from slmops_course.plots import plot_size_against_score, use_fonts

    buffer = io.StringIO()
    figure = plot_size_against_score(rows)
    use_fonts(figure)
    figure.savefig(buffer, format="svg", bbox_inches="tight")
    return buffer.getvalue().partition("<svg")[1] + buffer.getvalue().partition("<svg")[2]


def _chapter_pages(build: Path) -> list[Path]:
    """Render each executed notebook that is there to HTML."""
    pages = []
    for notebook in sorted((build / "chapters").glob("*.ipynb")):
        from nbconvert import HTMLExporter

        text, _ = HTMLExporter(embed_images=True).from_filename(str(notebook))
        page = notebook.with_suffix(".html")
        page.write_text(text, "utf-8")
        pages.append(page)
    return pages


_PAGE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>SLMOps Course: report</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 80rem; margin: 2rem auto; padding: 0 1rem; color: #222; }}
.wide {{ overflow-x: auto; }}
table {{ border-collapse: collapse; font-variant-numeric: tabular-nums; }}
th, td {{ padding: .35rem .7rem; text-align: right; border-bottom: 1px solid #ddd; white-space: nowrap; }}
th:first-child, td:first-child {{ text-align: left; }}
svg {{ max-width: 100%; height: auto; }}
</style></head><body>
<h1>SLMOps Course: report</h1>
<p>Task <b>{task}</b>, profile <b>{profile}</b>, measured on this machine, page written on {day}. Scores are on up to
{messages} test messages; brackets hold the 95&nbsp;% bootstrap interval. Memory is what the model adds to its process.
Times are medians, one message at a time.</p>
<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>
{figure}
{chapters}
</body></html>
"""
