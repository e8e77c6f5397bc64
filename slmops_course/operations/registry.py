"""The registry: versions with their lineage and gate report, and which of them is in production.

MLflow's model registry keeps the book, in an SQLite file in a folder or on a server; the files of every version are
copied into the folder too, so a released version outlives the build that made it. What the course adds to a version are
its tags `slmops.files`, `slmops.lineage`, `slmops.gate`, `slmops.digest` and `slmops.registered_at`; what it adds to a
model are tags `slmops.move.ALIAS.NUMBER`, one for each time that an alias moved.
"""

import json
import logging
import re
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path

from slmops_course.operations.book import Book, open_file
from slmops_course.operations.bundles import (
    bundle_digest,
    bundle_files,
    check_bundle,
    check_names,
    compare_files,
    copy_bundle,
)
from slmops_course.operations.gate import GateReport
from slmops_course.operations.versions import (
    PRODUCTION,
    Move,
    RegistryError,
    Version,
    check_name,
    refuse_unjudged,
    standing,
    to_json,
    version_digest,
)

log = logging.getLogger("slmops_course")

DIGEST = re.compile(r"[0-9a-f]{64}")
TAG_CHARS = 100_000  # MLflow's limit for a tag of a version


class Registry:
    """Versions of models in a folder; with `uri`, MLflow's book is on a server and the folder holds copies of the files.

    Example:
        registry = Registry(Path("build/registry"))
        version = registry.register("support-desk", folder, lineage=lineage_of(folder), report=report)
        registry.promote("support-desk", version.number)
        registry.rollback("support-desk")

    `uri` is an MLflow tracking URI, such as http://127.0.0.1:5000 or what an Azure ML workspace gives for MLflow. `clock`
    gives seconds since 1970. Two processes on one folder wait for each other; on a server nothing keeps two machines from
    promoting at once but those who work there.
    """

    def __init__(self, folder: Path | str, *, uri: str | None = None, clock: Callable[[], float] = time.time):
        self.folder, self.uri, self._clock = Path(folder).resolve(), uri, clock

    def register(self, name: str, folder: Path, *, lineage: Mapping, report: GateReport | None = None) -> Version:
        """Copy a folder's files into the registry as the next version of a model; the same again is the same version.

        `lineage` is plain JSON. A report may come later, with the same files and lineage: it takes the place of an older
        one. Raises BundleError for files that may not be released, and RegistryError for a name that is no name, a
        report on other files, and files that change meanwhile.
        """
        check_name(name)
        check_bundle(folder)
        files = bundle_files(folder)
        if report is not None and report.model_digest not in (None, bundle_digest(files)):
            raise RegistryError(
                f"The gate report is about other files than those in {folder.name}: expected a report on this bundle; judge it."
            )
        digest = version_digest(files, lineage)
        tags = {"slmops.files": to_json(files), "slmops.lineage": to_json(lineage), "slmops.digest": digest}
        gate = {} if report is None else {"slmops.gate": report.to_json()}
        _refuse_long({**tags, **gate})
        book = self._book  # opened before anything is copied, in case that fails
        with self._locked():
            number = next((version.number for version in self.versions(name) if version.digest == digest), None)
            place = self._place(name, digest)
            if compare_files(place, files):
                copy_bundle(folder, place, files)
            if number is None:
                number = self._create(name, place, {**tags, **gate, "slmops.registered_at": self._now()})
            elif gate:
                book.ask("set_model_version_tag", name, str(number), "slmops.gate", gate["slmops.gate"])
        return self.get(name, number)

    def names(self) -> list[str]:
        """The names of all models."""
        models = self._book.ask("search_registered_models", max_results=1000) if self._there else []
        return sorted(model.name for model in models)

    def versions(self, name: str) -> list[Version]:
        """All versions of a model, oldest first; an empty list for a model that is not there.

        A version that something else than this course registered on the same server is left out.
        """
        check_name(name)
        model = self._book.ask("get_registered_model", name, missing=None) if self._there else None
        if model is None:
            return []
        found = self._book.ask("search_model_versions", f"name='{name}'")
        kept = (self._version(entry, model.aliases) for entry in found if DIGEST.fullmatch(entry.tags.get("slmops.digest", "")))
        return sorted(kept, key=lambda version: version.number)

    def get(self, name: str, which: int | str = PRODUCTION) -> Version:
        """One version, by its number or by an alias; its files are fetched if they are not in the folder.

        Raises RegistryError, with what there is, for a name, number or alias that is not.
        """
        versions = self.versions(name)
        if not versions:
            names = ", ".join(self.names()) or "none yet"
            raise RegistryError(f"There is no model {name!r}: expected one of those registered ({names}); register it first.")
        for version in versions:
            if str(which) == str(version.number) or which in version.aliases:
                return version if version.folder.is_dir() or self.uri is None else self._fetch(version)
        known = [str(v.number) for v in versions] + sorted(alias for v in versions for alias in v.aliases)
        raise RegistryError(f"{name} has no version {str(which)!r}: expected one of {', '.join(known)}.")

    def verify(self, version: Version) -> list[str]:
        """Say which of a version's kept files are missing, added or changed; an empty list means that it is whole."""
        changed = version_digest(version.files, version.lineage) != version.digest
        return ["what the registry knows of it was changed"] * changed + compare_files(version.folder, version.files)

    def promote(self, name: str, number: int, *, alias: str = PRODUCTION) -> Version:
        """Point an alias at a version. Promoting what is there already changes nothing.

        Raises RegistryError when the version has no gate report or a failed one, when the gate compared it with another
        version than the one it is to follow, and when its kept files are not as they were registered.
        """
        check_name(alias, what="an alias")
        with self._locked():
            version = self.get(name, number)
            current = next((other for other in self.versions(name) if alias in other.aliases), None)
            if current and current.number == version.number:
                return version
            refuse_unjudged(version, current)
            problems = self.verify(version)
            if problems:
                raise RegistryError(
                    f"{name} {version.number} is damaged ({'; '.join(problems)}): expected its files as they were registered; "
                    "register the same files again, which mends it."
                )
            self._move(name, alias, "promote", version.number)
        return self.get(name, version.number)

    def rollback(self, name: str, *, alias: str = PRODUCTION) -> Version:
        """Point an alias back at the last version that it pointed at before and whose files are whole; again, further back.

        Raises RegistryError when there is none.
        """
        check_name(alias, what="an alias")
        with self._locked():
            current = self.get(name, alias).number
            earlier = standing(self._moves(name, alias), current)[:-1]
            versions = {version.number: version for version in self.versions(name)}
            for number in reversed(earlier):
                if number == current or number not in versions:
                    continue
                problems = self.verify(self.get(name, number))
                if not problems:
                    self._move(name, alias, "rollback", number)
                    return self.get(name, number)
                log.warning("%s %d is damaged (%s); going back further", name, number, "; ".join(problems))
        raise RegistryError(
            f"{name} {current} has no whole version before it as {alias}: expected one to go back to; promote a good one."
        )

    def history(self, name: str, *, alias: str = PRODUCTION) -> list[Move]:
        """Every move of an alias, oldest first."""
        self.get(name, alias)
        return self._moves(name, alias)

    def _moves(self, name: str, alias: str) -> list[Move]:
        """The moves of an alias. A last one that was noted and then not carried out, as in a power cut, is left out."""
        model = self._book.ask("get_registered_model", name)
        keys = sorted(key for key in model.tags if key.startswith(f"slmops.move.{alias}."))
        moves = [Move(**json.loads(model.tags[key])) for key in keys]
        current = int(model.aliases[alias]) if alias in model.aliases else None
        return moves[:-1] if moves and moves[-1].before == current != moves[-1].after else moves

    def _move(self, name: str, alias: str, action: str, after: int) -> None:
        # Noted before it is done, so that no move is ever missing from the history; see _moves.
        moves = self._moves(name, alias)
        aliases = self._book.ask("get_registered_model", name).aliases
        move = Move(self._now(), action, int(aliases[alias]) if alias in aliases else None, after)
        self._book.ask("set_registered_model_tag", name, f"slmops.move.{alias}.{len(moves) + 1:06}", to_json(asdict(move)))
        self._book.ask("set_registered_model_alias", name, alias, str(after))

    def _version(self, entry, aliases: Mapping[str, str]) -> Version:
        tags, number = entry.tags, int(entry.version)
        report = GateReport.from_json(tags["slmops.gate"]) if "slmops.gate" in tags else None
        return Version(
            entry.name, number, self._place(entry.name, tags["slmops.digest"]), json.loads(tags["slmops.files"]),
            json.loads(tags["slmops.lineage"]), report, tuple(sorted(a for a, n in aliases.items() if int(n) == number)),
            tags["slmops.digest"], tags["slmops.registered_at"],
        )  # fmt: skip

    def _place(self, name: str, digest: str) -> Path:
        return self.folder / "files" / name / digest[:16]

    def _create(self, name: str, place: Path, tags: Mapping[str, str]) -> int:
        if self._book.ask("get_registered_model", name, missing=None) is None:
            self._book.ask("create_registered_model", name)
        source, run_id = (place.as_uri(), None) if self.uri is None else self._upload(name, place)
        return int(self._book.ask("create_model_version", name, source, run_id=run_id, tags=dict(tags)).version)

    def _upload(self, name: str, place: Path) -> tuple[str, str]:
        """Give the files to the server, as the artifacts of a run: a server takes no path on another machine."""
        experiment = self._book.ask("get_experiment_by_name", "slmops-registry")
        experiment_id = experiment.experiment_id if experiment else self._book.ask("create_experiment", "slmops-registry")
        run_id = self._book.ask("create_run", experiment_id, run_name=name).info.run_id
        self._book.ask("log_artifacts", run_id, str(place), "model")
        self._book.ask("set_terminated", run_id)
        return f"runs:/{run_id}/model", run_id

    def _fetch(self, version: Version) -> Version:
        check_names(version.files)
        run_id = self._book.ask("get_model_version", version.name, str(version.number)).run_id
        with tempfile.TemporaryDirectory() as scratch, self._locked():
            self._book.ask("download_artifacts", run_id, "model", scratch)
            check_bundle(Path(scratch) / "model")
            copy_bundle(Path(scratch) / "model", version.folder, version.files)
        return version

    def _now(self) -> str:
        return datetime.fromtimestamp(self._clock(), UTC).isoformat(timespec="seconds")

    @property
    def _there(self) -> bool:
        """Whether there can be anything to read: looking into a registry that is not there must not make one."""
        return self.uri is not None or self._file.exists()

    @property
    def _file(self) -> Path:
        return self.folder / "mlflow.db"

    @cached_property
    def _book(self) -> Book:
        return open_file(self._file, self._locked()) if self.uri is None else Book(self.uri)

    @contextmanager
    def _locked(self):
        """One process at a time; may be entered again inside."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock.acquire()
        except OSError as error:
            raise RegistryError(
                f"The registry {self.folder} cannot be written ({error.strerror}): expected a folder of yours; choose another."
            ) from error
        try:
            yield
        finally:
            self._lock.release()

    @cached_property
    def _lock(self):
        from filelock import FileLock

        return FileLock(self.folder / ".lock")


def _refuse_long(tags: Mapping[str, str]) -> None:
    for key, value in tags.items():
        if len(value) > TAG_CHARS:
            raise RegistryError(f"{key} takes {len(value):,} characters: expected at most {TAG_CHARS:,}; shorten it.")
