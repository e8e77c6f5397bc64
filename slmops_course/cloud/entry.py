"""Runs the entry script of a parallel step here, as Azure's parallel job does there.

    python -m slmops_course.cloud.entry SPEC.json
"""

import json
import runpy
import sys
from collections.abc import Sequence
from pathlib import Path

from slmops_course.cloud.definition import CloudError
from slmops_course.errors import CourseError


def run_batches(
    script: Path, arguments: Sequence[str], files: Sequence[Path], *, batch_size: int, retries: int, failures: int
) -> list[str]:
    """Call the script's `init()`, then `run` with `batch_size` files at a time; returns what it said of each file.

    A mini-batch that fails is tried again `retries` times. Raises CloudError when more than `failures` files stay without a
    result; -1 lets any number fail, as in Azure.
    """
    before = sys.argv
    sys.argv = [str(script), *arguments]
    try:
        entry = runpy.run_path(str(script))
        entry["init"]()
        said, failed = [], []
        for start in range(0, len(files), batch_size):
            batch = [str(file) for file in files[start : start + batch_size]]
            results = _try(entry["run"], batch, retries, failed)
            said += results
    finally:
        sys.argv = before
    lost = len(files) - len(said)
    if lost > failures >= 0:
        raise CloudError(
            f"{script.name} left {lost} of {len(files)} files without a result ({(failed or ['it gave none'])[-1]}): expected "
            f"at most {failures}; look at these files and run again."
        )
    return said


def _try(run, batch: list[str], retries: int, failed: list[str]) -> list[str]:
    for _ in range(retries + 1):
        try:
            results = list(run(batch))
        except CourseError as error:
            failed.append(str(error))
            continue
        if len(results) > len(batch):
            raise CloudError(f"run gave {len(results)} results for {len(batch)} files: expected one each; mend the script.")
        return results
    return []


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what a specification file says; returns the exit code."""
    try:
        print("\n".join(run_specification(Path((arguments or sys.argv[1:])[0]))))
    except CourseError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


def run_specification(path: Path) -> list[str]:
    """`run_batches` with the arguments in a JSON file."""
    spec = json.loads(path.read_text("utf-8"))
    files = [Path(file) for file in spec.pop("files")]
    return run_batches(Path(spec.pop("script")), spec.pop("arguments"), files, **spec)


if __name__ == "__main__":
    sys.exit(main())
