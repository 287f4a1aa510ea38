"""Settings: from the environment and `.env`, and nothing that is not one."""

import stat
from pathlib import Path

import pytest

from resources.errors import SettingsError
from resources.settings import load_settings


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_defaults_hang_below_the_data_root(tmp_path: Path) -> None:
    found = load_settings()
    assert found.data_root == tmp_path / "data"
    assert (found.inbox_dir, found.dagster_home_dir) == (tmp_path / "data/inbox", tmp_path / "data/dagster")
    assert (found.models_file, found.poll_seconds, found.port, found.input_roots) == (Path("models.yaml"), 5, 3000, ())


def test_environment_stands_over_dotenv(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / ".env").write_text(
        f"# a comment\nexport VLLM_BATCH_DATA={tmp_path}/from-file\nVLLM_BATCH_PORT=3333\nOTHER=1\n"
    )
    monkeypatch.setenv("VLLM_BATCH_DATA", str(tmp_path / "from-env"))
    monkeypatch.setenv("VLLM_BATCH_INPUT_ROOTS", "/a:/b:")
    monkeypatch.setenv("DAGSTER_HOME", str(tmp_path / "home"))
    found = load_settings()
    assert (found.data_root, found.port, found.dagster_home_dir) == (tmp_path / "from-env", 3333, tmp_path / "home")
    assert found.input_roots == (Path("/a"), Path("/b"))


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("VLLM_BATCH_DTAA", "Did you mean VLLM_BATCH_DATA?"),
        ("VLLM_BATCH_QQQQQQQQQQQQQQQQQQQQQQQQQQQ", "Known settings: "),
        ("VLLM_BATCH_DAGSTER_HOME", "Did you mean DAGSTER_HOME?"),
        ("VLLM_BATCH_DAGSTER_POSTGRES_URL", "Did you mean DAGSTER_POSTGRES_URL?"),
    ],
)
@pytest.mark.parametrize("where", ["environment", "dotenv"])
def test_unknown_setting_is_refused_with_a_hint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, hint: str, where: str
) -> None:
    if where == "environment":
        monkeypatch.setenv(name, "x")
    else:
        (tmp_path / ".env").write_text(f"{name}=x\n")
    with pytest.raises(SettingsError) as caught:
        load_settings()
    assert f"Unknown setting {name}." in str(caught.value)
    assert hint in str(caught.value)


@pytest.mark.parametrize(("name", "value"), [("PORT", "99999"), ("POLL_SECONDS", "0"), ("POLL_SECONDS", "often")])
def test_value_that_does_not_fit_is_named(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    monkeypatch.setenv(f"VLLM_BATCH_{name}", value)
    with pytest.raises(SettingsError, match=name.lower()):
        load_settings()


def test_password_of_the_database_is_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DAGSTER_POSTGRES_URL", "postgresql://user:very-secret@host/db")
    assert "very-secret" not in repr(load_settings())


def test_runtime_folder_is_private(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    open_to_all = tmp_path / "runtime"
    open_to_all.mkdir()
    open_to_all.chmod(0o755)
    monkeypatch.setenv("VLLM_BATCH_RUNTIME_DIR", str(open_to_all))
    assert stat.S_IMODE(load_settings().runtime_root.stat().st_mode) == 0o700


def test_a_folder_that_others_use_is_not_taken_from_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tmp_path.chmod(0o777)
    (tmp_path / "somebody's").touch()
    monkeypatch.setenv("VLLM_BATCH_RUNTIME_DIR", str(tmp_path))
    with pytest.raises(SettingsError, match="can be entered by others"):
        _ = load_settings().runtime_root
    assert stat.S_IMODE(tmp_path.stat().st_mode) == 0o777


def test_runtime_folder_is_not_reached_through_a_link(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "runtime").symlink_to("elsewhere")
    monkeypatch.setenv("VLLM_BATCH_RUNTIME_DIR", str(tmp_path / "runtime"))
    with pytest.raises(SettingsError, match="VLLM_BATCH_RUNTIME_DIR"):
        _ = load_settings().runtime_root
