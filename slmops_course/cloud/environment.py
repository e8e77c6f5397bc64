"""The environment of the pipeline's steps, made from the course's own pins.

    python -m slmops_course.cloud.environment deploy/azure/conda.yml

Azure builds an image from a conda file; this one holds every library that the course brings in, at the version that
constraints.txt says. `constraints.txt` stays the one place where versions are decided.
"""

import sys
from collections.abc import Iterable, Mapping
from importlib import metadata
from pathlib import Path

from slmops_course.cloud.definition import CloudError
from slmops_course.doctor import read_pins


def closure(requirements: Iterable[str], *, pins: Mapping[str, str], platform: str = "linux") -> list[str]:
    """The pinned requirements, and what they bring in on a platform, as `name==version`, sorted.

    Libraries without a pin are left to the resolver. Raises CloudError for one that is not installed here.
    Example: closure(["filelock"], pins={"filelock": "4.2.11"}) -> ["filelock==4.2.11"]
    """
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    machine = {"sys_platform": platform, "platform_system": platform.title(), "python_version": "3.11", "os_name": "posix",
               "python_full_version": "3.11.0", "platform_machine": "x86_64", "implementation_name": "cpython",
               "platform_python_implementation": "CPython"}  # fmt: skip
    waiting, seen, names = [(Requirement(line), "") for line in requirements], set(), set()
    while waiting:
        requirement, extra = waiting.pop()
        if requirement.marker and not requirement.marker.evaluate({**machine, "extra": extra}):
            continue
        name = canonicalize_name(requirement.name)
        names.add(name)
        for wanted in ({"", *requirement.extras}) - {extra for known, extra in seen if known == name}:
            seen.add((name, wanted))
            try:
                waiting += [(Requirement(line), wanted) for line in metadata.requires(name) or []]
            except metadata.PackageNotFoundError:
                raise CloudError(f"{name} is not installed: expected the course's environment; make it again.") from None
    return sorted(f"{name}=={pins[name]}" for name in names if name in pins)


def conda_file(pins: Mapping[str, str], requirements: Iterable[str]) -> str:
    """The text of the steps' conda file."""
    lines = "\n".join(f"      - {line}" for line in closure(requirements, pins=pins))
    return (
        "# Written by `python -m slmops_course.cloud.environment deploy/azure/conda.yml` from constraints.txt: do not edit.\n"
        "# On Linux an unpinned index gives a PyTorch for CUDA, which also works without a GPU.\n"
        "name: slmops\nchannels:\n  - conda-forge\ndependencies:\n  - python=3.11\n  - pip\n  - pip:\n"
        f"{lines}\n"
    )


def course_requirements(root: Path) -> list[str]:
    """What the course itself asks for, by its pyproject.toml."""
    import tomllib

    return tomllib.loads((root / "pyproject.toml").read_text("utf-8"))["project"]["dependencies"]


def main(arguments: list[str] | None = None) -> None:
    """Write the file anew, from the pins of the folder that this is started in."""
    pins = read_pins(Path("constraints.txt").read_text("utf-8"))
    Path((arguments or sys.argv[1:])[0]).write_text(conda_file(pins, course_requirements(Path())), "utf-8")


if __name__ == "__main__":
    main()
