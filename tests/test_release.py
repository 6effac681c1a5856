"""What is given away holds all it needs: the wheel, and the packages that cluster.yaml installs."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
import yaml

import capray

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("dist")
    subprocess.run(["uv", "build", "--quiet", "--wheel", "--out-dir", folder, ROOT], check=True)
    (built,) = folder.glob("*.whl")
    return built


@pytest.mark.slow
def test_the_wheel_has_every_file_of_the_package_and_no_other(wheel):
    with zipfile.ZipFile(wheel) as archive:
        packed = {name for name in archive.namelist() if not name.startswith(f"capray-{capray.__version__}.dist-info/")}
        metadata = archive.read(f"capray-{capray.__version__}.dist-info/METADATA").decode()
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "capray"],
        cwd=ROOT, check=True, capture_output=True, text=True,
    )  # fmt: skip
    assert packed == set(listed.stdout.split())
    assert "capray/py.typed" in packed and "capray/report/templates/serve.html" in packed
    assert "License-Expression: Apache-2.0" in metadata and "Requires-Python: <3.14,>=3.11" in metadata


@pytest.mark.slow
def test_the_wheel_runs_where_the_clone_is_not(wheel, tmp_path):
    site = tmp_path / "site"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    command = [sys.executable, "-m", "capray"]
    where = {"cwd": tmp_path, "env": {"PYTHONPATH": str(site)}, "capture_output": True, "text": True, "check": True}
    assert subprocess.run([*command, "--version"], **where).stdout.strip() == capray.__version__
    subprocess.run([*command, "prepare", "shapes", "samples", "--num-images", "10"], **where)
    script = "import capray.report.rendering as p; print(p.__file__); p.render('serve.html', model_id='m', max_bytes=1)"
    assert subprocess.run([sys.executable, "-c", script], **where).stdout.startswith(str(site))


def name_of(requirement: str) -> str:
    return re.split(r"[\[=<>~ ]", requirement)[0].lower()


def test_a_cluster_is_given_every_package_that_capray_needs():
    needed = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    (command,) = [
        command for command in yaml.safe_load((ROOT / "cluster.yaml").read_text())["setup_commands"] if "pip" in command
    ]
    installed = {name_of(word.strip('"')) for word in command.split()[2:]}
    assert installed == {name_of(requirement) for requirement in needed}
