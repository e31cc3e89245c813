"""The whole job, as a function and as a command: reuse, exit codes, full disks, and being killed anywhere."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from filelock import FileLock

from dcar_core import Encoder
from dcar_core.errors import DcarError
from index_jobs.artifact import current_version, open_current, verify_index, version_numbers
from index_jobs.gallery import scan
from index_jobs.job import Job
from index_jobs.manifest import Manifest
from index_jobs.options import Options
from index_jobs.rebuild import RebuildSummary, main, rebuild


@pytest.fixture
def gallery(tiny_gallery: Path, tmp_path: Path) -> Path:
    """A copy to break things in."""
    return Path(shutil.copytree(tiny_gallery, tmp_path / "gallery", copy_function=shutil.copy2))


def test_published_vectors_are_the_encoders(tiny_gallery: Path, tiny_checkpoint: Path, tmp_path: Path) -> None:
    summary = rebuild(tiny_gallery, tiny_checkpoint, tmp_path / "index", progress=False)
    artifact = open_current(tmp_path / "index")
    encoder = Encoder.load(tiny_checkpoint, device="cpu")
    artifact.require(encoder.fingerprint)
    paths = [tiny_gallery / name for name in scan(tiny_gallery).table["name"].to_pylist()]
    found = np.stack([artifact.vector(row) for row in range(24)])
    np.testing.assert_allclose(found, encoder.encode_images(paths), atol=1e-5)
    manifest = artifact.manifest
    assert (summary.version, summary.count, summary.failed, summary.reused) == (1, 24, 0, False)
    assert (summary.fingerprint, summary.kind, summary.dim) == (encoder.fingerprint, "Flat", 32)
    assert summary.images_per_second > 0
    assert (manifest.metric, manifest.source, manifest.measured["query_source"]) == (
        "inner_product", str(tiny_gallery), "captions",
    )  # fmt: skip
    assert (summary.published, summary.gate) == (True, None)  # there was nothing to compare with


def test_another_kind_or_other_captions_need_no_encoding(gallery: Path, tiny_checkpoint: Path, tmp_path: Path) -> None:
    index = tmp_path / "index"

    def run(**options: object) -> tuple[int, int]:
        summary = rebuild(gallery, tiny_checkpoint, index, progress=False, **options)
        assert summary.published
        return summary.encoded, summary.resumed

    assert run() == (24, 0)
    assert run(kind="hnsw") == (0, 24)
    captions = (gallery / "metadata.jsonl").read_text()
    (gallery / "metadata.jsonl").write_text(captions.replace("a red circle", "a crimson circle"))
    assert run(kind="hnsw") == (0, 24)
    assert open_current(index).item(5).caption == "a crimson circle"
    assert run(kind="ivf", keep_shards=False) == (0, 24)
    assert not (index / "work").exists()
    assert run(kind="flat") == (24, 0)


def test_only_the_newest_vectors_are_kept(
    gallery: Path, tiny_checkpoint: Path, other_checkpoint: Path, tmp_path: Path
) -> None:
    for checkpoint in (tiny_checkpoint, other_checkpoint):
        rebuild(gallery, checkpoint, tmp_path / "index", progress=False, margin=1)
    assert len(list((tmp_path / "index" / "work").iterdir())) == 1


def test_nothing_is_done_twice(gallery: Path, tiny_checkpoint: Path, other_checkpoint: Path, tmp_path: Path) -> None:
    def run(checkpoint: Path = tiny_checkpoint, kind: str = "auto", force: bool = False) -> RebuildSummary:
        return rebuild(gallery, checkpoint, tmp_path / "index", kind=kind, force=force, margin=1, progress=False)

    assert not run().reused
    again = run()
    assert (again.reused, again.version, again.encoded) == (True, 1, 0)
    touched = Path(shutil.copytree(tiny_checkpoint, tiny_checkpoint.parent / f"touched-{tmp_path.name}"))
    config = json.loads((touched / "config.json").read_text())
    (touched / "config.json").write_text(json.dumps(config))  # other bytes, the same model
    assert run(touched).reused
    assert not run(force=True).reused
    assert not run(kind="hnsw").reused
    assert not run(other_checkpoint, kind="hnsw").reused
    captions = (gallery / "metadata.jsonl").read_text()
    (gallery / "metadata.jsonl").write_text(captions.replace("a red circle", "a crimson circle"))
    assert not run(other_checkpoint, kind="hnsw").reused
    assert version_numbers(tmp_path / "index") == [3, 4, 5]
    assert open_current(tmp_path / "index").item(5).caption == "a crimson circle"


def test_failed_pictures_are_published_with_the_version(gallery: Path, tiny_checkpoint: Path, tmp_path: Path) -> None:
    (gallery / "circle" / "blue.png").write_bytes(b"")
    summary = rebuild(gallery, tiny_checkpoint, tmp_path / "index", progress=False)
    assert (summary.count, summary.failed) == (23, 1)
    artifact = open_current(tmp_path / "index")
    (line,) = (artifact.path / "failed.jsonl").read_text().splitlines()
    assert json.loads(line)["name"] == "circle/blue.png"
    assert json.loads(line)["reason"] == "the file is empty"
    assert [artifact.item(row).metadata["file_name"] for row in (0, 1, 2)] == [
        "circle/black.png", "circle/green.png", "circle/orange.png",
    ]  # fmt: skip
    assert rebuild(gallery, tiny_checkpoint, tmp_path / "index", progress=False).reused


@pytest.fixture
def listed(gallery: Path, tmp_path: Path) -> Path:
    """The gallery as a list of URLs, of which nothing is known but what they are."""
    rows = [json.loads(line) for line in (gallery / "metadata.jsonl").read_text().splitlines()]
    lines = [json.dumps(row | {"file_name": f"file://{gallery}/{row['file_name']}"}) for row in rows]
    (tmp_path / "list.jsonl").write_text("\n".join(lines))
    return tmp_path / "list.jsonl"


def test_pictures_that_could_not_be_read_are_tried_again(
    gallery: Path, listed: Path, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    """Rows 3 and 20 are missing for a while, row 10 is no picture; of three shards only those of the first two."""
    names = [json.loads(line)["file_name"].partition(f"{gallery}/")[2] for line in listed.read_text().splitlines()]

    def run(index: str = "index", **options: object) -> RebuildSummary:
        return rebuild(listed, tiny_checkpoint, tmp_path / index, batch_size=4, shard_rows=8, max_failed=0.2,
                       progress=False, **options)  # fmt: skip

    (gallery / names[10]).write_bytes(b"no picture")
    undisturbed = run("other")
    assert (undisturbed.failed, undisturbed.unread, undisturbed.hint) == (1, 0, "")
    away = {row: (gallery / names[row]).rename(tmp_path / f"{row}.png") for row in (3, 20)}
    first = run()
    assert (first.count, first.failed, first.unread) == (21, 3, 2)
    lines = (open_current(tmp_path / "index").path / "failed.jsonl").read_text().splitlines()
    assert [json.loads(line)["kind"] for line in lines] == ["reading", "picture", "reading"]
    assert (run(force=True).encoded, run(kind="hnsw").encoded) == (0, 0), "what is still missing costs no encoding"
    again = run(kind="hnsw")
    assert (again.reused, again.unread) == (True, 2)
    assert again.hint.startswith("pictures that could not be read: 2")
    assert again.hint.endswith("give --force")

    away[3].rename(gallery / names[3])
    assert run(kind="hnsw").reused, "nobody looks into a gallery for a job that has nothing to do"
    second = run(kind="hnsw", force=True)
    assert (second.count, second.unread, second.encoded, second.resumed) == (22, 1, 8, 16)
    away[20].rename(gallery / names[20])
    third = run(force=True)
    assert (third.count, third.failed, third.unread, third.hint) == (23, 1, 0, "")
    assert (third.encoded, third.resumed) == (8, 16)
    ours, theirs = open_current(tmp_path / "index"), open_current(tmp_path / "other")
    np.testing.assert_array_equal(ours.vectors(np.arange(23)), theirs.vectors(np.arange(23)))
    assert [ours.item(row) for row in range(23)] == [theirs.item(row) for row in range(23)]
    assert run(force=True).encoded == 0, "what is no picture is not tried again"


def test_a_gallery_that_was_away_does_not_keep_its_job_from_going_on(
    gallery: Path, listed: Path, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    """Some of it encoded, then too much of it away: once it is back, the same command goes on."""
    settings = {"batch_size": 2, "shard_rows": 2, "max_failed": 0.3, "progress": False}
    shutil.move(gallery / "triangle", tmp_path / "triangle")
    shutil.move(gallery / "cross", tmp_path / "cross")
    with pytest.raises(DcarError, match="too few pictures"):
        rebuild(listed, tiny_checkpoint, tmp_path / "index", **settings)
    for name in ("triangle", "cross"):
        shutil.move(tmp_path / name, gallery / name)
    summary = rebuild(listed, tiny_checkpoint, tmp_path / "index", **settings)
    assert (summary.count, summary.failed) == (24, 0)


def test_failures_of_older_versions_have_their_kind_from_the_reason(
    gallery: Path, listed: Path, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    (gallery / "circle" / "blue.png").unlink()
    rebuild(listed, tiny_checkpoint, tmp_path / "index", progress=False)
    path = open_current(tmp_path / "index").path / "failed.jsonl"
    line = json.loads(path.read_text())
    del line["kind"]
    path.write_text(json.dumps(line))
    job = Job(scan(listed), tiny_checkpoint, "", tmp_path / "index", Options(), 0.0)
    manifest = Manifest.read(path.with_name("manifest.json"))
    assert job.summary(manifest).unread == 1
    path.unlink()
    assert job.summary(manifest).hint == ""


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "index_jobs.rebuild", *map(str, arguments)]


def test_command_prints_json_on_stdout_and_progress_on_stderr(
    tiny_gallery: Path, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    arguments = (
        "--gallery",
        tiny_gallery,
        "--checkpoint",
        tiny_checkpoint,
        "--out",
        tmp_path / "index",
        "--kind",
        "ivf",
    )
    done = subprocess.run(command(*arguments), capture_output=True, text=True, check=True)
    summary = json.loads(done.stdout)
    assert (summary["version"], summary["count"], summary["reused"], summary["kind"]) == (1, 24, False, "IVF1,Flat")
    assert "24/24" in done.stderr
    again = subprocess.run(command(*arguments, "--quiet"), capture_output=True, text=True, check=True)
    assert json.loads(again.stdout)["reused"] is True
    assert again.stderr == ""


def test_help_teaches_and_loads_nothing_heavy() -> None:
    code = "import sys; from index_jobs.rebuild import main, rebuild; print(*sys.modules); main(['--help'])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    modules, _, text = done.stdout.partition("\n")
    assert not {"torch", "faiss", "pyarrow", "open_clip"} & set(modules.split())
    for part in ("--gallery", "--checkpoint", "--out", "exit codes:", "metadata.jsonl", "goes on where it stopped"):
        assert part in text


def test_every_failure_has_its_exit_code_and_one_line(
    gallery: Path, tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "index"

    def run(
        *more: object, gallery: Path = gallery, checkpoint: Path = tiny_checkpoint, out: Path = out
    ) -> tuple[int, str]:
        arguments = ["--gallery", gallery, "--checkpoint", checkpoint, "--out", out, "--quiet", *more]
        code = main([str(argument) for argument in arguments])
        stdout, stderr = capsys.readouterr()
        assert stdout == ""
        assert stderr.startswith("error: ")
        assert stderr.count("\n") == 1
        return code, stderr

    broken = Path(shutil.copytree(tiny_checkpoint, tmp_path / "broken"))
    (broken / "trainables.safetensors").write_bytes(b"no tensors")
    (tmp_path / "file").write_text("")
    assert run(gallery=tmp_path / "nowhere")[0] == 3
    assert run("--kind", "nonsense")[0] == 3
    assert run(checkpoint=tmp_path / "nowhere")[0] == 4
    assert run(checkpoint=gallery)[0] == 4
    assert run(checkpoint=broken)[0] == 4
    assert run("--device", "cuda:99")[0] == 4
    assert run(out=tmp_path / "file")[0] == 1
    out.mkdir(exist_ok=True)
    with FileLock(out / ".lock"):
        assert run()[0] == 5
    for name in ("black", "blue", "green"):
        (gallery / "circle" / f"{name}.png").write_bytes(b"")
    code, line = run()
    assert code == 3
    assert line.count("the file is empty") == 3
    assert current_version(out) is None
    assert list((out / "versions").iterdir()) == []


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        (["--batch-size", "0"], "a whole number of at least 1, not 0"),
        (["--workers", "-1"], "a whole number of at least 0, not -1"),
        (["--keep", "two"], "a whole number of at least 1, not two"),
        (["--max-failed", "2"], "a share from 0 to 1, not 2"),
        (["--margin", "a bit"], "a share from 0 to 1, not a bit"),
        (["--unknown"], "--unknown"),
        ([], "--gallery"),
    ],
)
def test_wrong_usage_is_exit_code_2(wrong: list[str], told: str, capsys: pytest.CaptureFixture[str]) -> None:
    needed = ["--gallery", "g", "--checkpoint", "c", "--out", "o"] if wrong else []
    with pytest.raises(SystemExit) as caught:
        main([*needed, *wrong])
    assert caught.value.code == 2
    assert told in capsys.readouterr().err


FULL_DISK = """
import resource, sys
from pathlib import Path
from index_jobs.rebuild import main
for limit in sys.argv[1].split(","):
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(limit), resource.RLIM_INFINITY))
    print(main(sys.argv[2:]))
"""


@pytest.mark.skipif(sys.platform == "win32", reason="limits the size of files as POSIX does")
def test_full_disk_leaves_everything_as_it_was(gallery: Path, tiny_checkpoint: Path, tmp_path: Path) -> None:
    """No file may grow beyond a limit: first the checkpoint fails, then the items."""
    index = tmp_path / "index"
    rebuild(gallery, tiny_checkpoint, index, progress=False)
    captions = (gallery / "metadata.jsonl").read_text().replace("a red circle", "red " * 20_000)
    (gallery / "metadata.jsonl").write_text(captions)
    before = sorted(path.relative_to(index) for path in (index / "versions").rglob("*"))
    arguments = ["--gallery", gallery, "--checkpoint", tiny_checkpoint, "--out", index, "--quiet"]
    done = subprocess.run(
        [sys.executable, "-c", FULL_DISK, "10000,50000", *map(str, arguments)], capture_output=True, text=True
    )
    assert done.stdout.split() == ["1", "1"], done.stderr
    lines = done.stderr.splitlines()
    assert len(lines) == 2
    for line in lines:
        assert "cannot be written: File too large" in line
        assert "what was published before is unchanged" in line
    assert sorted(path.relative_to(index) for path in (index / "versions").rglob("*")) == before
    assert [manifest.version for manifest in verify_index(index)] == [1]
    summary = rebuild(gallery, tiny_checkpoint, index, progress=False)
    assert (summary.version, summary.resumed) == (2, 24)  # the second failure came after encoding


def test_disk_without_room_is_known_before_encoding(
    gallery: Path, tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """24 vectors of 32 take 3,072 bytes as shards, and as many again in the index."""
    index = tmp_path / "index"
    usage = shutil.disk_usage(tmp_path)

    def left(free: int) -> None:
        monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=free))

    table = scan(gallery).table.nbytes
    left(table + 2 * 3072 - 1)
    with pytest.raises(DcarError, match=r"takes at least 0\.0 GB more, of which 0\.0 are vectors.* GB left; make room"):
        rebuild(gallery, tiny_checkpoint, index, progress=False)
    assert list(index.glob("work*")) == list((index / "versions").iterdir()) == []
    left(table + 2 * 3072)
    assert rebuild(gallery, tiny_checkpoint, index, progress=False).encoded == 24
    left(table + 3072)  # the vectors are there already
    assert rebuild(gallery, tiny_checkpoint, index, progress=False, force=True).encoded == 0


KILLED = """
# Imports once, then forks a job for each line of stdin and kills it after so many seconds.
import os, signal, sys, time
from pathlib import Path
import faiss, open_clip, pyarrow.compute, torch
import dcar_core.encoder, index_jobs.gate, index_jobs.job, index_jobs.updates
from index_jobs.artifact import open_current
from index_jobs.rebuild import rebuild
from index_jobs.updates import add, remove
gallery, more, checkpoint, index = map(Path, sys.argv[1:])
settings = {"workers": 0, "batch_size": 2, "progress": False}
for line in sys.stdin:
    delay, what = line.split()
    child = os.fork()
    if child == 0:
        torch.set_num_threads(1)
        if what == "rebuild":
            rebuild(gallery, checkpoint, index, shard_rows=2, force=True, keep_shards=False, **settings)
        elif what == "add":
            add(index, more, replace_known=True, **settings)
        else:
            remove(index, [open_current(index).item(int(open_current(index).live.argmax())).id])
        os._exit(0)
    time.sleep(float(delay))
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    print("killed" if os.WIFSIGNALED(status) else f"exit {os.WEXITSTATUS(status)}", flush=True)
"""


def vectors_of(index: Path) -> dict[str, np.ndarray]:
    """The vector of every item that can be found, by its id."""
    artifact = open_current(index)
    return {artifact.item(row).id: artifact.vector(row) for row in np.flatnonzero(artifact.live).tolist()}


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks jobs, to kill many in a short time")
def test_killed_fifty_times_current_always_verifies(gallery: Path, tiny_checkpoint: Path, tmp_path: Path) -> None:
    index, more = tmp_path / "index", tmp_path / "more"
    shutil.copytree(gallery / "circle", more / "round")  # other names, other ids
    settings = {"workers": 0, "batch_size": 2, "shard_rows": 2, "progress": False}
    undisturbed = {}
    for number, source in enumerate((gallery, more)):
        rebuild(source, tiny_checkpoint, tmp_path / str(number), **settings)
        undisturbed |= vectors_of(tmp_path / str(number))
    rebuild(gallery, tiny_checkpoint, index, **settings)
    generator, delays, versions = np.random.default_rng(), [], [1]
    longest = {"rebuild": 3.0, "add": 3.0, "remove": 3.0}
    outcomes: list[str] = []
    driver = [sys.executable, "-c", KILLED, *map(str, (gallery, more, tiny_checkpoint, index))]
    with subprocess.Popen(driver, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        while outcomes.count("killed") < 50:
            what = ("rebuild", "add", "rebuild", "remove")[len(outcomes) % 4]
            delays.append((what, generator.uniform(0.005, longest[what])))
            process.stdin.write(f"{delays[-1][1]} {what}\n")
            process.stdin.flush()
            outcomes.append(process.stdout.readline().strip())
            assert outcomes[-1] in {"killed", "exit 0"}, f"delays {delays}"
            if outcomes[-1] == "exit 0":  # it had ended by then, so that later ones are killed earlier
                longest[what] = min(longest[what], delays[-1][1])
            assert {manifest.version for manifest in verify_index(index)} >= {current_version(index)}
            versions.append(open_current(index).manifest.version)
            assert versions[-1] >= versions[-2]
            found = vectors_of(index)
            assert len(found) >= 18, f"delays {delays}"
            assert all(np.allclose(undisturbed[name], found[name], atol=1e-6) for name in found), f"delays {delays}"
        process.stdin.close()
    assert "exit 0" in outcomes, "no job got to its end, so nothing was published under threat"
    summary = rebuild(gallery, tiny_checkpoint, index, force=True, keep_shards=False, **settings)
    assert summary.version > versions[-1]
    assert len(vectors_of(index)) == 24
    assert [path for path in (index / "versions").iterdir() if not path.name.isdigit()] == []
    assert not (index / "work").exists()


def children_of(pid: int) -> list[int]:
    """Every process that descends from pid."""
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parents[int(stat.parent.name)] = int(stat.read_text().rsplit(")", 1)[1].split()[1])
        except OSError:
            continue
    found = [pid]
    for known in found:
        found += [child for child, parent in parents.items() if parent == known]
    return found[1:]


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="finds child processes in /proc")
def test_killed_command_takes_its_workers_along_and_resumes(
    gallery: Path, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    for copy in range(16):
        shutil.copytree(gallery / "circle", gallery / f"copy{copy}")
    index = tmp_path / "index"
    arguments = [
        "--gallery", gallery, "--checkpoint", tiny_checkpoint, "--out", index,
        "--workers", 2, "--batch-size", 1, "--shard-rows", 1, "--quiet",
    ]  # fmt: skip
    with subprocess.Popen(command(*arguments), stdout=subprocess.DEVNULL) as process:
        limit = time.monotonic() + 60
        while len(list(index.glob("work/*/*.json"))) < 5:
            assert process.poll() is None
            assert time.monotonic() < limit
            time.sleep(0.02)
        workers = children_of(process.pid)
        assert len(workers) >= 2
        os.kill(process.pid, signal.SIGKILL)
    limit = time.monotonic() + 20
    while any(map(alive, workers)):
        assert time.monotonic() < limit, "a worker outlived its job"
        time.sleep(0.05)
    assert current_version(index) is None
    summary = rebuild(gallery, tiny_checkpoint, index, workers=0, batch_size=1, shard_rows=1, progress=False)
    assert summary.resumed >= 5
    assert (summary.count, summary.resumed + summary.encoded) == (120, 120)
    verify_index(index)
