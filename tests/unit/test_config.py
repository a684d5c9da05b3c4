from __future__ import annotations

import sys
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from burnish.core.config import RunConfig, described, make_config, read_config
from burnish.core.errors import ConfigError

GIVEN: dict[str, Any] = {"model": "m", "train": "t"}


def refused(**values: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        make_config({**GIVEN, **values}, "here")
    message = str(caught.value)
    assert "\n" not in message and message.startswith(caught.value.where or "-")
    return message


def write(folder: Path, text: str) -> Path:
    path = folder / "run.yaml"
    path.write_text(text, encoding="utf-8")
    return path


# One value that is of the wrong type for every field, and words of the error.
WRONG: dict[str, tuple[Any, str]] = {
    "model": (3, "text"),
    "train": (["a.csv"], "text"),
    "split": (True, "text"),
    "columns": ({"anchor": 1}, "a mapping of text to text"),
    "on_bad_row": ("ignore", "one of stop, skip"),
    "max_rows": ("ten", "a whole number"),
    "eval": (False, "text"),
    "eval_split": (None, "text"),
    "name": (7, "text"),
    "runs": (None, "text"),
    "overwrite": ("yes", "true or false"),
    "resume": (1, "true or false"),
    "method": ("qlora", "one of lora, full"),
    "rank": (16.0, "a whole number"),
    "alpha": ("32", "a number"),
    "lora_dropout": (None, "a number"),
    "loss": ({}, "text"),
    "epochs": (True, "a number"),
    "max_steps": (1.5, "a whole number"),
    "batch_size": (True, "a whole number"),
    "accumulation": ("2", "a whole number"),
    "learning_rate": ("1e-3", "a number"),
    "warmup": ([], "a number"),
    "max_seq_length": ("96", "a whole number"),
    "checkpointing": ("unsloth", "one of off, on, selective, offload"),
    "activation_budget": ("2", "a number"),
    "save_steps": (2.0, "a whole number"),
    "log_steps": (None, "a whole number"),
    "eval_batch_size": ("64", "a whole number"),
    "seed": (None, "a whole number"),
    "dtype": ("int8", "one of float32, bfloat16, float16"),
    "load_in_4bit": ("no", "true or false"),
    "load_in_8bit": (0, "true or false"),
    "embedding_storage": ("6bit", "one of 8bit, 4bit, host"),
    "auto_batch": (512, "true or false"),
    "device": (0, "text"),
    "backend": (None, "text"),
    "packed": ("auto", "true or false"),
    "plugins": ("mine", "a list of texts"),
    "trust_remote_code": (1, "true or false"),
    "use_prompts": ("query", "true or false"),
    "revision": (1, "text"),
}


def test_every_field_is_in_the_table_above() -> None:
    assert set(WRONG) == {entry.name for entry in fields(RunConfig)}


@pytest.mark.parametrize("name", WRONG)
def test_a_value_of_the_wrong_type_names_field_and_type(name: str) -> None:
    value, words = WRONG[name]
    with pytest.raises(ConfigError) as caught:
        RunConfig(**{**GIVEN, name: value})
    assert str(caught.value).startswith(f"{name}: {value!r} is not {words}. What it is: ")


BOUNDS = {
    "max_rows": ((2,), (1, 0, -5)),
    "rank": ((1, 512), (0, -1)),
    "alpha": ((1, 0.5), (0, -1.0)),
    "lora_dropout": ((0, 0.99), (-0.1, 1.0)),
    "epochs": ((0.01, 3), (0, -1)),
    "max_steps": ((1,), (0,)),
    "batch_size": ((2,), (1, 0)),
    "accumulation": ((1,), (0,)),
    "learning_rate": ((1e-9, 1), (0, -1e-3)),
    "warmup": ((0, 0.99), (-0.1, 1, 10)),
    "max_seq_length": ((1,), (0,)),
    "activation_budget": ((0.1, 40), (0, -1.0)),
    "save_steps": ((1,), (0,)),
    "log_steps": ((1,), (0,)),
    "eval_batch_size": ((1,), (0,)),
    "seed": ((0, 2**32 - 1), (-1, 2**32, 10**400)),
}


def test_every_number_has_bounds() -> None:
    numbers = {name for name, (hint, _) in described().items() if "int" in str(hint) or "float" in str(hint)}
    assert numbers - {"dtype"} == set(BOUNDS)


@pytest.mark.parametrize("name", BOUNDS)
def test_numbers_out_of_range(name: str) -> None:
    inside, outside = BOUNDS[name]
    for value in inside:
        assert getattr(make_config({**GIVEN, name: value}, "here"), name) == value
    for value in outside:
        assert f"{name}: {value!r} is out of range. Use a number that is " in refused(**{name: value})
    if "float" in str(described()[name][0]):
        for value in (float("nan"), float("inf")):
            assert "out of range" in refused(**{name: value})


def test_bounds_in_words() -> None:
    assert refused(lora_dropout=1.0).endswith("at least 0 and less than 1")
    assert refused(seed=-1).endswith("at least 0 and at most 4294967295")
    assert refused(alpha=0).endswith("more than 0")


@pytest.mark.parametrize(
    ("values", "start"),
    [
        ({"method": "full", "load_in_4bit": True}, "method: quantised weights cannot be trained in full."),
        ({"method": "full", "load_in_8bit": True}, "method: quantised weights cannot be trained in full."),
        ({"method": "full", "embedding_storage": "host"}, "method: tables that are stored otherwise cannot be"),
        ({"load_in_4bit": True, "load_in_8bit": True}, "load_in_4bit, load_in_8bit: both are set."),
        ({"checkpointing": "selective", "activation_budget": 2.0}, "checkpointing: a budget chooses by itself."),
        ({"overwrite": True, "resume": True}, "overwrite, resume: both are set."),
        ({"name": "a/b"}, "name: 'a/b' is not the name of one folder."),
        ({"name": ".."}, "name: '..' is not the name of one folder."),
        ({"name": ""}, "name: is empty."),
        ({"train": " "}, "train: is empty."),
    ],
)
def test_values_that_contradict_or_cannot_be(values: dict[str, Any], start: str) -> None:
    assert refused(**values).startswith(start)


def test_defaults_follow_the_method() -> None:
    assert make_config(GIVEN, "here").rate == 1e-3
    assert make_config({**GIVEN, "method": "full"}, "here").rate == 5e-5
    assert make_config({**GIVEN, "learning_rate": 2e-4}, "here").rate == 2e-4


@pytest.mark.parametrize(
    ("values", "name"),
    [
        ({}, "m-t"),
        ({"model": "BAAI/bge-small-en-v1.5", "train": "data/pairs.train.jsonl.gz"}, "bge-small-en-v1.5-pairs"),
        ({"train": "owner/name:config"}, "m-name"),
        ({"model": "runs/first/merged/"}, "merged-t"),
        ({"name": "mine"}, "mine"),
    ],
)
def test_a_run_has_a_name_and_a_folder(values: dict[str, Any], name: str) -> None:
    config = make_config({**GIVEN, **values}, "here")
    assert (config.run_name, config.folder) == (name, Path("runs") / name)


@pytest.mark.parametrize(
    ("key", "fix"),
    [
        ("batch-size", "Did you mean 'batch_size'?"),
        ("learnig_rate", "Did you mean 'learning_rate'?"),
        ("eval_spilt", "Did you mean 'eval_split'?"),
        ("qqq", "Known: train, split, "),
        (3, "Known: train"),
    ],
)
def test_unknown_keys_get_the_nearest_known_one(key: Any, fix: str) -> None:
    with pytest.raises(ConfigError) as caught:
        make_config({**GIVEN, key: 1}, "run.yaml")
    assert str(caught.value).startswith(f"run.yaml: unknown key {key!r}. {fix}")


@pytest.mark.parametrize("name", ["model", "train"])
@pytest.mark.parametrize("absent", ["left out", "null"])
def test_model_and_data_are_required(name: str, absent: str) -> None:
    values = {key: value for key, value in GIVEN.items() if key != name}
    with pytest.raises(ConfigError) as caught:
        make_config(values if absent == "left out" else {**values, name: None}, "run.yaml")
    assert str(caught.value) == (
        f"run.yaml: '{name}' is missing. Add `{name}: …` to the file, or --{name} to the command"
    )


def test_yaml_reads_as_people_write_it(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        "model: m\ntrain: café.csv\nlearning_rate: 1e-3\nepochs: 2\nwarmup: .1\nalpha: 6E+1\n"
        "columns:\n  anchor: question\n  positive: 'yes'\npacked: no\nplugins: []\nmax_rows:\n",
    )
    config = read_config(path, {})
    assert (config.learning_rate, config.epochs, config.warmup, config.alpha) == (1e-3, 2, 0.1, 60.0)
    assert config.columns == {"anchor": "question", "positive": "yes"}
    assert (config.packed, config.plugins, config.max_rows, config.train) == (False, [], None, "café.csv")


FLOATS = st.floats(min_value=1e-12, max_value=0.999, allow_nan=False)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(value=FLOATS, form=st.sampled_from(["{!r}", "{:e}", "{:.3g}", "{:g}", "{:E}"]))
def test_any_way_to_write_a_number_is_a_number(tmp_path: Path, value: float, form: str) -> None:
    text = form.format(value)
    assert read_config(write(tmp_path, f"model: m\ntrain: t\nlearning_rate: {text}\n"), {}).rate == float(text)


def test_text_that_only_looks_like_a_number_stays_text(tmp_path: Path) -> None:
    assert read_config(write(tmp_path, "model: e5\ntrain: t\nrevision: '1e5'\nname: e-3\n"), {}).revision == "1e5"


def test_flags_win_over_the_file(tmp_path: Path) -> None:
    path = write(tmp_path, "model: from-file\ntrain: t\nrank: 4\nalpha: 8\n")
    config = read_config(path, {"model": "from-flag", "rank": 32})
    assert (config.model, config.rank, config.alpha, config.train) == ("from-flag", 32, 8, "t")
    with pytest.raises(ConfigError, match="'train' is missing"):
        read_config(write(tmp_path, "model: m\n"), {})
    assert read_config(write(tmp_path, "model: m\n"), {"train": "t"}).train == "t"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model: m\ntrain: [a\n", ", line 3: is not valid YAML ("),
        ("model: m\n  train: t\n", ", line 2: is not valid YAML (mapping values are not allowed here). Mend that line"),
        ("model: m\ntrain: t\nrank: 4\nrank: 8\n", ", line 4: is not valid YAML (the key 'rank' stands there twice)."),
        (
            "model: m\ntrain: t\ncolumns: {a: x, a: y}\n",
            ", line 3: is not valid YAML (the key 'a' stands there twice).",
        ),
        ("model: !!python/object:os.system m\n", ", line 1: is not valid YAML (could not determine a constructor"),
        ("model: \x01\n", ": is not valid YAML ("),
        ("- model\n", ": holds no mapping of keys to values. Write lines such as `model: …`"),
        ("", ": holds no mapping of keys to values."),
        ("model: m\ntrain: t\nbatchsize: 8\n", ": unknown key 'batchsize'. Did you mean 'batch_size'?"),
    ],
)
def test_files_that_are_no_config(tmp_path: Path, text: str, message: str) -> None:
    path = write(tmp_path, text)
    with pytest.raises(ConfigError) as caught:
        read_config(path, {})
    assert str(caught.value).startswith(f"{path}{message}")
    assert "\n" not in str(caught.value)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere\.yaml: cannot be read \(No such file or directory\)\. Check"):
        read_config(tmp_path / "nowhere.yaml", {})
    with pytest.raises(ConfigError, match="cannot be read"):
        read_config(tmp_path, {})
    (tmp_path / "run.yaml").write_bytes(b"model: \xff\n")
    with pytest.raises(ConfigError, match="not UTF-8 text"):
        read_config(tmp_path / "run.yaml", {})


def test_without_pyyaml_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "yaml", None)
    with pytest.raises(ConfigError, match=r"needs PyYAML.*pip install 'burnish\[cli\]'"):
        read_config(write(tmp_path, "model: m\ntrain: t\n"), {})


def test_what_show_config_prints_reads_back_the_same(tmp_path: Path) -> None:
    import yaml

    config = make_config({**GIVEN, "columns": {"anchor": "q"}, "learning_rate": 1e-05, "plugins": ["x"]}, "here")
    assert read_config(write(tmp_path, yaml.safe_dump(asdict(config))), {}) == config


@pytest.mark.parametrize(("given", "found"), [(True, "on"), (False, "off"), ("offload", "offload")])
def test_yaml_s_on_and_off_are_checkpointing_s(given: Any, found: str) -> None:
    config = make_config({"model": "m", "train": "t.csv", "checkpointing": given}, "file.yaml")
    assert config.checkpointing == found
