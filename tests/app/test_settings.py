"""Settings from flags and the environment, and errors about wrong ones."""

from pathlib import Path

import pytest

from app.core.settings import load_settings
from dcar_core.util.errors import DcarError


def test_flags_take_precedence_over_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("DCAR_PORT", "9000")
    monkeypatch.setenv("DCAR_MAX_K", "17")
    monkeypatch.setenv("DCAR_REDIS_URL", "")
    settings = load_settings(index=tmp_path, port=9001, host=None)
    assert (settings.port, settings.max_k, settings.host, settings.redis_url) == (9001, 17, "127.0.0.1", None)


@pytest.mark.parametrize(
    ("mistyped", "meant"),
    [("PROT", "PORT"), ("HOTS", "HOST"), ("REDIS", "REDIS_URL"), ("API_KEY", "API_KEYS"), ("MAXK", "MAX_K")],
)
def test_a_mistyped_variable_ends_the_start_with_the_nearest_name(
    mistyped: str, meant: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv(f"DCAR_{mistyped}", "1")
    with pytest.raises(DcarError, match=f"DCAR_{mistyped}: unknown setting; did you mean DCAR_\\w*{meant}"):
        load_settings(index=tmp_path)


def test_a_removed_variable_ends_the_start_with_its_successors(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("DCAR_MAX_QUEUE_MS", "2000")
    with pytest.raises(DcarError, match=r"DCAR_MAX_QUEUE_MS: .*DCAR_MAX_PENDING and DCAR_DEADLINE_MS"):
        load_settings(index=tmp_path)


@pytest.mark.parametrize("other", ["FEATURES", "CAPTION_API_KEY", "DOMAIN", "SERVICE_HOST", "PORT_8000_TCP_ADDR"])
def test_variables_of_other_programs_are_ignored(other: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(f"DCAR_{other}", "x")
    load_settings(index=tmp_path)


DIGITS = "64 hexadecimal digits"
WRONG = [
    ("PORT", "many", ""),
    ("ADMIN_KEY", "tiny&", ""),
    *(("ADMIN_KEY", key, DIGITS) for key in ("sha256:abcdef", f"sha256:{64 * 'g'}", f"sha256:{65 * 'a'}")),
    ("ADMIN_KEY", f"admin:{64 * 'a'}", DIGITS),
    ("ADMIN_KEY", "pässwörd123", "ASCII"),
    ("FEEDBACK_TEXTS", "true", "needs DCAR_FEEDBACK"),
    *(("API_KEYS", keys, "") for keys in ("x", " , ", "shop:abcdef")),
    *(("COLLECTIONS", wrong, "") for wrong in ("a=b", '["index"]', '{"a": 5}', '{".hidden": "x"}', '{"a/b": "x"}')),
    *(("CORS_ORIGINS", wrong, "") for wrong in ("shop", "https://shop.example/path", "https://*.shop.example")),
    *(
        ("IMAGE_HOSTS", wrong, r"must be host names such as pictures\.example\.org")
        for wrong in ("https://a.example", "a.example/pictures", "b.example, a.example:8080")
    ),
    *(
        ("RATE_LIMIT", wrong, "")
        for wrong in ("fast", "20/second, 600/minute", "20/second; 600/minute", "0/second", "-1/second", "20")
    ),
    ("WRITES", "true", "needs DCAR_ADMIN_KEY, or a key in DCAR_API_KEYS"),
    ("REDIS_URL", "http://localhost", "redis://"),
]


@pytest.mark.parametrize(("name", "wrong", "message"), WRONG)
def test_a_wrong_value_is_refused_by_the_name_of_its_setting(
    name: str, wrong: str, message: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv(f"DCAR_{name}", wrong)
    with pytest.raises(DcarError, match=f"DCAR_{name}.*{message}") as caught:
        load_settings(index=tmp_path)
    assert name != "ADMIN_KEY" or wrong not in str(caught.value)


def test_an_index_is_needed_and_has_a_name_of_its_own(tmp_path: Path) -> None:
    with pytest.raises(DcarError, match="DCAR_INDEX"):
        load_settings()
    with pytest.raises(DcarError, match="DCAR_COLLECTIONS"):
        load_settings(index=tmp_path, collections={tmp_path.name: tmp_path})


def test_values_are_read_as_requests_send_them_and_secrets_are_not_shown(tmp_path: Path) -> None:
    for right in ("sha256:" + "aB" * 32, "sha256:" + "a" * 64 + "\n", "sha 256 is no prefix", "  a: spaces around "):
        known = load_settings(index=tmp_path, admin_key=right).admin_key
        assert known is not None
        assert known.get_secret_value() == right.strip(), "white space is stripped, as from a request"
    settings = load_settings(
        index=tmp_path,
        cors_origins="https://shop.example/, https://other.example",
        image_hosts="Pictures.Example",
        admin_key="a-long-secret",
        redis_url="redis://:pass@localhost",
    )
    assert settings.cors_origins == ("https://shop.example", "https://other.example")
    assert settings.image_hosts == ("pictures.example",)
    assert "a-long-secret" not in repr(settings)
    assert "pass" not in repr(settings)
