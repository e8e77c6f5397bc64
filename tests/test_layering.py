"""A stage imports only stages before it, and importing costs next to nothing."""

import ast
import subprocess
import sys
import time
from pathlib import Path

PACKAGE = Path(__file__).parent.parent / "slmops_course"

# From the first stage to what joins them. A module may import those above it.
ORDER = (
    "errors", "language", "cells", "sampling", "network", "artifacts", "sources", "models", "chat", "tasks", "training",
    "losses", "evaluation", "textmetrics", "teachers", "endpoints", "rehearsal", "validation", "filters", "general",
    "students", "parallel", "adapters", "heads", "olive", "optimize", "sensitivity", "serving", "switching", "benchmark",
    "sizing", "tuning", "profiles", "pipeline", "plots", "report", "doctor", "operations", "operations.gate",
    "operations.bundles", "operations.lineage", "operations.versions", "operations.book", "operations.registry",
    "operations.monitoring", "operations.drift", "operations.alerts", "operations.masking", "operations.feedback",
    "operations.retraining", "operations.release", "operations.requests", "operations.streams", "operations.upstream",
    "operations.gateway", "operations.served", "operations.overhead", "faults", "faults.course", "faults.stages",
    "faults.stores", "faults.clients", "faults.storms", "soak", "operations.offers", "operations.publisher",
    "operations.updates", "operations.attacks", "operations.rollout", "operations.fleet", "operations.loop", "cloud",
    "cloud.definition", "cloud.steps", "cloud.labelling", "cloud.entry", "cloud.checks", "cloud.environment", "cloud.local",
    "cloud.cost", "cloud.submit", "cloud.managed", "cloud.scoring", "cloud.toy", "cloud.commands", "experiments.students",
    "experiments.labelling", "experiments.methods", "experiments.desks", "experiments.formats", "experiments.speed",
    "experiments", "runtimes.worker", "runtimes.environments", "runtimes.llama_cpp", "runtimes.mlx", "runtimes.executorch",
    "runtimes.litert", "runtimes", "runtimes.comparison", "authoring.execute", "authoring.translate",
    "authoring.translate.languages", "authoring.translate.markup", "authoring.translate.documents",
    "authoring.translate.catalogs", "authoring.translate.render", "authoring.translate.programs", "authoring.translate.coop",
    "authoring.translate.glossary", "authoring.translate.checks", "authoring.translate.pages", "authoring.translate.commands",
    "authoring.site", "authoring", "cli",
)  # fmt: skip
HEAVY = {
    "torch", "transformers", "onnxruntime_genai", "matplotlib", "pandas", "olive", "mlflow", "sqlalchemy", "tuf", "simpy",
    "uvicorn", "starlette", "azure",
}  # fmt: skip


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


def stage_files() -> list[Path]:
    """The package's modules. Workers are programs of their own for other environments: nobody imports them."""
    return [path for path in PACKAGE.rglob("*.py") if path.parent.name != "workers"]


def imported_stages(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("slmops_course"):
            stem = node.module.removeprefix("slmops_course").lstrip(".")
            found |= {stem} if stem else {alias.name for alias in node.names}
    return {name for name in found if name in ORDER}


def test_every_module_has_its_place_in_the_order():
    names = {module_name(path) for path in stage_files()} - {""}
    assert names == set(ORDER)


def test_a_stage_imports_only_stages_before_it():
    wrong = [
        f"{module_name(path)} imports {stage}"
        for path in stage_files()
        for stage in imported_stages(path)
        if module_name(path) and ORDER.index(stage) >= ORDER.index(module_name(path))
    ]
    assert wrong == []


def test_importing_the_package_and_its_stages_loads_nothing_heavy():
    stages = ", ".join(f"slmops_course.{name}" for name in ORDER if not name.startswith("authoring"))
    code = f"import sys, {stages}; print(sorted({HEAVY!r} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def best_of(command: list[str], runs: int = 5) -> float:
    times = []
    for _ in range(runs):
        start = time.perf_counter()
        subprocess.run(command, check=True, capture_output=True)
        times.append(time.perf_counter() - start)
    return min(times)


def test_the_package_imports_and_the_help_answers_in_an_instant():
    """The goals are 0.1 s and 0.3 s on a quiet machine; bare Python's own start is taken off, and the best of five counts."""
    bare = best_of([sys.executable, "-c", "pass"])
    assert best_of([sys.executable, "-c", "import slmops_course"]) - bare < 0.1
    assert best_of([sys.executable, "-m", "slmops_course.cli", "--help"]) - bare < 0.3
