"""Settings from flags and the environment, and errors about wrong ones."""

from pathlib import Path

import pytest

from app.core.settings import Settings, load_settings
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


@pytest.mark.parametrize("other", ["FEATURES", "CAPTION_API_KEY", "DOMAIN", "SERVICE_HOST", "PORT_8000_TCP_ADDR"])
def test_variables_of_other_programs_are_ignored(other: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(f"DCAR_{other}", "x")
    load_settings(index=tmp_path)


def test_errors_name_the_setting_and_show_no_secret(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(DcarError, match="DCAR_INDEX"):
        load_settings()
    monkeypatch.setenv("DCAR_PORT", "many")
    with pytest.raises(DcarError, match="DCAR_PORT"):
        load_settings(index=tmp_path)
    monkeypatch.delenv("DCAR_PORT")
    monkeypatch.setenv("DCAR_ADMIN_KEY", "tiny&")
    with pytest.raises(DcarError, match="DCAR_ADMIN_KEY") as caught:
        load_settings(index=tmp_path)
    assert "tiny&" not in str(caught.value)
    for wrong in ("sha256:abcdef", "sha256:" + "g" * 64, "sha256:" + "a" * 65, "admin:" + "a" * 64):
        monkeypatch.setenv("DCAR_ADMIN_KEY", wrong)
        with pytest.raises(DcarError, match=r"DCAR_ADMIN_KEY.*64 hexadecimal digits") as caught:
            load_settings(index=tmp_path)
        assert wrong not in str(caught.value)
    for right in ("sha256:" + "aB" * 32, "sha256:" + "a" * 64 + "\n", "sha 256 is no prefix", "  a: spaces around "):
        monkeypatch.setenv("DCAR_ADMIN_KEY", right)
        known = load_settings(index=tmp_path).admin_key
        assert known is not None
        assert known.get_secret_value() == right.strip(), "white space is stripped, as from a request"
    monkeypatch.setenv("DCAR_ADMIN_KEY", "pässwörd123")
    with pytest.raises(DcarError, match="ASCII"):
        load_settings(index=tmp_path)
    monkeypatch.delenv("DCAR_ADMIN_KEY")
    monkeypatch.setenv("DCAR_API_KEYS", "shop:abcdef")
    with pytest.raises(DcarError, match="DCAR_API_KEYS"):
        load_settings(index=tmp_path)
    monkeypatch.delenv("DCAR_API_KEYS")
    for wrong in ("a=b", '["index"]', '{"a": 5}'):
        monkeypatch.setenv("DCAR_COLLECTIONS", wrong)
        with pytest.raises(DcarError, match=r"^DCAR_COLLECTIONS: "):
            load_settings(index=tmp_path)
    monkeypatch.delenv("DCAR_COLLECTIONS")
    monkeypatch.setenv("DCAR_CORS_ORIGINS", "https://shop.example/, https://other.example")
    assert load_settings(index=tmp_path).cors_origins == ("https://shop.example", "https://other.example")
    for wrong in ("https://a.example", "a.example/pictures", "b.example, a.example:8080"):
        with pytest.raises(DcarError, match=r"DCAR_IMAGE_HOSTS: .*must be host names such as pictures\.example\.org"):
            load_settings(index=tmp_path, image_hosts=wrong)
    assert load_settings(index=tmp_path, image_hosts="Pictures.Example").image_hosts == ("pictures.example",)
    with pytest.raises(DcarError, match=r"^DCAR_WRITES: needs DCAR_ADMIN_KEY, or a key in DCAR_API_KEYS"):
        load_settings(index=tmp_path, writes=True)
    with pytest.raises(DcarError, match="redis://"):
        load_settings(index=tmp_path, redis_url="http://localhost")
    shown = repr(Settings(index=tmp_path, admin_key="a-long-secret", redis_url="redis://:pass@localhost"))
    assert "a-long-secret" not in shown
    assert "pass" not in shown
