"""The whole house by its command line: train, build, list, verify, search, rebuild, roll back, serve."""

import json
import os
import re
import signal
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import pytest

from tests.support import commands
from tests.support.commands import Command
from tests.support.processes import free_port


def dcar(*args: object, check: bool = True) -> CompletedProcess[str]:
    done = commands.dcar(*args)
    assert not check or done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    return done


@contextmanager
def server(*args: object) -> Iterator[tuple[str, int]]:
    port = free_port()
    process = Command(
        "app.cli", *args, "--port", port, environment={"DCAR_HOST": "127.0.0.1"}, stdout=os.devnull, stderr=os.devnull
    )
    try:
        url = f"http://127.0.0.1:{port}"
        for _ in range(400):
            try:
                with urllib.request.urlopen(f"{url}/readyz", timeout=5):
                    break
            except (urllib.error.URLError, OSError):
                assert process.poll() is None, "the server stopped"
                time.sleep(0.1)
        yield url, port
    finally:
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) in (0, -15)


def post(url: str, body: dict[str, object]) -> dict[str, Any]:
    request = urllib.request.Request(url, json.dumps(body).encode(), {"content-type": "application/json"})
    with urllib.request.urlopen(request, timeout=20) as answer:
        return json.load(answer)


@pytest.fixture(scope="module")
def walked(tiny_model: Path, tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A trained checkpoint and an index built with it, both by the command line."""
    work = tmp_path_factory.mktemp("walk")
    checkpoint, index = work / "checkpoint", work / "index"
    done = dcar(
        "train", "--data", tiny_data, "--model", tiny_model, "--epochs", 2, "--batch-size", 6, "--out", checkpoint,
        check=False,
    )  # fmt: skip
    assert done.returncode in (0, 3), "3: the untouched model is as good, as a tiny one may be"
    assert "Was it worth it?" in done.stdout
    assert "batch/s" in done.stderr or "s/batch" in done.stderr  # a rate and the time left
    done = dcar("index", "build", "--gallery", tiny_data, "--checkpoint", checkpoint, "--out", index)
    assert "24 images" in done.stdout
    return checkpoint, index


def test_search_from_the_command_line(walked: tuple[Path, Path], tiny_gallery: Path) -> None:
    _, index = walked
    found = json.loads(dcar("search", "a red circle", "--index", index, "-k", 3, "--json").stdout)
    assert [hit["rank"] for hit in found["results"]] == [1, 2, 3]
    odd = json.loads(dcar("search", "a  red\u200b <|endoftext|> circle", "--index", index, "-k", 3, "--json").stdout)
    assert odd | {"took_ms": 0} == found | {"took_ms": 0}, "words are put into the service's form"
    picture = tiny_gallery / "circle" / "red.png"
    found = json.loads(dcar("search", picture, "--index", index, "-k", 1, "--json").stdout)
    assert found["results"][0]["caption"] == "a red circle"
    assert found["results"][0]["score"] > 0.999
    assert "a red circle" in dcar("search", picture, "--index", index).stdout
    circles = dcar("search", "a red square", "--index", index, "--filter", '{"category": "circle"}', "--json").stdout
    assert {result["category"] for result in json.loads(circles)["results"]} == {"circle"}
    assert "gone.png: No such file" in dcar("search", "gone.png", "--index", index, check=False).stderr


def test_versions_are_listed_verified_and_rolled_back(walked: tuple[Path, Path], tiny_gallery: Path) -> None:
    checkpoint, index = walked
    again = dcar("index", "build", "--gallery", tiny_gallery, "--checkpoint", checkpoint, "--out", index)
    assert "version 1 is up to date" in again.stdout
    job = ("--gallery", tiny_gallery, "--checkpoint", checkpoint, "--out", index, "--force")
    done = commands.run("index_jobs.rebuild", *job)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["version"] == 2
    listed = dcar("index", "list", index).stdout
    assert re.search(r"^\* +2 ", listed, re.MULTILINE)
    assert dcar("index", "verify", index).stdout.count("as published") == 2
    assert "version 1 is current" in dcar("index", "rollback", index).stdout


def test_serve_answers_and_a_taken_port_is_one_line(walked: tuple[Path, Path]) -> None:
    _, index = walked
    with server("serve", "--index", index, "--collection", f"again={index}") as (url, port):
        found = post(f"{url}/search/text", {"query": "a red circle", "k": 2})
        assert set(found) == {"index_version", "took_ms", "cached", "results", "next_offset", "nothing_fits"}
        assert not found["cached"]
        assert post(f"{url}/search/text", {"query": "a  red circle", "k": 2})["cached"]
        again = post(f"{url}/collections/again/search/text", {"query": "a red circle", "k": 2})
        assert [each["id"] for each in again["results"]] == [each["id"] for each in found["results"]]
        taken = dcar("serve", "--index", index, "--port", port, check=False)
        assert taken.returncode == 1
        assert len(taken.stderr.strip().splitlines()) == 1
        assert str(port) in taken.stderr


def test_evaluate_writes_results(tiny_model: Path, tiny_data: Path, tmp_path: Path) -> None:
    done = dcar(
        "evaluate", "--data", tiny_data, "--model", tiny_model, "--methods", "clip,dcar", "--seeds", 1,
        "--epochs", 1, "--batch-size", 6, "--out", tmp_path,
    )  # fmt: skip
    assert "| dcar |" in done.stdout
    assert set(json.loads((tmp_path / "results.json").read_text())["methods"]) == {"clip", "dcar"}


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("search", "dog", "--index", "/nowhere"), "/nowhere"),
        (("serve", "--index", "/nowhere"), "dcar index build"),
        (("serve",), "no index: give --index DIR"),
        (("serve", "--index", "/nowhere", "--collection", "one"), "--collection is NAME=DIR, not 'one'"),
        (
            ("evaluate", "--data", "/nowhere", "--methods", "dcarr", "--out", "/tmp/x", "--model", "{model}"),
            "there are: clip",
        ),
        (("train", "--data", "/nowhere", "--out", "/tmp/x"), "/nowhere"),
        (("demo", "--domain", "notoemoji"), "twemoji"),
        (("data", "check", "/nowhere"), "/nowhere does not exist; give a directory"),
        (("index", "list", "/nowhere"), "/nowhere holds no published index"),
        (("index", "rollback", "/nowhere"), "/nowhere holds no published index"),
    ],
)
def test_mistakes_are_one_line(args: tuple[str, ...], message: str, tiny_model: Path) -> None:
    done = dcar(*(a.format(model=tiny_model) for a in args), check=False)
    assert done.returncode == (3 if args[0] in ("train", "data") else 1), "3 where it is the data"
    assert message in done.stderr
    assert len(done.stderr.strip().splitlines()) <= 2
