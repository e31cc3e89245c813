"""The compose file: what its services run, for the bundled gallery and for one's
own.
"""

import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml  # type: ignore[import-untyped]

from tests.support.paths import ROOT

COMPOSE = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
RECORD = '#!/bin/sh\necho "$(basename "$0") $*"\n'


def commands(
    service: str,
    folder: Path,
    gallery: str,
    domain: str = "twemoji",
) -> list[str]:
    """Run a service's command with programs that print what they are called with."""
    for name in ("dcar", "python"):
        (folder / name).write_text(RECORD)
        (folder / name).chmod(0o755)
    command = [
        part.replace("$$", "$").replace("/data/zero-shot", f"{folder}/model")
        for part in command_of(service)
    ]
    environment = {
        "PATH": f"{folder}:{os.environ['PATH']}",
        "GALLERY": gallery,
        "DCAR_DOMAIN": domain,
    }
    done = subprocess.run(
        command,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.replace(str(folder), "FOLDER").splitlines()


def command_of(service: str) -> list[str]:
    return list(COMPOSE["services"][service]["command"])


def test_the_bundled_gallery_is_indexed_and_served(tmp_path: Path) -> None:
    assert commands("index", tmp_path, "", "openmoji") == [
        "python -m index_jobs.rebuild --gallery examples/emoji/openmoji --checkpoint"
        " examples/emoji/openmoji/checkpoint --validation examples/emoji/openmoji --out"
        " /data/index/openmoji"
    ]
    assert commands("api", tmp_path, "", "openmoji") == [
        "dcar serve --index /data/index/openmoji"
    ]


def test_a_gallery_of_ones_own_is_indexed_with_weights_that_are_fetched_once(
    tmp_path: Path,
) -> None:
    build = (
        "python -m index_jobs.rebuild --gallery /gallery --checkpoint FOLDER/model"
        " --out /data/index/my photos"
    )
    assert commands("index", tmp_path, "./my photos") == [
        "dcar zero-shot --out FOLDER/model",
        build,
    ]
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").touch()
    assert commands("index", tmp_path, "./my photos") == [build]
    assert commands("api", tmp_path, "./my photos/") == [
        "dcar serve --index /data/index/my photos"
    ]


def test_keys_and_secrets_come_from_the_environment() -> None:
    environment = COMPOSE["services"]["api"]["environment"]
    for name in ("DCAR_ADMIN_KEY", "DCAR_API_KEYS", "DCAR_IMAGE_SECRET"):
        assert environment[name] == f"${{{name}:-}}"
    assert COMPOSE["services"]["index"]["environment"]["HF_ENDPOINT"] is None, (
        "that of the shell, if it has one"
    )


@pytest.mark.parametrize("service", ["index", "api"])
def test_weights_and_exports_are_kept_on_a_volume(service: str) -> None:
    described: dict[str, Any] = COMPOSE["services"][service]
    mounts = {
        target: source
        for source, target in (
            volume.split(":")[:2] for volume in described["volumes"][:2]
        )
    }
    assert mounts == {"/data": "index", "/cache": "cache"}
    assert described["volumes"][2] == "${GALLERY:-./examples/emoji}:/gallery:ro"
    assert "HF_HOME=/cache/" in (ROOT / "Dockerfile").read_text()
    assert {"index", "cache"} <= COMPOSE["volumes"].keys()
