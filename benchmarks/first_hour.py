"""The first hour of a new user: from a folder of photos to an adapted search, with what goes wrong on the way.

    python benchmarks/first_hour.py                # a table of commands, seconds, exit statuses and messages
    python benchmarks/first_hour.py --install      # clones and installs first, and runs the commands of that clone
    python benchmarks/first_hour.py --shop         # the same of a shop: prices, brands, two pictures for each product

- The photos are pictures of the bundled example as JPEGs, in three folders of one camera each whose names collide, with
  captions in pairs.jsonl (one row bad, one image missing) and prices as texts. Among them: HEIC (with its extra),
  broken and empty files, SVG, a video.
- The model is the bundled one, so no weights are fetched; without a hub, the seconds include asking for it. `--model
  ViT-B-32-quickgelu` takes that model with random weights, which cost as much as trained ones once these are fetched.
- Commands after the first are those that it prints, with the settings it prints.
- The shop has an emoji's picture in both bundled styles as a product; its table is products.csv.
"""

import argparse
import base64
import contextlib
import csv
import io
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path
from random import Random
from typing import Any

from encode import random_model
from PIL import Image
from service import ROOT, free_port

from dcar_core.images import open_image

EMOJI = ROOT / "examples" / "emoji"
EXAMPLE = EMOJI / "twemoji"
BRANDS = ("Anker", "Birke", "Cedro", "Dalia")
KEY = "first-hour"
CAMERAS = ("cam1", "cam2", "cam3")
SIZE = (640, 480)
_NOISE = re.compile(r"\d%\||^\d{4}-\d\d-\d\d .* INFO ")  # progress bars, and the service's log


def make_photos(folder: Path, count: int, seed: int = 0) -> None:
    """Write a folder of `count` photos with captions, and the files that a camera and its owner leave beside them."""
    rows = [json.loads(line) for line in (EXAMPLE / "metadata.jsonl").read_text(encoding="utf-8").splitlines()]
    chosen = Random(seed).sample(rows, count)
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
    beside = {
        "cam1/broken.jpg": photo[:2000], "cam1/empty.jpg": b"",
        "cam2/text.jpg": b"no image", "cam2/MOV_0001.MOV": b"film",
        "cam3/logo.svg": b"<svg/>", "cam3/notes.txt": b"shopping", ".DS_Store": b"\0",
    }  # fmt: skip
    for name, content in beside.items():
        (folder / name).write_bytes(content)
    try:
        from pillow_heif import from_pillow
    except ImportError:  # the files are skipped by their suffix
        (folder / "cam1/IMG_9001.heic").write_bytes(b"a photo")
    else:
        for name in ("cam1/IMG_9001.heic", "cam2/IMG_9001.HEIC"):
            from_pillow(Image.open(io.BytesIO(photo))).save(folder / name)


def make_shop(folder: Path, count: int, seed: int = 0) -> None:
    """Write a folder of `count` products with a picture in each bundled style, and their table."""
    folder.mkdir(parents=True)
    lines = (EXAMPLE / "metadata.jsonl").read_text(encoding="utf-8").splitlines()
    chance = Random(seed)
    rows = sorted(map(json.loads, lines), key=lambda row: (not re.search(r"\bcat\b", row["caption"]), chance.random()))
    chosen = rows[:count]  # with all cats
    with (folder / "products.csv").open("w", encoding="utf-8", newline="") as file:
        table = csv.writer(file)
        table.writerow(["id", "image", "product", "title", "category", "brand", "price"])
        for style in ("twemoji", "openmoji"):
            with tarfile.open(EMOJI / style / "gallery.tar") as tar:
                names = set(tar.getnames())
                for row in chosen:
                    if row["file_name"] not in names:
                        continue
                    picture = tar.extractfile(row["file_name"])
                    assert picture is not None
                    name = f"{style}-{row['file_name']}"
                    (folder / name).write_bytes(picture.read())
                    number = sum(map(ord, row["id"]))  # the same in both styles
                    price = f"{number % 90 + 5}.{number % 10}0"
                    title, _, _ = row["caption"].partition(",")
                    table.writerow(
                        [Path(name).stem, name, row["id"], title, row["meta_category"], BRANDS[number % 4], price]
                    )


class Walk:
    """Runs commands in a folder and prints a row of the table for each."""

    def __init__(self, folder: Path, program: Sequence[str], environment: dict[str, str]) -> None:
        self.folder, self._program, self._environment = folder, program, environment
        print("| command | seconds | exit | said |\n| --- | --- | --- | --- |")

    def row(self, command: str, seconds: float, status: object, said: str) -> None:
        lines = [line for line in map(str.strip, said.splitlines()) if line and not _NOISE.search(line)]
        shown = "<br>".join(lines).replace(str(self.folder), "~").replace(str(ROOT), ".").replace("|", "\\|")
        print(f"| `{command}` | {seconds:.1f} | {status} | {shown} |", flush=True)

    def run(self, command: str) -> str:
        """Run a `dcar` command to its end, and return what it said."""
        start = time.perf_counter()
        words = [*self._program, *shlex.split(command)[1:]]
        done = subprocess.run(words, cwd=self.folder, env=self._environment, capture_output=True, text=True)
        said = done.stderr + done.stdout
        self.row(command, time.perf_counter() - start, done.returncode, said)
        return said

    @contextlib.contextmanager
    def serve(self, command: str, port: int) -> Iterator[str]:
        """Run a command that serves; yield what it said once the service is ready."""
        start, log = time.perf_counter(), self.folder.parent / f"{port}.log"
        words = [*self._program, *shlex.split(command)[1:]]
        with log.open("w") as file:
            process = subprocess.Popen(
                words, cwd=self.folder, env=self._environment, stdout=file, stderr=subprocess.STDOUT
            )
        try:
            while (state := ask(port, "/readyz")) is None or state["status"] == "starting":
                if process.poll() is not None:
                    raise SystemExit(f"{command} ended:\n{log.read_text()}")
                time.sleep(0.05)
            self.row(command, time.perf_counter() - start, "serves", log.read_text())
            yield log.read_text()
        finally:
            process.send_signal(signal.SIGINT)
            process.wait()

    def search(self, port: int, query: str, version: int = 1) -> None:
        """Search the service, once it serves a version."""
        start = time.perf_counter()
        while (found := ask(port, "/search/text", {"query": query, "k": 3})) is None or (
            found["index_version"] < version and time.perf_counter() - start < 60
        ):
            time.sleep(0.05)
        said = ", ".join(f"{each['caption'] or each['id']} ({each['score']:.2f})" for each in found["results"])
        self.row(f'search "{query}"', time.perf_counter() - start, f"version {found['index_version']}", said)

    def request(self, port: int, method: str, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        """Send a request with the admin key, and return the JSON of the response."""
        start = time.perf_counter()
        status, found = send(port, method, path, body)
        shown = json.dumps(body, ensure_ascii=False) if body and body.keys().isdisjoint({"items", "image"}) else ""
        if "results" in found:
            results = [each | each["metadata"] for each in found["results"]]
            said = ", ".join(f"{each['title']} {each['price']} ({each['level']})" for each in results)
            said += "; nothing fits" if found["nothing_fits"] else ""
        else:
            said = found.get("detail") or json.dumps(found, ensure_ascii=False)[:300]
        self.row(f"{method} {path} {shown}".strip(), time.perf_counter() - start, status, said)
        return found

    def until_done(self, port: int, method: str, path: str, body: dict[str, Any] | None = None) -> None:
        """Send a change, and wait until its job has ended: searches see it by then."""
        start = time.perf_counter()
        job = self.request(port, method, path, body)
        while job.get("status") in ("waiting", "running"):
            time.sleep(0.02)
            job = send(port, "GET", f"/jobs/{job['id']}")[1]
        self.row("... is published", time.perf_counter() - start, job.get("status", "-"), "")

    def readiness(self, port: int) -> None:
        state = ask(port, "/readyz")
        self.row("GET /readyz", 0.0, state and state["status"], json.dumps(state))


def send(port: int, method: str, path: str, body: dict[str, Any] | None = None) -> tuple[int, dict[str, Any]]:
    """Return the status and the JSON of the service's response to the owner of the admin key."""
    headers = {"content-type": "application/json", "authorization": f"Bearer {KEY}"}
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", data, headers, method=method)
    try:
        with urllib.request.urlopen(request, timeout=60) as response:
            return response.status, json.load(response)
    except urllib.error.HTTPError as error:
        with error:
            return error.code, json.load(error)


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


def hinted(said: str, command: str) -> str:
    """Return the command of this name that an output advises."""
    return re.findall(rf"^  ({command} .*)$", said, re.MULTILINE)[-1]  # type: ignore[no-any-return]


def install(walk_folder: Path) -> tuple[list[str], dict[str, str]]:
    """Clone and install into a new folder; return its program and environment."""
    clone = walk_folder.parent / "dcar"
    for command in (f"git clone {ROOT} {clone}", f"make -C {clone} install"):
        start = time.perf_counter()
        subprocess.run(shlex.split(command), check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        print(f"{command}: {time.perf_counter() - start:.1f} s", flush=True)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return [str(clone / ".venv" / "bin" / "dcar")], environment


def keep_shop(walk: Walk, products: int) -> None:
    """Index the shop, sort, change prices in every way, and look at the history."""
    make_shop(walk.folder / "shop", products)
    build = f"dcar index build --gallery shop/products.csv --checkpoint {EXAMPLE / 'checkpoint'} --out index"
    build += " --group-field product"
    walk.run(f"{build}s")
    walk.run(build)
    port = free_port()
    with walk.serve(f"dcar serve --index index --port {port}", port):
        cat = {"query": "cat", "k": 3, "group_by": "product", "hybrid": True, "fields": ["title", "price"]}
        for options in ({}, {"sort": "price"}, {"sort": "-price", "filter": {"brand": "Anker"}}):
            walk.request(port, "POST", "/search/text", cat | options)
        walk.request(port, "POST", "/search/text", cat | {"query": "qwzx"})
        walk.request(port, "POST", "/search/text", {"q": "cat"})
        first, second = send(port, "POST", "/search/text", {"query": "cat", "k": 2})[1]["results"]
        item = f"/items/{first['id']}"
        walk.until_done(port, "PATCH", item, {"metadata": {"price": 0.5}})
        walk.request(port, "POST", "/search/text", cat | {"sort": "price"})
        walk.request(port, "PATCH", f"{item}?strict=true", {"metadata": {"prise": 0.5}})
        walk.until_done(port, "PATCH", "/items", {"filter": {"brand": "Birke"}, "metadata": {"sale": True}})
        picture = base64.b64encode((EMOJI / "query.png").read_bytes()).decode()
        new = {"image": picture, "metadata": {"price": 0.7}}
        walk.until_done(port, "PUT", "/items", {"items": [{"id": first["id"], **new}]})
        walk.until_done(port, "PUT", item, new)
        walk.until_done(port, "DELETE", f"/items/{second['id']}")
        walk.until_done(port, "DELETE", "/items", {"filter": {"brand": "Cedro"}})
        walk.request(port, "GET", "/items?sort=-price&k=2")
        walk.request(port, "GET", "/v1/models")
        walk.request(port, "POST", "/v1/embeddings", {"input": "cat", "model": "clip"})
        walk.request(port, "GET", "/jobs?limit=2")
        prices = walk.folder / "prices.csv"
        prices.write_text(f"id,price\n{first['id']},0.9\nunknown,1\n", encoding="utf-8")
        walk.run("dcar index update index --metadata prices.csv")
        walk.run("dcar index list index")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", type=int, default=900)
    parser.add_argument("--only-start", action="store_true", help="end after the first search")
    parser.add_argument("--install", action="store_true", help="clone and install, which is timed apart")
    parser.add_argument("--shop", type=int, nargs="?", const=450, metavar="PRODUCTS", help="the walk of a shop")
    parser.add_argument("--query", default="crying cat")
    parser.add_argument("--model", help="open_clip model with random weights, in place of the bundled one")
    args = parser.parse_args()

    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "home"
        if args.shop:
            folder.mkdir()
        else:
            make_photos(folder / "photos", args.photos)
        program, environment = [sys.executable, "-m", "app.cli"], os.environ | {"PYTHONPATH": str(ROOT)}
        if args.install:
            program, environment = install(folder)
        environment["DCAR_RUNTIME_CACHE"] = f"{temporary}/runtimes"  # a new user has measured no runtime
        environment |= {"DCAR_WRITES": "true", "DCAR_ADMIN_KEY": KEY} if args.shop else {}
        walk = Walk(folder, program, environment)
        if args.shop:
            keep_shop(walk, args.shop)
            return
        port = free_port()
        model = f"--model {random_model(folder / args.model, args.model).name} " if args.model else ""
        with walk.serve(f"dcar quickstart photos {model}--port {port} --no-open", port) as said:
            walk.search(port, args.query)
            if args.only_start:
                return
            index = shlex.split(hinted(said, "dcar index build"))
            index_dir = index[index.index("--out") + 1]
            if "images cannot be used" in walk.run("dcar data check photos"):
                walk.run(f"{hinted(said, 'dcar train')} --skip-broken")
            else:
                walk.run(hinted(said, "dcar train"))
            if "not published" in walk.run(hinted(said, "dcar index build")):
                walk.run(f"{hinted(said, 'dcar index build')} --force")
            walk.search(port, args.query, version=2)
            go_wrong(walk, port, shlex.join(index[:-2]), index_dir)


def go_wrong(walk: Walk, port: int, build: str, index: str) -> None:
    """Lose a camera's folder, move the gallery, and add a folder with the same names."""
    photos = walk.folder / "photos"
    shutil.move(photos / "cam3", walk.folder / "cam3")
    walk.run(build)
    shutil.move(walk.folder / "cam3", photos / "cam3")
    photos.rename(walk.folder / "pictures")
    walk.readiness(port)
    walk.run(f"dcar index relocate {index} --gallery pictures")
    time.sleep(3)  # the service polls every two seconds
    walk.readiness(port)
    walk.run("dcar index build --gallery pictures/cam1 --checkpoint adapted --out cameras")
    walk.run("dcar index add cameras --gallery pictures/cam2")
    walk.run("dcar index add cameras --gallery cam2=pictures/cam2")
    walk.run(f"dcar index add {index} --gallery pictures/cam1")
    port = free_port()
    with walk.serve(f"dcar quickstart pictures --port {port} --no-open", port):
        pass


if __name__ == "__main__":
    main()
