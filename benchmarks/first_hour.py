"""The first hour of a new user: from a folder of photos, or a table of products, to the
first search.

    python benchmarks/first_hour.py [--shop]       # a table of commands and seconds
    python benchmarks/first_hour.py --install
        # clones and installs first, and runs the command of that clone

- The photos are pictures of the bundled example as JPEGs, in three folders of one
  camera each whose names collide, with captions in pairs.jsonl (one row bad, one image
  missing) and prices as texts. Some files are broken.
- The model is the bundled one, so no weights are fetched; without a hub, the seconds
  include asking for it. `--model ViT-B-32-quickgelu` takes that model with random
  weights, which cost as much as trained ones once these are fetched.
- The shop has 500 products with 848 pictures, one product a row, with English titles
  and German groups.
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
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import httpx
from encode import random_model
from PIL import Image, ImageOps
from service import ROOT

from dcar_core.images import open_image
from tests.support.processes import free_port

EXAMPLE = ROOT / "examples" / "emoji" / "twemoji"


def pictures(count: int) -> Iterator[tuple[dict[str, Any], Image.Image]]:
    """Yield rows of the bundled example and their pictures."""
    rows = [
        json.loads(line)
        for line in (
            (EXAMPLE / "metadata.jsonl").read_text(encoding="utf-8").splitlines()
        )
    ]
    with tarfile.open(EXAMPLE / "gallery.tar") as tar:
        for entry in Random(0).sample(rows, count):
            member = tar.extractfile(entry["file_name"])
            assert member is not None
            yield entry, open_image(member.read())


def make_shop(folder: Path) -> None:
    """Write products.csv, its pictures, and prices.csv with other prices."""
    folder.mkdir()
    products = ["sku,image,title,gruppe,price"]
    prices = ["sku,price"]
    for number, (entry, picture) in enumerate(pictures(500)):
        names = [f"{number}{side}.jpg" for side in ("", "-back")[: 1 + (number < 348)]]
        for name, image in zip(
            names,
            (picture, ImageOps.mirror(picture)),
            strict=False,
        ):
            image.convert("RGB").save(folder / name)
        group = "Flagge" if entry["meta_category"] == "country-flag" else "Ware"
        products.append(
            f'A-{number},{"|".join(names)},"{entry["category"]}",{group},{number}.5'
        )
        prices.append(f"A-{number},{number}.9")
    for name, lines in (("products.csv", products), ("prices.csv", prices)):
        (folder / name).write_text("\n".join(lines) + "\n", encoding="utf-8")


def make_photos(folder: Path, count: int) -> None:
    """Write a folder of `count` photos with captions, and the files that a camera and
    its owner leave beside them.
    """
    pairs = list[dict[str, Any]]()
    for number, (entry, picture) in enumerate(pictures(count)):
        photo = Image.new("RGB", (640, 480), "white")
        photo.paste(picture.resize((400, 400)), (120, 40))
        name = f"cam{number % 3 + 1}/IMG_{number // 3 + 1:04}.jpg"
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        photo.save(folder / name, quality=90)
        price = "10,50" if number % 2 else "$12"
        pairs.append(
            {
                "image": name,
                "caption": entry["caption"],
                "category": entry["category"],
                "price": price,
            }
        )
    lost = {
        "image": "cam1/IMG_9999.jpg",
        "caption": "a photo that was deleted",
        "category": "lost",
    }
    lines = [
        *map(json.dumps, pairs),
        json.dumps(lost),
        json.dumps({"image": "cam1/IMG_0001.jpg"}),
    ]
    (folder / "pairs.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    photo = (folder / pairs[0]["image"]).read_bytes()
    beside = {
        "cam1/broken.jpg": photo[:2000],
        "cam2/text.jpg": b"no image",
        "cam3/logo.svg": b"<svg/>",
    }
    for name, content in beside.items():
        (folder / name).write_bytes(content)


def row(what: str, start: float) -> None:
    """Print a row of the table."""
    print(f"| `{what}` | {time.perf_counter() - start:.1f} |", flush=True)


@contextlib.contextmanager
def serving(
    command: str,
    port: int,
    folder: Path,
    program: list[str],
    environment: dict[str, str],
) -> Iterator[None]:
    """Run a command that serves in a folder; yield once the service is ready."""
    start = time.perf_counter()
    log = folder.parent / f"{port}.log"
    words = [*program, *shlex.split(command)[1:]]
    with log.open("w") as file:
        process = subprocess.Popen(
            words,
            cwd=folder,
            env=environment,
            stdout=file,
            stderr=subprocess.STDOUT,
        )
    try:
        while not ask(port, "/readyz"):
            if process.poll() is not None:
                raise SystemExit(f"{command} ended:\n{log.read_text()}")
            time.sleep(0.05)
        row(command, start)
        yield
    finally:
        process.send_signal(signal.SIGINT)
        process.wait()


def ask(port: int, path: str, body: dict[str, Any] | None = None) -> bool:
    """Return whether the service responds with 200."""
    with contextlib.suppress(httpx.TransportError):
        method = "GET" if body is None else "POST"
        url = f"http://127.0.0.1:{port}{path}"
        return httpx.request(method, url, json=body, timeout=30).status_code == 200
    return False


def install(folder: Path) -> tuple[list[str], dict[str, str]]:
    """Clone and install into a new folder; return its program and environment."""
    clone = folder.parent / "dcar"
    for command in (f"git clone {ROOT} {clone}", f"make -C {clone} install"):
        start = time.perf_counter()
        subprocess.run(
            shlex.split(command),
            check=True,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        row(command, start)
    environment = {
        name: value for name, value in os.environ.items() if name != "PYTHONPATH"
    }
    return [str(clone / ".venv" / "bin" / "dcar")], environment


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--install",
        action="store_true",
        help="clone and install, which is timed apart",
    )
    parser.add_argument(
        "--shop",
        action="store_true",
        help="a table of products in place of photos",
    )
    parser.add_argument(
        "--model",
        help="open_clip model with random weights, in place of the bundled one",
    )
    args = parser.parse_args()

    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "home"
        port = free_port()
        make_shop(folder) if args.shop else make_photos(folder / "photos", 900)
        print("| command | seconds |\n| --- | --- |")
        program = [sys.executable, "-m", "app.cli"]
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        if args.install:
            program, environment = install(folder)
        # a new user has measured no runtime
        environment["DCAR_RUNTIME_CACHE"] = f"{temporary}/runtimes"
        if args.model:
            model = f"--model {random_model(folder / args.model, args.model).name} "
        else:
            model = ""
        serve = f"dcar quickstart photos {model}--port {port}"
        if args.shop:
            build = (
                "dcar index build --gallery products.csv --checkpoint"
                f" {EXAMPLE / 'checkpoint'} --out index"
            )
            for command in (
                build,
                "dcar index update index --metadata prices.csv --by sku",
            ):
                start = time.perf_counter()
                subprocess.run(
                    [*program, *shlex.split(command)[1:]],
                    cwd=folder,
                    env=environment,
                    check=True,
                )
                row(command.replace(f"{EXAMPLE}/", ""), start)
            serve = f"dcar serve --index index --port {port}"
        with serving(serve, port, folder, program, environment):
            for query in ("crying cat", "Flagge"):
                start = time.perf_counter()
                while not ask(
                    port,
                    "/search/text",
                    {"query": query, "hybrid": args.shop, "k": 3},
                ):
                    time.sleep(0.05)
                row(f'search "{query}"', start)


if __name__ == "__main__":
    main()
