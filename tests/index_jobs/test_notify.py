"""Notification of services after a rebuild."""

from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from index_jobs.jobs.notify import notify
from tests.support.processes import answering
from tests.support.versions import Build


def test_summary_lists_notified_services(build: Build, caplog: pytest.LogCaptureFixture) -> None:
    targets = ["http://127.0.0.1:9", "redis://:secret@127.0.0.1:9/0"]
    summary = build(notify=targets)
    assert summary.published
    assert summary.notified.keys() == {"http://127.0.0.1:9", "redis://127.0.0.1:9/0"}
    assert all("not reached" in told for told in summary.notified.values())
    assert "secret" not in caplog.text


@pytest.mark.parametrize(
    ("target", "shown"),
    [
        ("http://user:s3cret@127.0.0.1:9", "http://127.0.0.1:9"),
        ("redis://:pa/s3cret@127.0.0.1:9", "redis://127.0.0.1:9"),
        ("redis://:s3cret/pa@127.0.0.1:9", "redis://127.0.0.1:9"),  # Python's error quotes it as a port
        ("redis://:pa?s3cret@127.0.0.1:9", "redis://"),
        ("redis://127.0.0.1:9/0?password=s3cret", "redis://127.0.0.1:9/0"),
        ("redis://127.0.0.1:9/0?password=s3@cret", "redis://"),
    ],
)
def test_passwords_are_never_shown(target: str, shown: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    told = notify([target], tmp_path, 1)
    assert told.keys() == {shown}
    assert "not reached" in told[shown]
    for part in ("s3", "cret", "pa/", "pa?"):
        assert part not in f"{told} {caplog.text}"


def test_redirect_is_not_followed_with_the_admin_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Away(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            asked.append(self.path)
            self.send_response(302)
            self.send_header("Location", f"http://localhost:{self.connection.getsockname()[1]}/elsewhere")
            self.end_headers()

        do_GET = do_POST  # noqa: N815

        def log_message(self, *args: object) -> None:
            pass

    asked: list[str] = []
    monkeypatch.setenv("DCAR_ADMIN_KEY", "long enough")
    server = ThreadingHTTPServer(("127.0.0.1", 0), Away)
    url = f"http://127.0.0.1:{server.server_port}"
    with answering(server):
        told = notify([url], tmp_path, 1)[url]
    assert told.startswith("not reached: 302")
    assert asked == ["/admin/reload"]
