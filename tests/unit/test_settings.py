"""Which plugins the user allows: read from the environment and the config folder, written whole, and never guessed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from burnish.core.errors import ConfigError
from burnish.core.settings import Policy, config_folder, current_policy, disabled_plugins, set_disabled

DISABLED = "plugins.json"


@pytest.mark.parametrize(
    ("variables", "folder"),
    [
        ({"BURNISH_CONFIG_DIR": "/a", "XDG_CONFIG_HOME": "/b", "HOME": "/c"}, "/a"),
        ({"XDG_CONFIG_HOME": "/b", "HOME": "/c"}, "/b/burnish"),
        ({"XDG_CONFIG_HOME": "", "HOME": "/c"}, "/c/.config/burnish"),
    ],
)
def test_the_config_folder(variables: dict[str, str], folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("BURNISH_CONFIG_DIR", "XDG_CONFIG_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert config_folder() == Path(folder)


def test_a_user_without_a_home_has_disabled_nothing_and_cannot(monkeypatch: pytest.MonkeyPatch) -> None:
    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("BURNISH_CONFIG_DIR")
    monkeypatch.delenv("XDG_CONFIG_HOME", raising=False)
    monkeypatch.setattr(Path, "home", homeless)
    assert disabled_plugins() == frozenset()
    with pytest.raises(ConfigError, match=r"there is no home folder. Set BURNISH_CONFIG_DIR"):
        set_disabled(["zeta"])


def test_disabled_names_are_written_and_read(own_config: Path) -> None:
    assert disabled_plugins() == frozenset()
    path = set_disabled(["zeta", "alpha", "zeta"])
    assert path == own_config / DISABLED
    assert json.loads(path.read_text()) == {"disabled": ["alpha", "zeta"]}
    assert disabled_plugins() == {"alpha", "zeta"}
    set_disabled([])
    assert disabled_plugins() == frozenset()
    assert [entry.name for entry in own_config.iterdir()] == [DISABLED]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "3",
        "{}",
        '{"disabled": "zeta"}',
        '{"disabled": [1]}',
        '{"disabled": null}',
        "\ufeff{}",
        b"\xff\xfe\x00",
    ],
)
def test_a_file_of_another_shape_is_told(text: str | bytes, own_config: Path) -> None:
    (own_config / DISABLED).write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ConfigError) as caught:
        disabled_plugins()
    assert caught.value.where == str(own_config / DISABLED)
    assert str(caught.value).endswith('It should hold {"disabled": ["NAME"]}: mend or delete it')
    assert "\n" not in str(caught.value)


def test_a_folder_in_the_files_place_is_told(own_config: Path) -> None:
    (own_config / DISABLED).mkdir()
    with pytest.raises(ConfigError, match=r"cannot be read .*directory"):
        disabled_plugins()
    with pytest.raises(ConfigError, match=r"is a folder, not a file"):
        set_disabled(["zeta"])


def test_a_config_folder_that_cannot_be_made_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("BURNISH_CONFIG_DIR", str(tmp_path / "file" / "burnish"))
    with pytest.raises(ConfigError, match=r"cannot be written .*Choose a place that you may write to") as caught:
        set_disabled(["zeta"])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("variable", "allowed"),
    [
        (None, None),
        ("", frozenset()),
        (" , ", frozenset()),
        ("bert, my-dist:electra,,x ", {"bert", "my-dist:electra", "x"}),
    ],
)
def test_the_allow_list(variable: str | None, allowed: set[str] | None, monkeypatch: pytest.MonkeyPatch) -> None:
    if variable is not None:
        monkeypatch.setenv("BURNISH_PLUGINS", variable)
    assert current_policy().allowed == allowed


def test_a_runs_plugins() -> None:
    assert current_policy() == Policy()
    assert current_policy(["b", "a"]) == Policy(named=("b", "a"))
    assert current_policy([]) == current_policy(iter(())) == Policy(only_own=True)
    set_disabled(["zeta"])
    assert current_policy(["a"]) == Policy(named=("a",), disabled=frozenset({"zeta"}))


def test_a_string_is_not_a_list_of_names() -> None:
    with pytest.raises(ConfigError, match=r"Pass a list: plugins=\['electra'\]"):
        current_policy("electra")


@pytest.mark.parametrize("name", ["", "  ", None, 3])
def test_a_name_is_a_name(name: object) -> None:
    with pytest.raises(ConfigError, match=r"is not a plugin's name"):
        current_policy(["bert", name])  # type: ignore[list-item]
