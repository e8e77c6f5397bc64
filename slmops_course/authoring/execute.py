"""Executing the chapters by papermill from clean kernels, with a progress line per section."""

import json
import time
from pathlib import Path

import nbformat
import papermill
from papermill.engines import NBClientEngine, papermill_engines
from papermill.exceptions import PapermillExecutionError

from slmops_course.benchmark import MemoryWatch
from slmops_course.errors import CourseError
from slmops_course.language import ENGLISH, current

CHAPTERS = ("01_introduction", "02_distillation", "03_fine_tuning", "04_foundry_local")
NOTEBOOKS = Path("notebooks")
TRANSLATIONS = Path("translations")


class ChapterError(CourseError):
    """A chapter that is unknown, was given an unknown parameter, or failed."""


class SectionEngine(NBClientEngine):
    """Papermill's own engine, which prints each `##` heading when its first code cell starts."""

    @classmethod
    def execute_managed_notebook(cls, nb_man, kernel_name, **options):
        headings = section_headings(nb_man.nb)
        start_cell = nb_man.cell_start

        def announce(cell, cell_index=None, **more):
            if cell_index in headings:
                print(f"    {headings[cell_index]}", flush=True)
            return start_cell(cell, cell_index, **more)

        nb_man.cell_start = announce
        return super().execute_managed_notebook(nb_man, kernel_name, **options)


papermill_engines.register("sections", SectionEngine)


def section_headings(notebook) -> dict[int, str]:
    """For each `##` heading of a notebook: the index of the first code cell below it, and the heading's text."""
    headings, waiting = {}, None
    for index, cell in enumerate(notebook.cells):
        if cell.cell_type == "markdown":
            lines = [line[3:].strip() for line in cell.source.splitlines() if line.startswith("## ")]
            waiting = lines[-1] if lines else waiting
        elif waiting:
            headings[index], waiting = waiting, None
    return headings


def check_parameters(path: Path, parameters: dict) -> None:
    """Raise ChapterError for a parameter the notebook's parameters cell does not have: papermill would only warn."""
    known = papermill.inspect_notebook(str(path))
    unknown = [name for name in parameters if name not in known]
    if unknown:
        raise ChapterError(
            f"{path.name} has no parameter {unknown[0]!r}: expected one of {', '.join(sorted(known))}; check the spelling."
        )


def execute_chapter(path: Path, output: Path, *, parameters: dict | None = None) -> dict:
    """Execute one notebook in its own folder; returns its duration (s) and the peak memory of its processes (bytes).

    Raises ChapterError, naming the notebook with the outputs up to the failure, when a cell fails.
    """
    check_parameters(path, parameters or {})
    output.parent.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    with MemoryWatch(children=True, interval_s=0.1) as watch:
        try:
            papermill.execute_notebook(
                str(path), str(output), parameters=parameters or {}, engine_name="sections", cwd=str(path.parent),
                kernel_name="python3", progress_bar=False, extra_arguments=["--IPKernelApp.log_level=ERROR"],
            )  # fmt: skip
        except PapermillExecutionError as error:
            raise ChapterError(
                f"{path.name} failed ({error.ename}: {error.evalue}): expected every cell to run; see {output}."
            ) from error
    return {"duration_s": round(time.perf_counter() - start, 1), "peak_bytes": watch.peak_children_bytes}


def execute_chapters(names: list[str], build: Path, *, parameters: dict, save: bool = False) -> None:
    """Execute chapters, print what each took, and keep the figures in `benchmark.json` under `build`.

    In another language than English they are the translated ones, executed into a folder of their language; only English ones
    can be saved, because the translated ones are rendered.
    """
    unknown = [name for name in names if name not in CHAPTERS]
    if unknown:
        raise ChapterError(f"There is no chapter {unknown[0]!r}: expected one of {', '.join(CHAPTERS)}.")
    language = current()
    folder = NOTEBOOKS if language == ENGLISH else TRANSLATIONS / language / NOTEBOOKS
    if save and language != ENGLISH:
        raise ChapterError(f"{folder} is rendered: expected --save for English only; see `slmops translate render --executed`.")
    out = build / "chapters" / ("" if language == ENGLISH else language)
    for name in names or CHAPTERS:
        check_parameters(folder / f"{name}.ipynb", parameters)
    figures = {}
    for name in names or CHAPTERS:
        print(f"{name}", flush=True)
        figures[name] = execute_chapter(folder / f"{name}.ipynb", out / f"{name}.ipynb", parameters=parameters)
        print(
            f"    done in {figures[name]['duration_s']:.0f} s, peak memory {figures[name]['peak_bytes'] / 1e9:.2f} GB",
            flush=True,
        )
        if save:
            nbformat.write(clean(nbformat.read(out / f"{name}.ipynb", as_version=4)), folder / f"{name}.ipynb")
    total = sum(figure["duration_s"] for figure in figures.values())
    peak = max(figure["peak_bytes"] for figure in figures.values())
    print(f"all chapters: {total / 60:.1f} minutes, peak memory {peak / 1e9:.2f} GB", flush=True)
    if language == ENGLISH:
        path = build / "benchmark.json"
        earlier = json.loads(path.read_text("utf-8")) if path.is_file() else {}
        path.write_text(json.dumps(earlier | figures, indent=1, sort_keys=True), "utf-8")


def clean(notebook):
    """Take papermill's marks, and times, out of an executed notebook, so that it can be committed."""
    notebook.metadata.pop("papermill", None)
    notebook.metadata.get("language_info", {}).pop("version", None)
    notebook.cells = [c for c in notebook.cells if "injected-parameters" not in c.metadata.get("tags", [])]
    for cell in notebook.cells:
        for mark in ("papermill", "execution", "execution_start_time"):
            cell.metadata.pop(mark, None)
    return notebook
