"""A model type that transformers does not know: the plugin that claims it is asked before the config is read."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from transformers import CONFIG_MAPPING

from burnish.core.doctor import explain
from burnish.core.errors import ModelError, PluginError
from burnish.core.loading import read_repository
from burnish.core.registry import PluginWarning

Install = Callable[..., str]
TYPE = "zetanet"
CODE = f"""
from transformers import AutoConfig, AutoModel, BertConfig, BertModel

class ZetaConfig(BertConfig):
    model_type = "{TYPE}"

class ZetaModel(BertModel):
    config_class = ZetaConfig

@hookimpl
def burnish_register_families():
    AutoConfig.register("{TYPE}", ZetaConfig, exist_ok=True)
    AutoModel.register(ZetaConfig, ZetaModel, exist_ok=True)
    return [FamilySpec(name="zeta", model_types=("{TYPE}",), build=lambda config: Family(name="zeta"))]
"""


@pytest.fixture(autouse=True)
def forgotten() -> Iterator[None]:
    """transformers has no unregister: its tables are put back."""
    from transformers import MODEL_MAPPING

    yield
    CONFIG_MAPPING._extra_content.pop(TYPE, None)
    for kind in [kind for kind in MODEL_MAPPING._extra_content if getattr(kind, "model_type", "") == TYPE]:
        del MODEL_MAPPING._extra_content[kind]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model's folder with a config of that type and nothing else."""
    (tmp_path / "model").mkdir()
    small = {"hidden_size": 8, "num_attention_heads": 2, "num_hidden_layers": 1, "intermediate_size": 8}
    (tmp_path / "model" / "config.json").write_text(json.dumps({"model_type": TYPE, **small}))
    return tmp_path / "model"


def test_the_plugin_that_claims_the_type_makes_it_known(install: Install, folder: Path) -> None:
    install("zeta-plugin", f"model_type.{TYPE}", code=CODE)
    assert TYPE not in CONFIG_MAPPING
    config = read_repository(str(folder)).config
    assert (config.model_type, type(config).__name__, config.hidden_size) == (TYPE, "ZetaConfig", 8)


def test_doctor_explains_a_model_of_that_type(install: Install, folder: Path) -> None:
    install("zeta-plugin", f"model_type.{TYPE}", code=CODE)
    sections = dict(explain(str(folder)))
    assert dict(sections["Family"])["chosen"] == "zeta of zeta-plugin (zeta-plugin 1.0): the only plugin that claims it"


def test_without_a_plugin_or_with_it_left_out_the_type_stays_unknown(install: Install, folder: Path) -> None:
    with pytest.raises(ModelError, match=f"no usable config.json.*{TYPE}"):
        read_repository(str(folder))
    install("zeta-plugin", f"model_type.{TYPE}", code=CODE)
    with pytest.raises(ModelError, match=TYPE):
        read_repository(str(folder), plugins=[])


def test_a_plugin_that_fails_to_make_it_known_is_told(install: Install, folder: Path) -> None:
    install("zeta-plugin", f"model_type.{TYPE}", code="raise RuntimeError('no luck')")
    with pytest.warns(PluginWarning, match="no luck"), pytest.raises(ModelError, match=TYPE):
        read_repository(str(folder))
    with pytest.raises(PluginError, match="no luck"):
        read_repository(str(folder), plugins=["zeta-plugin"])


def test_no_plugin_is_asked_about_a_type_that_transformers_knows(install: Install, tiny_bert: Path) -> None:
    install("nosy", "model_type.bert", code="raise RuntimeError('asked')")
    assert read_repository(str(tiny_bert)).config.model_type == "bert"
