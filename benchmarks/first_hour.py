"""The first hour of a new user: from a folder of photos to the first search.

    python benchmarks/first_hour.py                # a table of commands and seconds
    python benchmarks/first_hour.py --install      # clones and installs first, and runs the command of that clone

- The photos are pictures of the bundled example as JPEGs, in three folders of one camera each whose names collide, with
  captions in pairs.jsonl (one row bad, one image missing) and prices as texts. Some files are broken.
- The model is the bundled one, so no weights are fetched; without a hub, the seconds include asking for it. `--model
  ViT-B-32-quickgelu` takes that model with random weights, which cost as much as trained ones once these are fetched.
"""

import argparse
import contextlib
import json
import os
import shlex
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

from encode import random_model
from PIL import Image
from service import ROOT

from dcar_core.images import open_image
from tests.support.processes import free_port

EXAMPLE = ROOT / "examples" / "emoji" / "twemoji"
CAMERAS = ("cam1", "cam2", "cam3")
SIZE = (640, 480)


def make_photos(folder: Path, count: int) -> None:
    """Write a folder of `count` photos with captions, and the files that a camera and its owner leave beside them."""
    rows = [json.loads(line) for line in (EXAMPLE / "metadata.jsonl").read_text(encoding="utf-8").splitlines()]
    chosen = Random(0).sample(rows, count)
    pairs = list[dict[str, Any]]()
    with tarfile.open(EXAMPLE / "gallery.tar") as tar:
        for number, row in enumerate(chosen):
            member = tar.extractfile(row["file_name"])
            assert member is not None
            photo = Image.new("RGB", SIZE, "white")
            picture = open_image(member.read()).resize((400, 400))
            photo.paste(picture, (120, 40))
            name = f"{CAMERAS[number % 3]}/IMG_{number // 3 + 1:04}.jpg"
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            photo.save(folder / name, quality=90)
            price = "10,50" if number % 2 else "$12"
            pairs.append({"image": name, "caption": row["caption"], "category": row["category"], "price": price})
    lost = {"image": "cam1/IMG_9999.jpg", "caption": "a photo that was deleted", "category": "lost"}
    lines = [*map(json.dumps, pairs), json.dumps(lost), json.dumps({"image": "cam1/IMG_0001.jpg"})]
    (folder / "pairs.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    photo = (folder / pairs[0]["image"]).read_bytes()
    beside = {"cam1/broken.jpg": photo[:2000], "cam2/text.jpg": b"no image", "cam3/logo.svg": b"<svg/>"}
    for name, content in beside.items():
        (folder / name).write_bytes(content)


def row(what: str, start: float) -> None:
    """Print a row of the table."""
    print(f"| `{what}` | {time.perf_counter() - start:.1f} |", flush=True)


@contextlib.contextmanager
def serving(command: str, port: int, folder: Path, program: list[str], environment: dict[str, str]) -> Iterator[None]:
    """Run a command that serves in a folder; yield once the service is ready."""
    start, log = time.perf_counter(), folder.parent / f"{port}.log"
    words = [*program, *shlex.split(command)[1:]]
    with log.open("w") as file:
        process = subprocess.Popen(words, cwd=folder, env=environment, stdout=file, stderr=subprocess.STDOUT)
    try:
        while (state := ask(port, "/readyz")) is None or state["status"] == "starting":
            if process.poll() is not None:
                raise SystemExit(f"{command} ended:\n{log.read_text()}")
            time.sleep(0.05)
        row(command, start)
        yield
    finally:
        process.send_signal(signal.SIGINT)
        process.wait()


def search(port: int, query: str) -> None:
    """Search the service."""
    start = time.perf_counter()
    while ask(port, "/search/text", {"query": query, "k": 3}) is None:
        time.sleep(0.05)
    row(f'search "{query}"', start)


def ask(port: int, path: str, body: dict[str, Any] | None = None) -> dict[str, Any] | None:
    """Return the JSON of the service's response; None without one."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", data, {"content-type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=30) as response:
            value: dict[str, Any] = json.load(response)
            return value
    except urllib.error.HTTPError as error:
        with error:
            return json.load(error) | {"status": "starting"} if error.code == 503 else None
    except OSError:
        return None


def install(folder: Path) -> tuple[list[str], dict[str, str]]:
    """Clone and install into a new folder; return its program and environment."""
    clone = folder.parent / "dcar"
    for command in (f"git clone {ROOT} {clone}", f"make -C {clone} install"):
        start = time.perf_counter()
        subprocess.run(shlex.split(command), check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        row(command, start)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return [str(clone / ".venv" / "bin" / "dcar")], environment


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", type=int, default=900)
    parser.add_argument("--install", action="store_true", help="clone and install, which is timed apart")
    parser.add_argument("--query", default="crying cat")
    parser.add_argument("--model", help="open_clip model with random weights, in place of the bundled one")
    args = parser.parse_args()

    with tempfile.TemporaryDirectory() as temporary:
        folder, port = Path(temporary) / "home", free_port()
        make_photos(folder / "photos", args.photos)
        print("| command | seconds |\n| --- | --- |")
        program, environment = [sys.executable, "-m", "app.cli"], os.environ | {"PYTHONPATH": str(ROOT)}
        if args.install:
            program, environment = install(folder)
        environment["DCAR_RUNTIME_CACHE"] = f"{temporary}/runtimes"  # a new user has measured no runtime
        model = f"--model {random_model(folder / args.model, args.model).name} " if args.model else ""
        quickstart = f"dcar quickstart photos {model}--port {port}"
        with serving(quickstart, port, folder, program, environment):
            search(port, args.query)


if __name__ == "__main__":
    main()
