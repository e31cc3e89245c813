"""Lock files, the bill of materials, and the audit."""

import json
import os
import subprocess
import sys
import tomllib
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import pytest

from tests.support.paths import ROOT


def script(name: str) -> Any:
    """A script of the repository as a module."""
    spec = spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    assert spec
    assert spec.loader
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run_sbom(out: Path, *options: str, path: Path | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, ROOT / "scripts" / "sbom.py", "--out", out, *options]
    environment = os.environ | ({"PYTHONPATH": str(path)} if path else {})
    return subprocess.run([str(word) for word in command], env=environment, capture_output=True, text=True)


def test_the_locks_fit_the_requirements() -> None:
    lock = script("lock")
    for name, extras in lock.locks().items():
        assert lock.faults(ROOT / name, extras) == []
        text = (ROOT / name).read_text(encoding="utf-8")
        assert "--hash=sha256:" in text
        assert "\ntorch==" not in text, "its build is the user's choice"


def test_a_stale_lock_is_noticed(tmp_path: Path) -> None:
    lock = script("lock")
    text = (ROOT / "requirements.lock").read_text(encoding="utf-8")
    stale = tmp_path / "stale.lock"
    stale.write_text(text.replace("\nfastapi==", "\nfastapi==0.1.0 # ").replace("\nredis==", "\nother=="))
    found = lock.faults(stale, ())
    assert len(found) == 2
    assert found[0].startswith("stale.lock has fastapi 0.1.0, not >=")
    assert found[1] == "stale.lock lacks redis"


def test_extras_without_a_lock_of_their_own_are_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lock = script("lock")
    monkeypatch.setattr(lock, "write", lambda *_, **__: pytest.fail("a lock is written"))
    monkeypatch.setattr(sys, "argv", ["lock.py", "--extra", "openvino"])
    with pytest.raises(SystemExit, match="2"):
        lock.main()
    assert "give --out as well" in capsys.readouterr().err


def test_torch_is_recent_enough_to_load_weights_safely() -> None:
    dependencies = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    assert "torch>=2.6" in dependencies


def test_the_bill_lists_every_requirement(tmp_path: Path) -> None:
    assert run_sbom(tmp_path / "sbom.json").returncode == 0
    bill = json.loads((tmp_path / "sbom.json").read_text())
    assert (bill["bomFormat"], bill["specVersion"]) == ("CycloneDX", "1.6")
    assert bill["metadata"]["component"]["name"] == "dcar"
    components = {each["name"]: each for each in bill["components"]}
    assert {"fastapi", "torch", "faiss-cpu", "safetensors", "sympy"} <= set(components)
    refs = {each["bom-ref"] for each in components.values()} | {bill["metadata"]["component"]["bom-ref"]}
    assert refs == {each["ref"] for each in bill["dependencies"]}
    assert all(set(each["dependsOn"]) <= refs for each in bill["dependencies"])


@pytest.mark.parametrize(
    ("dependencies", "code", "message"),
    [
        ([{"name": "pillow", "version": "1", "vulns": []}], 0, "1 of 1 packages audited, 0 known vulnerabilities"),
        (
            [{"name": "pillow", "version": "1", "vulns": [{"id": "CVE-1", "fix_versions": ["2"]}]}],
            1,
            "pillow 1: CVE-1, fixed in 2",
        ),
        ([{"name": "pillow", "skip_reason": "not found"}], 3, "no vulnerability database can be reached"),
        (None, 3, "not audited: the network is down"),
    ],
)
@pytest.mark.slow
def test_the_audit_says_what_it_found(
    dependencies: list[dict[str, object]] | None, code: int, message: str, tmp_path: Path
) -> None:
    """A stand-in for pip-audit, which needs a network."""
    if dependencies is None:
        body = "import sys; sys.exit('the network is down')"
    else:
        body = f"import json, sys; sys.stdin.read(); print(json.dumps({{'dependencies': {dependencies!r}}}))"
    (tmp_path / "pip_audit.py").write_text(body)
    done = run_sbom(tmp_path / "sbom.json", "--audit", path=tmp_path)
    assert done.returncode == code, done.stderr
    assert message in done.stdout
