"""Lock files and the requirements that they fulfil."""

import itertools
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.support.parts import needs
from tests.support.paths import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
CI_EXTRAS = re.search(
    r"^export EXTRAS=(\S+)$",
    (ROOT / ".ci" / "run").read_text(),
    re.MULTILINE,
)
assert CI_EXTRAS
LOCKED = {
    "requirements.lock": ["torch"],
    "requirements-serve.lock": [],
    "requirements-ci.lock": CI_EXTRAS[1].split(","),
}
OF_TORCH = re.compile(r"(torch|torchvision|triton|(nvidia|cuda)-.+)==")


@pytest.mark.parametrize("name", LOCKED)
def test_the_locks_fit_the_requirements(name: str) -> None:
    extras = LOCKED[name]
    lines = [
        *PROJECT["dependencies"],
        *(line for extra in extras for line in PROJECT["optional-dependencies"][extra]),
    ]
    text = (ROOT / name).read_text(encoding="utf-8")
    pins = re.findall(r"(?m)^([\w.-]+)==([^\s;]+)", text)
    pinned = {canonicalize_name(package): version for package, version in pins}
    for requirement in map(Requirement, lines):
        if requirement.name != "torch":
            version = pinned.get(canonicalize_name(requirement.name), "missing")
            assert requirement.specifier.contains(version, prereleases=True), (
                f"{requirement}: run scripts/lock.sh"
            )
    assert "--hash=sha256:" in text
    assert not re.search(rf"(?m)^{OF_TORCH.pattern}", text), (
        "its build is the user's choice"
    )


def test_actions_are_named_by_commits() -> None:
    text = "".join(
        path.read_text() for path in (ROOT / ".github/workflows").glob("*.yml")
    )
    assert (
        len(re.findall(r"uses: \S+@[0-9a-f]{40} # v[\d.]+\n", text))
        == text.count("uses:")
        > 8
    )


@needs("registry")
def test_all_extras_resolve_together(tmp_path: Path) -> None:
    subprocess.run(
        [sys.executable, "-m", "pip", "--quiet", "install", "--target", tmp_path, "uv"],
        check=True,
    )
    options = [
        "--universal",
        "--python-version=3.11",
        "--quiet",
        f"--output-file={os.devnull}",
        "--system-certs",
    ]
    subprocess.run(  # with the system's certificates, which tests run without
        [
            sys.executable,
            "-m",
            "uv",
            "pip",
            "compile",
            "pyproject.toml",
            "--all-extras",
            *options,
        ],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(tmp_path), "SSL_CERT_DIR": ""},
        check=True,
    )


FAULTY = {
    "aiohttp": "3.13.2",  # request smuggling, and memory that a peer can fill
    "fastapi": "0.120",  # pins a Starlette with faults
    "h11": "0.15",  # request smuggling by chunks, CVE-2025-43859
    "protobuf": "6.33.4",  # unbounded recursion, CVE-2025-4565 and later
    "python-multipart": "0.0.17",  # slow forms, CVE-2024-53981
    "starlette": "0.49.0",  # slow Range headers, CVE-2025-62727
    "torch": "2.5.1",  # code in weights, CVE-2025-32434
}


def test_versions_with_known_faults_are_not_allowed() -> None:
    lines = itertools.chain(
        PROJECT["dependencies"], *PROJECT["optional-dependencies"].values()
    )
    floors = [
        requirement
        for requirement in map(Requirement, lines)
        if requirement.name in FAULTY
    ]
    assert {requirement.name for requirement in floors} == {*FAULTY}
    assert [each for each in floors if each.specifier.contains(FAULTY[each.name])] == []
