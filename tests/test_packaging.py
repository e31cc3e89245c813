"""What an installation without PyTorch can do, and what it says of the rest; and how
images are made of it.
"""

import json
import os
import re
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

from app.search import Index
from dcar_core.util.errors import install_command
from index_jobs.index.versions import open_current
from index_jobs.rebuild import rebuild
from tests.support.galleries import write_few
from tests.support.parts import needs
from tests.support.paths import ROOT
from tests.support.processes import without_pytorch
from tests.support.service import serving_by

EXAMPLE = ROOT / "examples" / "emoji" / "twemoji"
BUNDLED = (
    "base/open_clip_model.safetensors",
    "openmoji/gallery.tar",
    "query.png",
    "twemoji/gallery.tar",
)


def run(folder: Path, *command: object) -> subprocess.CompletedProcess[str]:
    """Run dcar where PyTorch is not installed."""
    environment = os.environ | without_pytorch(folder) | {"DCAR_RUNTIME": "auto"}
    given = [sys.executable, "-m", "app.cli", *map(str, command)]
    return subprocess.run(
        given,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


@needs("openvino")
def test_a_bundled_model_indexes_and_searches_without_pytorch(tmp_path: Path) -> None:
    """Ids and cosines are those of PyTorch."""
    (tmp_path / "photos").mkdir()
    with tarfile.open(EXAMPLE / "gallery.tar") as tar:
        for member in tar.getmembers()[:40]:
            tar.extract(member, tmp_path / "photos", filter="data")
    options = (
        "--gallery",
        tmp_path / "photos",
        "--checkpoint",
        EXAMPLE / "checkpoint",
        "--runtime",
        "openvino",
    )
    built = run(tmp_path, "index", "build", *options, "--out", tmp_path / "quick")
    assert built.returncode == 0, built.stderr
    done = run(
        tmp_path,
        "search",
        "crying cat",
        "--index",
        tmp_path / "quick",
        "-k",
        40,
        "--json",
    )
    found = json.loads(done.stdout)["results"]
    rebuild(
        tmp_path / "photos",
        EXAMPLE / "checkpoint",
        tmp_path / "slow",
        runtime="torch",
        progress=False,
    )
    slow = Index.open(tmp_path / "slow", runtime="torch")
    expected = {
        result["id"]: result["score"]
        for result in slow.search("crying cat", k=40)["results"]
    }
    assert len(expected) == 40
    assert {result["id"]: result["score"] for result in found} == pytest.approx(
        expected, abs=0.01
    )
    before = open_current(tmp_path / "slow").manifest
    after = open_current(tmp_path / "quick").manifest
    assert after.spec.fingerprint == before.spec.fingerprint
    assert after.cutoff == pytest.approx(before.cutoff, abs=0.01)


def test_a_command_names_the_extra_that_it_needs(
    tiny_data: Path, tmp_path: Path
) -> None:
    done = run(
        tmp_path,
        "train",
        "--data",
        tiny_data,
        "--out",
        tmp_path / "out",
        "--model",
        "examples/emoji/base",
    )
    assert done.returncode == 1
    message = (
        f"error: this command needs an optional dependency: {install_command('torch')}"
    )
    assert done.stderr.splitlines()[-1] == message


@needs("make")
def test_in_the_environment_of_a_checkout_the_command_is_make(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "prefix", str(ROOT / ".venv"))
    for folder, start in (
        (ROOT, "make install "),
        (tmp_path, f"make -C {ROOT} install "),
    ):
        monkeypatch.chdir(folder)
        command = install_command("torch")
        assert command == f"{start}EXTRAS=torch"
        subprocess.run(f"{command} --dry-run", shell=True, check=True)


@needs("registry")
@pytest.mark.timeout(600)
def test_a_wheel_in_a_clean_environment_indexes_and_serves_without_pytorch(
    tiny_gallery: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("PIP_COMPILE", "0")  # all modules, of which few are imported
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    subprocess.run(
        [
            *pip,
            "wheel",
            "--no-deps",
            "--wheel-dir",
            str(tmp_path),
            str(ROOT),
        ],
        check=True,
    )
    venv.create(tmp_path / "clean", symlinks=True)
    python = str(tmp_path / "clean" / "bin" / "python")
    (wheel,) = tmp_path.glob("*.whl")
    assert {f"app/emoji/{name}" for name in BUNDLED} < {
        *zipfile.ZipFile(wheel).namelist()
    }
    assert wheel.stat().st_size < 40e6
    subprocess.run([*pip, f"--python={python}", "install", str(wheel)], check=True)
    names = ("torch", "timm", "open_clip", "dcar_core")
    find = f"import importlib.util as u; print(*[n for n in {names} if u.find_spec(n)])"
    done = subprocess.run(
        [python, "-c", find],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split() == ["dcar_core"]
    name_command = (
        "from dcar_core.util.errors import install_command;"
        " print(install_command('plots'))"
    )
    command = subprocess.check_output(
        [python, "-c", name_command],
        cwd=tmp_path,
        text=True,
    )
    subprocess.run(
        f"{command.strip()} --quiet && {python} -c 'import matplotlib'",
        shell=True,
        cwd=tmp_path,
        check=True,
    )

    for gallery in tmp_path.glob("clean/lib/*/site-packages/app/emoji/*/gallery.tar"):
        write_few(gallery.parent, gallery.parent)
    monkeypatch.chdir(tmp_path)
    for words in ("demo",), ("quickstart", tiny_gallery):
        with serving_by(
            python,
            *words,
            DCAR_RUNTIME="auto",
            HF_HUB_OFFLINE="1",
        ) as http:
            best = http.post(
                "/search/text", json={"query": "crying cat", "k": 1}
            ).json()["results"][0]
            assert words != ("demo",) or best["id"] == "1f63f"


def test_what_is_cited_is_this_version() -> None:
    cited, project = (
        (ROOT / name).read_text(encoding="utf-8")
        for name in ("CITATION.cff", "pyproject.toml")
    )
    version = re.compile(r'^version(?:: | = ")([\d.]+)"?$', re.MULTILINE)
    assert version.findall(cited) == version.findall(project)


def test_each_image_of_the_bake_file_is_a_target_of_the_dockerfile() -> None:
    bake = json.loads((ROOT / "docker-bake.json").read_text())
    dockerfile = (ROOT / "Dockerfile").read_text()
    stages = re.findall(r"(?m)^FROM \S+ AS (\S+)$", dockerfile)
    images = {
        name: target for name, target in bake["target"].items() if name != "common"
    }
    assert images.keys() == {"serve", "full", "gpu"}
    assert (
        {target["target"] for target in images.values()}
        == {"serve", "full"}
        < {*stages}
    )
    assert stages[-1] == "serve", "the default"
    assert set(bake["group"]["default"]["targets"]) <= images.keys()
    guide = (ROOT / "docs" / "how-to" / "containers.md").read_text()
    assert "docker buildx bake --file docker-bake.json" in guide, (
        "else the services of docker-compose.yml join them"
    )
    assert bake["target"]["common"]["args"].keys() <= {
        *re.findall(r"\b[A-Z_]+\b", dockerfile)
    }
    for lock in re.findall(r'ARG \w*LOCK="(.+)"', dockerfile):
        assert (ROOT / lock).is_file()
