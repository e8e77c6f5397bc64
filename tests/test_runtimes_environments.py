import os
import subprocess
import sys
import zipfile

import pytest

from slmops_course.runtimes.environments import install_once, install_packages, surroundings
from slmops_course.runtimes.worker import RuntimesError


@pytest.fixture
def calls():
    return []


@pytest.fixture
def sources(tmp_path):
    path = tmp_path / "versions.txt"
    path.write_text("a==1\n", "utf-8")
    return path


def test_an_installation_is_made_once_and_again_for_other_versions(tmp_path, sources, calls):
    for _ in range(2):
        assert install_once(tmp_path / "there", sources, calls.append) == tmp_path / "there"
    assert calls == [tmp_path / "there"]
    sources.write_text("a==2\n", "utf-8")
    install_once(tmp_path / "there", sources, calls.append)
    assert len(calls) == 2


def test_what_failed_half_way_is_installed_again(tmp_path, sources, calls):
    def fail(folder):
        raise RuntimesError("no network")

    install_once(tmp_path / "there", sources, calls.append)
    sources.write_text("a==2\n", "utf-8")
    with pytest.raises(RuntimesError, match="no network"):
        install_once(tmp_path / "there", sources, fail)
    sources.write_text("a==1\n", "utf-8")
    install_once(tmp_path / "there", sources, calls.append)
    assert len(calls) == 2, "what failed lies over the first installation, which is not whole any more"


def write_wheel(folder, name):
    """A wheel with one module, `name`, whose value is 7."""
    info = f"{name}-1.0.dist-info"
    with zipfile.ZipFile(folder / f"{name}-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr(f"{name}.py", "value = 7\n")
        wheel.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\nRequires-Dist: not-wanted\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")


def test_packages_are_seen_by_those_who_ask_for_them_and_by_nobody_else(tmp_path):
    write_wheel(tmp_path, "slmops_seven")
    requirements = tmp_path / "requirements.txt"
    requirements.write_text(f"--no-index\n--find-links {tmp_path.as_uri()}\nslmops_seven==1.0\n", "utf-8")
    folder = install_packages(tmp_path / "a folder", requirements)
    command = [sys.executable, "-P", "-c", "import slmops_seven; print(slmops_seven.value)"]
    inside = subprocess.run(command, capture_output=True, text=True, env=os.environ | surroundings(folder))
    assert inside.stdout == "7\n", inside.stderr
    assert subprocess.run(command, capture_output=True).returncode == 1


def test_a_package_that_is_not_sent_is_said(tmp_path):
    requirements = tmp_path / "requirements.txt"
    requirements.write_text("--no-index\nno-such-package==1.0\n", "utf-8")
    with pytest.raises(RuntimesError, match=r"could not be installed \(ERROR: No matching distribution .*no-such-package==1.0"):
        install_packages(tmp_path / "there", requirements)
    assert not (tmp_path / "there" / "installed").exists()
    with pytest.raises(RuntimesError, match="there holds no finished installation"):
        surroundings(tmp_path / "there")
