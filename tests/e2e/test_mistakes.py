"""Mistakes at the command line end in one line that names them."""

from pathlib import Path

import pytest

from tests.support.commands import dcar


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("search", "dog", "--index", "/nowhere"), "/nowhere"),
        (("serve", "--index", "/nowhere"), "dcar index build"),
        (("serve",), "no index: give --index DIR"),
        (("serve", "--index", "/nowhere", "--collection", "one"), "--collection is NAME=DIR, not 'one'"),
        (
            ("serve", "--index", "/nowhere", "--collection", "one=/a", "--collection", "one=/b"),
            "--collection gives two indexes one name",
        ),
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
    done = dcar(*(a.format(model=tiny_model) for a in args))
    assert done.returncode == (3 if args[0] in ("train", "data") else 1), "3 where it is the data"
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert len(done.stderr.strip().splitlines()) <= 2
