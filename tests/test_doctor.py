"""The doctor says yes to a good machine, no to a bad one, and does not fall over on the odd one."""

import errno
import hashlib

import pytest

from slmops_course import doctor
from slmops_course.doctor import NOTHING_TO_DO, Finding
from slmops_course.models import Wheel

GB = 1_000_000_000


def refuse_with(error):
    def act():
        raise error

    return act


@pytest.mark.parametrize(
    ("version_info", "status"),
    [((3, 11, 0), "ok"), ((3, 12, 9, "final", 0), "ok"), ((3, 10, 14), "problem"), ((3, 13, 0), "problem"), ((), "problem")],
)
def test_only_the_supported_pythons_pass(version_info, status):
    assert doctor.check_python(version_info).status == status


@pytest.mark.parametrize(
    ("system", "machine", "status"),
    [
        ("Linux", "x86_64", "ok"),
        ("Linux", "aarch64", "note"),
        ("Darwin", "arm64", "note"),
        ("Windows", "AMD64", "note"),
        ("Darwin", "x86_64", "problem"),
        ("Java", "", "problem"),
        ("", "", "problem"),
    ],
)
def test_a_system_is_ok_only_where_the_course_was_measured(system, machine, status):
    assert doctor.check_system(system, machine).status == status


@pytest.mark.parametrize(("count", "status"), [(2, "ok"), (64, "ok"), (1, "note")])
def test_one_core_is_noted(count, status):
    assert doctor.check_cores(count).status == status


@pytest.mark.parametrize(
    ("features", "machine", "status"),
    [
        ({"amx", "avx512_bf16", "avx2"}, "x86_64", "ok"),
        ({"avx512_bf16", "avx2"}, "x86_64", "ok"),
        ({"amx", "avx2"}, "x86_64", "ok"),
        ({"avx2"}, "x86_64", "note"),
        (set(), "x86_64", "note"),
        (set(), "arm64", "note"),
        (set(), "", "note"),
    ],
)
def test_bf16_is_fast_only_with_units_for_it(features, machine, status):
    finding = doctor.check_cpu_units(features, machine)
    assert finding.status == status
    assert ("bf16 training is fast" in finding.found) == (status == "ok")


def test_a_cpu_without_bf16_units_is_told_how_much_slower_it_is():
    assert "about twice as long without bf16 units" in doctor.check_cpu_units({"avx2"}).advice
    assert "twice" not in doctor.check_cpu_units(set(), "arm64").advice, "nothing was measured on ARM"


@pytest.mark.parametrize(
    ("cpuinfo", "features"),
    [
        ("processor : 0\nflags\t\t: fpu avx2 avx512_bf16 amx_bf16 amx_tile\n", {"avx2", "avx512_bf16", "amx"}),
        ("flags : fpu avx avx512f\n", set()),
        ("model name : avx2 amx_tile\nFeatures : fp asimd bf16\n", set()),
        ("", set()),
    ],
)
def test_cpu_flags_are_read_from_the_flags_line_only(cpuinfo, features):
    assert doctor.read_cpu_flags(cpuinfo) == features


@pytest.mark.parametrize(
    ("total_bytes", "available_bytes", "status"),
    [
        (8 * GB, 6 * GB, "ok"),
        (2 * GB, 2 * GB, "ok"),
        (8 * GB, 2 * GB - 1, "note"),
        (2 * GB - 1, 1 * GB, "problem"),
        (0, 0, "problem"),
        (None, None, "note"),
    ],
)
def test_memory_below_two_gigabytes_is_a_problem_and_busy_memory_is_noted(total_bytes, available_bytes, status):
    assert doctor.check_memory(total_bytes, available_bytes).status == status


@pytest.mark.parametrize(
    ("limit", "expected"), [("4\n", (4, 4)), ("7", (7, 6)), ("99", (8, 6)), ("max\n", (8, 6)), ("", (8, 6))]
)
def test_a_container_limit_lowers_the_memory_and_never_raises_it(limit, expected):
    assert doctor.apply_memory_limit(8, 6, limit) == expected


@pytest.mark.parametrize(("free_bytes", "status"), [(10 * GB, "ok"), (10 * GB - 1, "problem"), (0, "problem")])
def test_ten_gigabytes_of_free_disk_are_enough(free_bytes, status):
    assert doctor.check_disk(free_bytes).status == status


@pytest.mark.parametrize(
    ("installed", "pinned", "required", "status", "named"),
    [
        ({"torch": "2.13.0"}, {"torch": "2.13.0"}, ["torch"], "ok", "1 installed"),
        ({"torch": "2.13.0+cpu"}, {"torch": "2.13.0"}, [], "ok", "1 installed"),
        ({"torch": "2.12.1"}, {"torch": "2.13.0"}, [], "problem", "torch 2.12.1 (expected 2.13.0)"),
        ({"torch": "2.13.0.post1"}, {"torch": "2.13.0"}, [], "problem", "torch 2.13.0.post1"),
        ({}, {"torch": "2.13.0"}, ["torch"], "problem", "missing: torch"),
        ({}, {"pywinpty": "3.0.0"}, [], "ok", "0 installed"),
        ({"torch": "2.12.1"}, None, ["torch"], "note", "no constraints.txt"),
        ({}, {}, [], "ok", "0 installed"),
    ],
)
def test_versions_that_disagree_with_the_pins_are_named(installed, pinned, required, status, named):
    finding = doctor.check_versions(installed, pinned, required=required)
    assert finding.status == status
    assert named in finding.found


def test_pins_are_read_with_normalized_names_and_without_comments():
    text = "# a header with x==1\n\nJinja2==3.1.6  # why\nhuggingface_hub==2.4.0\nnot-a-pin>=3\n"
    assert doctor.read_pins(text) == {"jinja2": "3.1.6", "huggingface-hub": "2.4.0"}
    assert doctor.read_pins("") == {}


def test_a_project_is_found_only_beside_its_constraints(tmp_path):
    package = tmp_path / "slmops_course"
    package.mkdir()
    (tmp_path / "pyproject.toml").touch()
    assert doctor.find_project(package) is None
    (tmp_path / "constraints.txt").touch()
    assert doctor.find_project(package) == tmp_path


def test_the_wheel_is_ok_only_when_whole(tmp_path):
    contents = b"a wheel"
    wheel = Wheel("m==1", "m.whl", hashlib.sha256(contents).hexdigest(), "m.gguf", "")
    path = tmp_path / wheel.filename
    assert "not here yet" in doctor.check_wheel(path, wheel).found
    path.write_bytes(contents[:3])
    assert "damaged" in doctor.check_wheel(path, wheel).found
    path.write_bytes(contents)
    assert doctor.check_wheel(path, wheel).status == "ok"


def test_foundry_local_is_ok_only_when_its_sdk_imports():
    assert doctor.check_foundry_local(lambda: None).status == "ok"
    for error in (ImportError("No module named 'foundry_local_sdk'"), OSError("libfoundry.so: cannot open")):
        finding = doctor.check_foundry_local(refuse_with(error))
        assert finding.status == "problem"
        assert str(error) in finding.found


def test_loopback_is_ok_only_when_a_port_can_be_had():
    assert doctor.check_loopback(lambda: 50_000).status == "ok"
    finding = doctor.check_loopback(refuse_with(OSError(errno.EACCES, "Permission denied")))
    assert finding.status == "problem"
    assert "Permission denied" in finding.found


@pytest.mark.parametrize(
    ("families", "status", "named"),
    [
        ({"Noto Sans Devanagari", "Noto Sans Malayalam"}, "ok", "Devanagari and Malayalam"),
        ({"Nirmala UI"}, "ok", "Devanagari and Malayalam"),
        ({"Noto Sans Devanagari", "DejaVu Sans"}, "note", "no font for Malayalam"),
        (set(), "note", "no font for Devanagari or Malayalam"),
        (None, "note", "not known"),
    ],
)
def test_fonts_are_optional_and_the_missing_script_is_named(families, status, named):
    finding = doctor.check_fonts(families)
    assert finding.status == status
    assert named in finding.found


def test_this_machine_gets_one_finding_for_each_check_and_advice_with_each_complaint(tmp_path):
    findings = doctor.diagnose(tmp_path / "not" / "there")
    names = [finding.name for finding in findings]
    assert names == [
        "Python", "System", "CPU cores", "CPU units", "Memory", "Disk", "Libraries", "Model", "Foundry Local", "Loopback",
        "Fonts",
    ]  # fmt: skip
    for finding in findings:
        assert finding.found
        assert (finding.advice == NOTHING_TO_DO) == (finding.status == "ok"), finding
    assert not (tmp_path / "not").exists(), "the doctor only looks"


def test_findings_read_well_in_a_plain_terminal():
    findings = [Finding("Python", "ok", "3.11.7"), Finding("CPU cores", "note", "1", "word " * 40)]
    text = doctor.format_findings(findings, width=60)
    lines = text.splitlines()
    assert lines[0] == "ok       Python     3.11.7"
    assert lines[1] == "note     CPU cores  1"
    assert lines[2] == " " * 20 + "word word word word word word word word"
    assert lines[-1] == "ok: 1, note: 1, problem: 0"
    assert max(map(len, lines)) <= 60
    assert text.isascii(), "a terminal may know nothing else"


def test_advice_is_left_out_where_there_is_nothing_to_do_and_no_findings_are_no_trouble():
    assert NOTHING_TO_DO not in doctor.format_findings([Finding("Python", "ok", "3.11.7")])
    assert doctor.format_findings([]).strip() == "ok: 0, note: 0, problem: 0"
