"""`burnish plugin new`: what it writes, what it refuses, and that what it writes is in order."""

from __future__ import annotations

import importlib
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml
from transformers import CONFIG_MAPPING, MODEL_MAPPING

from burnish.core import scaffold
from burnish.core.contracts import FamilySpec, LoraTargets, Packing, Pooling, Precision
from burnish.core.errors import ConfigError, ModelError
from burnish.core.registry import registry
from burnish.core.scaffold import new_plugin, plan_plugin
from burnish.core.scaffold_text import python

Install = Callable[..., str]
# As long as a name may be, and with everything in it that a name may hold.
LONGEST = "A2345678-b12345678_C123456789D"
RULES = "E,F,I,UP,B,W,SIM,RUF"  # this repository's own


def families() -> list[str]:
    """Every built-in family that has a sample config."""
    plugins = registry([])
    found = plugins.collect(plugins.claimants("model_type"), "burnish_register_families", FamilySpec)
    return sorted(spec.name for _, spec in found if spec.sample is not None)


@pytest.fixture
def imported(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Path], ModuleType]]:
    """Import the family module of a distribution's folder; it is forgotten afterwards."""
    before = set(sys.modules)

    def load(folder: Path) -> ModuleType:
        monkeypatch.syspath_prepend(str(folder))
        importlib.invalidate_caches()
        (file,) = folder.glob("burnish_*.py")
        return importlib.import_module(file.stem)

    yield load
    for name in set(sys.modules) - before:
        if name.startswith(("burnish_", "modeling_")) and "." not in name:
            del sys.modules[name]
    # transformers has no unregister: its tables are put back.
    for table in (CONFIG_MAPPING, MODEL_MAPPING):
        for key, kind in list(table._extra_content.items()):
            if kind.__module__.startswith("modeling_"):
                del table._extra_content[key]


def spec_of(module: ModuleType) -> FamilySpec:
    """The one family that a module offers."""
    (spec,) = module.burnish_register_families()
    assert isinstance(spec, FamilySpec)
    return spec


def test_a_type_that_transformers_knows(tmp_path: Path, imported: Callable[[Path], ModuleType]) -> None:
    files = new_plugin("electra", "bert", tmp_path)
    root = tmp_path / "burnish-electra"
    assert {str(path.relative_to(root)) for path in files} == {
        "pyproject.toml", "burnish_electra.py", "tests/conftest.py", "tests/test_electra.py", "README.md",
        ".github/workflows/ci.yml", ".gitignore",
    }  # fmt: skip
    assert {path for path in root.rglob("*") if path.is_file()} == set(files)
    from transformers import ElectraConfig

    spec = spec_of(imported(root))
    assert (spec.name, spec.model_types) == ("electra", ("electra",))
    assert spec.sample is not None
    tiny, base = spec.sample("tiny"), spec.sample("base")
    assert type(tiny) is type(base) is ElectraConfig and (tiny.hidden_size, base.hidden_size) == (32, 768)
    family = spec.build(tiny)
    assert (family.pooling, family.packing, family.lora) == (Pooling(), Packing(), LoraTargets())
    assert family.leaves == ("no patches: attention, norms and activations are transformers' own",)


def test_a_type_that_transformers_does_not_know(tmp_path: Path, imported: Callable[[Path], ModuleType]) -> None:
    from transformers import AutoModel, BertModel

    new_plugin("acme", "bert", tmp_path)
    module = imported(tmp_path / "burnish-acme")
    spec = spec_of(module)
    assert spec.sample is not None
    config = spec.sample("tiny")
    model = AutoModel.from_config(config)  # type: ignore[no-untyped-call]
    assert (type(config).__name__, type(model).__name__) == ("AcmeConfig", "AcmeModel")
    assert isinstance(model, BertModel) and type(config).__module__ == type(model).__module__ == "modeling_acme"
    assert config.model_type == "acme" and config.hidden_size == 32
    assert spec.build(config).lora == LoraTargets(names=("dense", "key", "query", "value"), exclude=("pooler.dense",))


def test_nothing_is_registered_by_importing_it(tmp_path: Path, imported: Callable[[Path], ModuleType]) -> None:
    new_plugin("acme-two", "bert", tmp_path)
    module = imported(tmp_path / "burnish-acme-two")
    assert "acme-two" not in CONFIG_MAPPING
    spec_of(module)
    assert "acme-two" in CONFIG_MAPPING


LOAD = """
import sys
from transformers import AutoModel
model = AutoModel.from_pretrained(sys.argv[1], trust_remote_code=True)
weight = model.state_dict()["encoder.layer.1.output.dense.weight"][3, 5].item()
print(type(model).__name__, model.config.model_type, weight)
"""


def test_a_folder_that_carries_the_encoder_loads_without_the_plugin(
    tmp_path: Path, imported: Callable[[Path], ModuleType]
) -> None:
    new_plugin("acme", "bert", tmp_path)
    spec = spec_of(imported(tmp_path / "burnish-acme"))
    modeling = sys.modules["modeling_acme"]
    # As the docstring of `register` in the file tells an author.
    modeling.AcmeConfig.register_for_auto_class()
    modeling.AcmeModel.register_for_auto_class("AutoModel")
    assert spec.sample is not None
    model = modeling.AcmeModel(spec.sample("tiny"))
    model.save_pretrained(tmp_path / "model")
    command = [sys.executable, "-W", "ignore", "-c", LOAD, str(tmp_path / "model")]
    environment = {**os.environ, "HF_HOME": str(tmp_path / "home")}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)
    weight = model.state_dict()["encoder.layer.1.output.dense.weight"][3, 5].item()
    assert done.stdout.split() == ["AcmeModel", "acme", str(weight)], done.stderr[-2000:]


def test_the_packaging_names_what_there_is(tmp_path: Path) -> None:
    new_plugin("My-Encoder", "bert", tmp_path, model_type="my_type")
    root = tmp_path / "burnish-My-Encoder"
    table: dict[str, Any] = tomllib.loads((root / "pyproject.toml").read_text())
    project = table["project"]
    assert (project["name"], project["dependencies"]) == ("burnish-My-Encoder", ["burnish"])
    assert project["optional-dependencies"] == {"test": ["burnish[cli,testing]"]}
    points = project["entry-points"]
    assert points["burnish"] == {"My-Encoder": "burnish_my_encoder"}
    assert points["burnish.capabilities"] == {
        "contract.1": "burnish_my_encoder",
        "model_type.my_type": "burnish_my_encoder",
    }
    modules = table["tool"]["setuptools"]["py-modules"]
    assert modules == ["burnish_my_encoder", "modeling_my_encoder"]
    assert all((root / f"{module}.py").is_file() for module in modules)
    assert 'model_type = "my_type"' in (root / "tests" / "test_my_encoder.py").read_text()
    assert "class MyTypeConfig(BertConfig)" in (root / "modeling_my_encoder.py").read_text()


def test_the_workflow_installs_tests_and_checks(tmp_path: Path) -> None:
    new_plugin("electra", "bert", tmp_path)
    text = (tmp_path / "burnish-electra" / ".github" / "workflows" / "ci.yml").read_text()
    job = yaml.safe_load(text)["jobs"]["test"]
    assert [step["run"] for step in job["steps"] if "run" in step][1:] == [
        "pip install -e '.[test]'", "pytest", "burnish plugins check burnish-electra",
    ]  # fmt: skip
    assert job["steps"][1]["with"]["python-version"] == "${{ matrix.python }}"


def test_the_author_is_told_to_choose_a_licence(tmp_path: Path) -> None:
    new_plugin("electra", "bert", tmp_path)
    readme = (tmp_path / "burnish-electra" / "README.md").read_text()
    assert "Choose a licence" in readme and "$" not in re.sub(r"^\$ ", "", readme, flags=re.M)


def ruff(folder: Path, *arguments: str) -> str:
    """What ruff says of a folder; empty if nothing."""
    command = [sys.executable, "-m", "ruff", *arguments, "--quiet", "--no-cache", "."]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    return done.stdout + done.stderr


def test_what_is_written_is_in_the_order_that_ruff_wants(tmp_path: Path) -> None:
    known = [("electra", None), ("longest", "jina_embeddings_v3"), ("padded", "roformer"), ("bert", None)]
    plans = [plan_plugin(name, "bert", kind) for name, kind in known]
    plans += [plan_plugin(f"own-{family}", family) for family in families()]
    plans += [plan_plugin(LONGEST, "bert", LONGEST)]
    for plan in plans:
        plan.write(tmp_path)
        root = tmp_path / plan.folder
        for path in root.rglob("*.py"):
            compile(path.read_text(), str(path), "exec")
        assert ruff(root, "check", "--select", RULES) == ""
        assert ruff(root, "format", "--check") == ""
    broken = tmp_path / "burnish-electra" / "burnish_electra.py"
    broken.write_text(broken.read_text().replace("import Any", "import  Any, Never"))
    assert "Never" in ruff(broken.parent, "check", "--select", RULES)
    assert ruff(broken.parent, "format", "--check") != ""


@pytest.mark.parametrize("family", families())
def test_every_family_can_be_started_from(family: str, tmp_path: Path, imported: Callable[[Path], ModuleType]) -> None:
    plugins = registry([])
    offers = plugins.collect(plugins.claimants("model_type"), "burnish_register_families", FamilySpec)
    source = next(spec for _, spec in offers if spec.name == family)
    name = f"like-{family}"
    new_plugin(name, family, tmp_path)
    spec = spec_of(imported(tmp_path / f"burnish-{name}"))
    assert source.sample is not None and spec.sample is not None
    for size in ("tiny", "base"):
        mine, theirs = spec.sample(size).to_dict(), source.sample(size).to_dict()
        assert {key for key in mine.keys() | theirs.keys() if mine.get(key) != theirs.get(key)} <= {"model_type"}
    config = source.sample("tiny")
    ours, source_family = spec.build(spec.sample("tiny")), source.build(config)
    assert ours.pooling == source_family.default_pooling(config, frozenset())
    assert ours.precision == source_family.precision


def test_a_type_is_found_whichever_way_it_is_written(tmp_path: Path) -> None:
    for name in ("nomic-bert", "nomic_bert"):
        (kind,) = [value for what, value in plan_plugin(name, "bert").found if what == "architecture"]
        assert kind == "nomic_bert: NomicBert of transformers"


def test_a_family_for_no_architecture_serves_for_a_known_type_only() -> None:
    assert dict(plan_plugin("roberta", "generic").found)["input"].startswith("packed: ")
    with pytest.raises(ConfigError, match=r"--like: family generic has no sample config.*no model type 'acme'"):
        plan_plugin("acme", "generic")


def test_where_a_plugin_takes_the_type_already_it_must_be_named(tmp_path: Path) -> None:
    plan = plan_plugin("bert", "bert")
    label = next(plugin.label for plugin in registry().plugins if plugin.id == "burnish:bert")
    assert dict(plan.found)["note"] == f"{label} takes bert too: users of this plugin must name it"
    assert '    plugins = ("burnish-bert",)' in plan.files["tests/test_bert.py"]
    assert '`plugins=["burnish-bert"]`' in plan.files["README.md"]
    free = plan_plugin("electra", "bert")
    assert "note" not in dict(free.found) and "plugins" not in free.files["tests/test_electra.py"]


def test_an_earlier_plugin_of_the_same_name_is_no_rival(install: Install) -> None:
    install("burnish-electra", "model_type.electra", plugins={"electra": "burnish_electra"})
    assert "note" not in dict(plan_plugin("electra", "bert").found)
    install("other", "model_type.electra")
    assert "other (other 1.0) takes electra too" in dict(plan_plugin("electra", "bert").found)["note"]


def test_a_strangers_family_can_be_started_from(install: Install) -> None:
    code = """
    from transformers import BertConfig
    from burnish.core.contracts import Pooling, Precision

    def build(config):
        policy = Precision(refused={"float16": "it overflows"})
        return Family(name="zeta", pooling=Pooling(mode="cls"), precision=policy)

    def sample(size):
        return BertConfig(vocab_size=250, hidden_size=16, num_hidden_layers=1, num_attention_heads=2)

    @hookimpl
    def burnish_register_families():
        return [FamilySpec(name="zeta", model_types=("zeta",), build=build, sample=sample)]
    """
    install("zeta-plugin", "model_type.zeta", code=code)
    text = plan_plugin("acme", "zeta").files["burnish_acme.py"]
    assert 'pooling=Pooling(mode="cls", normalize=False),' in text
    assert '        precision=Precision(\n            refused={\n                "float16": "it overflows",\n' in text
    assert '"hidden_size": 16' in text and '"num_attention_heads": 2' in text


def test_a_family_whose_plugin_brings_the_encoder_is_no_start_for_another(install: Install) -> None:
    code = """
    from transformers import BertConfig
    class ZetaConfig(BertConfig):
        model_type = "zetas"
    def sample(size):
        return ZetaConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2)
    @hookimpl
    def burnish_register_families():
        build = lambda config: Family(name="zeta")
        return [FamilySpec(name="zeta", model_types=("zetas",), build=build, sample=sample)]
    """
    install("zeta-plugin", "model_type.zetas", code=code)
    with pytest.raises(ConfigError, match="zeta is for an encoder of its plugin's own"):
        plan_plugin("acme", "zeta")


@pytest.mark.parametrize(
    "name", ["", "a b", "2fast", "end-", "_x", "a.b", "../up", "a/b", "é", "a\n", LONGEST + "x", "burnish-x", "burnish"]
)
def test_names_that_will_not_do(name: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^NAME: "):
        new_plugin(name, "bert", tmp_path)
    if not name.startswith("burnish"):
        with pytest.raises(ConfigError, match=r"^--model-type: "):
            new_plugin("acme", "bert", tmp_path, model_type=name)
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_family_is_answered_with_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as told:
        new_plugin("acme", "brt", tmp_path)
    assert str(told.value).startswith("--like: no family is called 'brt'. Did you mean 'bert'? Known: bert, ")
    assert all(family in str(told.value) for family in [*families(), "generic"])


def test_an_architecture_that_will_not_do_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="'t5'"):
        new_plugin("t5", "bert", tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_with_something_in_it_is_left_alone(tmp_path: Path) -> None:
    target = tmp_path / "burnish-electra"
    target.mkdir()
    (target / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match="burnish-electra: is there already and not empty"):
        new_plugin("electra", "bert", tmp_path)
    assert [path.name for path in target.iterdir()] == ["notes.txt"]
    (target / "notes.txt").unlink()
    assert new_plugin("electra", "bert", tmp_path)
    other = tmp_path / "burnish-acme"
    other.write_text("a file")
    with pytest.raises(ConfigError, match="is there already"):
        new_plugin("acme", "bert", tmp_path)


def test_it_appears_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = plan_plugin("electra", "bert")
    bad = scaffold.Scaffold(folder=plan.folder, files={**plan.files, "zz\0": ""}, found=())
    with pytest.raises(ValueError, match="null"):
        bad.write(tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "value",
    [
        {"a": {"b": [1, 2.5, None, True]}, "empty": {}, "list": []},
        ("one",),
        (),
        tuple(f"a name of some length {number}" for number in range(9)),
        'quotes " and \\ and é',
    ],
    ids=str,
)
def test_values_come_back_from_what_is_written(value: Any) -> None:
    assert eval(python(value)) == value
    assert max(map(len, python(value, 8).splitlines())) <= 100


def test_only_what_differs_from_the_defaults_is_written() -> None:
    assert python(Pooling()) == 'Pooling(mode="mean", normalize=False)'
    assert python(Packing(causal=True)) == "Packing(position_offset=0, causal=True)"
    assert python(LoraTargets()) == "LoraTargets()"
    written = python(Precision(full="bfloat16", refused={"float16": "it overflows"}))
    assert eval(written) == Precision(full="bfloat16", refused={"float16": "it overflows"})
