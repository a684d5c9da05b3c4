"""What a record says of plugins that are not here, or not as they were."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from transformers import BertConfig

from burnish.core.errors import ModelError
from burnish.core.loading import decide, read_repository
from burnish.core.options import LoadOptions
from burnish.core.provenance import FILE
from burnish.core.recall import lost, recall
from burnish.core.registry import PluginWarning
from burnish.core.settings import ALLOW_VARIABLE

from .recorded import (
    FAMILY,
    Install,
    decided,
    from_zeta,
    install_zeta,
    made,
    read,
)

# What is missed


def test_a_plugin_that_is_not_installed() -> None:
    assert lost(from_zeta(), decided()) == [
        "trained with family zeta of zeta (zeta-plugin 1.0), and zeta-plugin is not installed; instead it gets family "
        f"generic of generic (burnish {made()['burnish']}). Run `pip install zeta-plugin==1.0`"
    ]


def test_a_plugin_that_is_there_as_it_was(install: Install) -> None:
    install_zeta(install)
    assert lost(from_zeta(), decided()) == []


def test_a_plugin_of_another_version(install: Install) -> None:
    install_zeta(install, version="2.0")
    (line,) = lost(from_zeta(), decided())
    assert "and zeta-plugin is installed as 2.0; instead it gets family zeta of zeta (zeta-plugin 2.0)." in line
    assert line.endswith("Run `pip install zeta-plugin==1.0`")


def test_a_distribution_that_lost_the_plugin(install: Install) -> None:
    install_zeta(install)
    (line,) = lost(from_zeta(plugin="eta"), decided())
    assert "and zeta-plugin 1.0 has no plugin eta; " in line


def test_a_plugin_that_a_run_leaves_out(install: Install) -> None:
    install_zeta(install)
    (line,) = lost(from_zeta(), decided(plugins=()))
    assert "and zeta (zeta-plugin 1.0) is off (this run uses no plugins of others); " in line
    assert line.endswith(". Name it: plugins=['zeta-plugin:zeta']")


def test_a_plugin_that_is_not_on_the_list(install: Install, monkeypatch: pytest.MonkeyPatch) -> None:
    install_zeta(install, version="2.0")
    monkeypatch.setenv(ALLOW_VARIABLE, "burnish")
    (line,) = lost(from_zeta(), decided())
    assert f"is off (not in {ALLOW_VARIABLE}); " in line and line.endswith("to BURNISH_PLUGINS, or unset it")


def test_a_plugin_that_is_refused(install: Install) -> None:
    install_zeta(install, contract="99")
    install("other", "model_type.zeta", code=FAMILY)
    (line,) = lost(from_zeta(), decided())
    assert "is refused (is written for contract 99" in line and line.endswith(". Install versions that match")


def test_a_plugin_that_has_to_be_named(install: Install) -> None:
    code = FAMILY.replace("zeta", "bert")
    install("bert-plugin", "model_type.bert", code=code, plugins={"better": "bert_plugin"})
    config = BertConfig()
    part = {"name": "bert", "plugin": "better", "distribution": "bert-plugin", "version": "1.0"}
    former = read(made() | {"family": part})
    assert lost(former, decide(LoadOptions(plugins=("better",)), config, "cpu")) == []
    assert lost(former, decide(LoadOptions(plugins=("burnish:bert",)), config, "cpu")) == []
    (line,) = lost(former, decide(LoadOptions(), config, "cpu"))
    assert "and better (bert-plugin 1.0) is installed and not named; instead it gets family bert of bert" in line
    assert line.endswith(". Name it: plugins=['bert-plugin:better']")


def test_one_line_for_all_that_a_distribution_brought() -> None:
    part = {"plugin": "p", "distribution": "all-in-one", "version": "4"}
    kernels = [{"operation": "packed_attention", "name": "zip", **part}]
    changes = {"family": {"name": "zeta", **part}, "backend": {"name": "zap", **part}, "kernels": kernels}
    (line,) = lost(read(made() | changes), decided())
    assert line.startswith(
        "trained with family zeta of p (all-in-one 4) and backend zap of p (all-in-one 4) and kernel zip of p (all-in-"
        "one 4), and all-in-one is not installed; instead it gets family generic of generic (burnish "
    )
    assert " and backend reference of reference (burnish " in line and " and kernel reference of reference" in line


def test_what_is_built_in_is_never_missed() -> None:
    part = {"name": "gone", "plugin": "gone", "distribution": "burnish", "version": "0.0.1"}
    assert lost(read(made() | {"family": part}), decided()) == []


def test_the_last_training_counts() -> None:
    stock = made(decided(purpose="inference"), former=from_zeta())
    assert len(lost(read(stock), decided())) == 1
    later = made(former=from_zeta())
    assert len(later["trained_with"]) == 1 and lost(read(later), decided()) == []
    assert lost(read(made(decided(purpose="inference"))), decided()) == []


@pytest.mark.parametrize(
    ("distribution", "version", "fix"),
    [
        ("--index-url=http://evil.test x", "1.0", "Install the plugin that it was trained with"),
        ("zeta;rm", "1.0", "Install the plugin that it was trained with"),
        ("zeta-plugin", "1.0 --pre evil", "Run `pip install zeta-plugin`"),
        ("zeta-plugin", "1!2.0rc1+cu9.8", "Run `pip install zeta-plugin==1!2.0rc1+cu9.8`"),
    ],
)
def test_a_strangers_file_puts_nothing_on_a_command_line(distribution: str, version: str, fix: str) -> None:
    (line,) = lost(from_zeta(distribution=distribution, version=version), decided())
    assert line.endswith(f". {fix}")


def test_where_the_plugin_brought_the_models_classes_the_error_says_what_to_install(
    install: Install, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "zeta"}')
    with pytest.raises(ModelError, match=r"zeta.*\. Check the name or path"):
        read_repository(str(tmp_path))
    (tmp_path / FILE).write_text("{")
    with pytest.raises(ModelError, match=r"zeta.*\. Check the name or path"):
        read_repository(str(tmp_path))
    (tmp_path / FILE).write_text(from_zeta().text, encoding="utf-8")
    wanted = r"\. It was trained with family zeta of zeta \(zeta-plugin 1\.0\), and zeta-plugin is not installed\. Run "
    with pytest.raises(ModelError, match=wanted + "`pip install zeta-plugin==1.0`$"):
        read_repository(str(tmp_path))
    install_zeta(install)
    with pytest.raises(ModelError, match=r"zeta.*\. Check the name or path"):  # it does not bring them after all
        read_repository(str(tmp_path))


def test_it_is_told_once_and_only_where_a_training_would_miss_it(tmp_path: Path) -> None:
    (tmp_path / FILE).write_text(from_zeta().text, encoding="utf-8")
    with pytest.warns(PluginWarning, match=rf"^model {re.escape(str(tmp_path))}: trained with family zeta") as caught:
        assert recall(str(tmp_path), decided()) == from_zeta()
    assert len(caught) == 1
    assert recall(str(tmp_path), decided(purpose="inference")) == from_zeta()  # a warning would be an error
    assert recall(str(tmp_path), decided(quiet=True)) is None
