"""Write a software bill of materials (CycloneDX 1.6, JSON) of the installed packages that `dcar` needs.

    python scripts/sbom.py --out sbom.json
    python scripts/sbom.py --audit              also look up known vulnerabilities with pip-audit

Exit codes: 0 done, 1 with known vulnerabilities, 3 if pip-audit is missing or reaches no database.
"""

import argparse
import json
import subprocess
import sys
import uuid
from datetime import UTC, datetime
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

NO_DATABASE = 3


def needed(root: str) -> dict[str, tuple[Distribution, set[str]]]:
    """A distribution and everything installed that it requires, extras included, each with the names it requires."""
    found: dict[str, tuple[Distribution, set[str]]] = {}
    waiting = [root]
    while waiting:
        name = waiting.pop()
        if name in found:
            continue
        dist = distribution(name)
        children: set[str] = set()
        for requirement in map(Requirement, dist.requires or []):
            child = canonicalize_name(requirement.name)
            if _is_installed(child) and child != name:
                children.add(child)
        found[name] = dist, children
        waiting += children
    return found


def _is_installed(name: str) -> bool:
    try:
        distribution(name)
    except PackageNotFoundError:
        return False
    return True


def bill(packages: dict[str, tuple[Distribution, set[str]]], root: str) -> dict[str, Any]:
    """The bill of materials as CycloneDX 1.6."""
    components = {name: _component(name, dist) for name, (dist, _) in sorted(packages.items())}
    refs = {name: component["bom-ref"] for name, component in components.items()}
    return {
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "serialNumber": f"urn:uuid:{uuid.uuid4()}",
        "version": 1,
        "metadata": {
            "timestamp": datetime.now(UTC).isoformat(timespec="seconds"),
            "component": components[root] | {"type": "application"},
        },
        "components": [component for name, component in components.items() if name != root],
        "dependencies": [
            {"ref": refs[name], "dependsOn": sorted(refs[child] for child in children)}
            for name, (_, children) in sorted(packages.items())
        ],
    }


def _component(name: str, dist: Distribution) -> dict[str, Any]:
    purl = f"pkg:pypi/{name}@{dist.version}"
    component: dict[str, Any] = {
        "type": "library",
        "bom-ref": purl,
        "name": name,
        "version": dist.version,
        "purl": purl,
    }
    metadata = dist.metadata
    if "License-Expression" in metadata:
        component["licenses"] = [{"expression": metadata["License-Expression"]}]
    else:
        classified = [each.rpartition(" :: ")[2] for each in metadata.get_all("Classifier", []) if "License ::" in each]
        if classified:
            component["licenses"] = [{"license": {"name": each}} for each in classified]
    return component


def audit(packages: dict[str, tuple[Distribution, set[str]]], root: str) -> int:
    """Print known vulnerabilities of the packages; returns the exit status."""
    lines = [f"{name}=={dist.version.partition('+')[0]}" for name, (dist, _) in packages.items() if name != root]
    words = ["-m", "pip_audit", "--format", "json", "--no-deps", "--disable-pip", "--progress-spinner", "off", "-r"]
    done = subprocess.run(
        [sys.executable, *words, "/dev/stdin"], input="\n".join(lines), capture_output=True, text=True
    )
    try:
        results = json.loads(done.stdout)["dependencies"]
    except (ValueError, KeyError):
        reason = done.stderr.strip().splitlines()
        print(f"not audited: {reason[-1] if reason else 'pip-audit gave no result'}")
        return NO_DATABASE
    audited = [each for each in results if "skip_reason" not in each]
    faults = [(each, fault) for each in audited for fault in each["vulns"]]
    for each, fault in faults:
        print(
            f"{each['name']} {each['version']}: {fault['id']}, fixed in {', '.join(fault['fix_versions']) or 'nothing'}"
        )
    if not audited:
        print("not audited: no vulnerability database can be reached")
        return NO_DATABASE
    print(f"{len(audited)} of {len(results)} packages audited, {len(faults)} known vulnerabilities")
    return int(bool(faults))


def main() -> int:
    """Write the bill, and audit on request; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("sbom.json"), help="the file to write (default: %(default)s)")
    parser.add_argument("--audit", action="store_true", help="look up known vulnerabilities with pip-audit")
    given = parser.parse_args()
    packages = needed("dcar")
    given.out.write_text(json.dumps(bill(packages, "dcar"), indent=2) + "\n", encoding="utf-8")
    print(f"{given.out}: {len(packages) - 1} packages")
    return audit(packages, "dcar") if given.audit else 0


if __name__ == "__main__":
    sys.exit(main())
