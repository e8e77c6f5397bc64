"""Side experiments: too long for the fast path, so they are run once, and kept with when, where and from which seed.

An experiment is a function of a course that returns rows, plain JSON objects. The full profile runs it as one more step.
The fast one shows the figures that are kept beside the course's data, and says so.
"""

import inspect
import json
import platform
import time
from dataclasses import asdict, dataclass, replace
from datetime import date
from importlib import import_module
from pathlib import Path

from slmops_course import tasks, training, tuning
from slmops_course.doctor import count_cores, probe_cpu_features
from slmops_course.errors import CourseError
from slmops_course.evaluation import Score
from slmops_course.language import _

KEPT = tasks.DATA_FOLDER / "experiments"
# Where each experiment's function is, in a module of this folder.
EXPERIMENTS = {
    "luck": "students.measure_luck",
    "losses": "students.compare_losses",
    "temperatures": "students.sweep_temperature",
    "labels": "labelling.compare_labels",
    "methods": "methods.compare_methods",
    "contrastive": "methods.compare_contrastive",
    "shapes": "students.compare_shapes",
    "noise": "methods.compare_noise",
    "desks": "desks.desks",
    "speed": "speed.speed",
    "mixed": "formats.compare_mixed",
    "rounding": "formats.compare_rounding",
}
SEED = 0


class ExperimentError(CourseError):
    """There is no such experiment, or no figures of it."""


@dataclass(frozen=True)
class Record:
    """What an experiment found, and under which conditions."""

    name: str
    rows: list[dict]
    task: str
    model: str
    profile: str
    date: str
    machine: str  # its class: processor, cores, matrix units
    seed: int
    duration_s: float
    kept: bool = False  # measured earlier and kept with the course, not in this run

    @property
    def scores(self) -> dict[str, Score]:
        """Exact match by name, of the rows that have one."""
        return {row["name"]: Score(**row["exact_match"]) for row in self.rows if isinstance(row.get("exact_match"), dict)}

    @property
    def differences(self) -> dict[str, Score]:
        """How far each row's exact match is from the first one's, message by message: the value and its interval."""
        return {row["name"]: Score(**row["difference"]) for row in self.rows if row.get("difference")}

    def __str__(self):
        """One sentence for a reader: where the figures come from."""
        what = _("{task}, {model}, {machine}, seed {seed}, {minutes:.0f} minutes").format(
            task=self.task, model=self.model, machine=self.machine, seed=self.seed, minutes=self.duration_s / 60
        )
        if not self.kept:
            sentence = _("Measured with the profile {profile} on {date} ({what}).")
        else:
            sentence = _(
                "The fast profile skips this experiment. Its figures were measured on {date} ({what}); "
                "`slmops experiment {name}` measures them again."
            )
        return sentence.format(profile=self.profile, date=self.date, what=what, name=self.name)


def show(course, name: str) -> Record:
    """The record of an experiment, with a printed sentence on where it is from: the full profile measures it, the fast
    one reads what is kept.

    Raises ExperimentError for an unknown name.
    """
    record = run(course, name) if course.profile_name == "full" else load_kept(name)
    print(record)
    return record


def run(course, name: str) -> Record:
    """Carry out an experiment; its record is an artifact, so it is done once. Raises ExperimentError for an unknown name."""
    function = find(name)

    def write(folder: Path) -> None:
        start = time.perf_counter()
        rows = function(course)
        record = Record(
            name, rows, course.task.name, course.model_name, course.profile_name, date.today().isoformat(), machine_class(),
            SEED, round(time.perf_counter() - start, 1),
        )  # fmt: skip
        (folder / "record.json").write_text(json.dumps(asdict(record), indent=1), "utf-8")

    # Whatever is in the experiment's module may decide it, and so does the code that trains.
    here = inspect.getmembers(inspect.getmodule(function), lambda one: getattr(one, "__module__", "") == function.__module__)
    named = [one for _, one in here if inspect.isfunction(one) or inspect.isclass(one)]
    code = (*named, *tuning.deciding_code(shape=True, teaching=course.profile.teaching, lora=True))
    settings = {"profile": asdict(course.profile), "numbers": training.numbers()}
    inputs = {"base": course.base(), **tasks.task_inputs(course.task)}
    artifact = course.store.build(f"experiment-{name}", settings=settings, inputs=inputs, write=write, code=code)
    return Record(**artifact.json("record.json"))


def find(name: str):
    """The function of an experiment. Raises ExperimentError for an unknown name."""
    if name not in EXPERIMENTS:
        raise ExperimentError(f"There is no experiment {name!r}: expected one of {', '.join(EXPERIMENTS)}.")
    module, function = EXPERIMENTS[name].split(".")
    return getattr(import_module(f"slmops_course.experiments.{module}"), function)


def load_kept(name: str, folder: Path = KEPT) -> Record:
    """The figures of an experiment that are kept in a folder, by default the course's own.

    Raises ExperimentError when there are none, or an unreadable file.
    """
    find(name)
    path = folder / f"{name}.json"
    try:
        record = Record(**json.loads(path.read_text("utf-8")))
    except FileNotFoundError:
        raise ExperimentError(
            f"No figures of the experiment {name!r} are kept: expected {path.name}; `slmops experiment {name} --save` makes it."
        ) from None
    except (ValueError, TypeError) as error:
        raise ExperimentError(
            f"The kept figures in {path.name} cannot be read ({error}): expected those of `slmops experiment {name} --save`; "
            "run it again."
        ) from error
    return replace(record, kept=True)


def keep(record: Record, folder: Path = KEPT) -> Path:
    """Write a record where `load_kept` finds it; returns its path."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{record.name}.json"
    path.write_text(json.dumps(asdict(record), indent=1) + "\n", "utf-8")
    return path


def machine_class() -> str:
    """Which kind of machine this is. Example: "x86_64, 2 cores, amx avx2 avx512_bf16" """
    return f"{platform.machine()}, {count_cores()} cores, {' '.join(sorted(probe_cpu_features()))}"
