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
    ("variable", "meant"),
    [
        ("PROT", "DCAR_PROT: unknown setting; did you mean DCAR_PORT"),
        ("REDIS", "DCAR_REDIS: unknown setting; did you mean DCAR_REDIS_URL"),
        ("MAXK", "DCAR_MAXK: unknown setting; did you mean DCAR_MAX_K"),
        ("MAX_QUEUE_MS", "DCAR_MAX_QUEUE_MS: .*DCAR_MAX_PENDING and DCAR_DEADLINE_MS"),
        ("TRACING", "DCAR_TRACING: .*opentelemetry-instrument"),
    ],
)
def test_a_mistyped_or_removed_variable_ends_the_start_with_the_name_that_was_meant(
    variable: str, meant: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv(f"DCAR_{variable}", "1")
    with pytest.raises(DcarError, match=meant):
        load_settings(index=tmp_path)


def test_variables_of_other_programs_are_ignored(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("FEATURES", "CAPTION_API_KEY", "DOMAIN", "SERVICE_HOST", "PORT_8000_TCP_ADDR"):
        monkeypatch.setenv(f"DCAR_{name}", "x")
    load_settings(index=tmp_path)


WRONG = [
    ("PORT", ["many"], ""),
    ("ADMIN_KEY", ["tiny&"], "at least 8"),
    ("FEEDBACK_TEXTS", ["true"], "needs DCAR_FEEDBACK"),
    ("API_KEYS", ["x", " , ", "shop:abcdef"], ""),
    ("COLLECTIONS", ["a=b", '["index"]', '{"a": 5}', '{".hidden": "x"}', '{"a/b": "x"}'], ""),
    ("CORS_ORIGINS", ["shop", "https://shop.example/path", "https://*.shop.example"], "https://shop.example"),
    ("IMAGE_HOSTS", ["https://a.example", "a.example/pictures", "b.example, a.example:8080"], "pictures.example.org"),
    ("IMAGE_FORMATS", ["jpg", ","], ""),
    ("RATE_LIMIT", ["fast", "20/second, 600/minute", "0/second", "-1/second", "20"], "20/second"),
    ("WRITES", ["true"], "needs DCAR_ADMIN_KEY, or a key in DCAR_API_KEYS"),
    ("REDIS_URL", ["http://localhost"], "redis://"),
]


@pytest.mark.parametrize(("name", "values", "message"), WRONG)
def test_a_wrong_value_is_refused_by_the_name_of_its_setting(
    name: str, values: list[str], message: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for value in values:
        monkeypatch.setenv(f"DCAR_{name}", value)
        with pytest.raises(DcarError, match=f"DCAR_{name}.*{message}") as caught:
            load_settings(index=tmp_path)
        assert name != "ADMIN_KEY" or value not in str(caught.value)


def test_an_index_is_needed_and_has_a_name_of_its_own(tmp_path: Path) -> None:
    with pytest.raises(DcarError, match="DCAR_INDEX"):
        load_settings()
    with pytest.raises(DcarError, match="DCAR_COLLECTIONS"):
        load_settings(index=tmp_path, collections={tmp_path.name: tmp_path})


def test_values_are_read_as_requests_send_them_and_secrets_are_not_shown(tmp_path: Path) -> None:
    settings = load_settings(
        index=tmp_path,
        cors_origins="https://shop.example, https://other.example",
        image_hosts="Pictures.Example",
        admin_key="a-long-secret",
        redis_url="redis://:pass@localhost",
    )
    assert settings.cors_origins == ("https://shop.example", "https://other.example")
    assert settings.image_hosts == ("pictures.example",)
    assert "a-long-secret" not in repr(settings)
    assert "pass" not in repr(settings)
