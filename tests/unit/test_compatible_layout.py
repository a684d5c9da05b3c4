"""What is rewritten for older readers, file by file; that they read it right is shown in tests/exports."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from burnish.core.contracts import Exports, Family
from burnish.core.errors import ConfigError
from burnish.core.layout import check_layout, make_compatible, older_config
from burnish.families import gemma, modernbert

STOCK = "sentence_transformers.sentence_transformer.modules.pooling.Pooling"
TRUNK = "sentence_transformers.base.modules.transformer.Transformer"
TEXT = {"text": {"method": "forward", "method_output_name": "last_hidden_state"}}
PLAIN = {"transformer_task": "feature-extraction", "modality_config": TEXT, "module_output_name": "token_embeddings"}


def put(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value), encoding="utf-8")


def got(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def saved(folder: Path, pooling: Any = "mean", **files: Any) -> Path:
    """A folder as Sentence Transformers 6 leaves it."""
    types = [
        ("", TRUNK),
        ("1_Pooling", STOCK),
        ("2_Normalize", "sentence_transformers.base.modules.normalize.Normalize"),
    ]
    rows = [{"idx": n, "name": str(n), "path": path, "type": kind} for n, (path, kind) in enumerate(types)]
    put(folder / "modules.json", files.pop("modules", rows))
    put(folder / "1_Pooling/config.json", {"embedding_dimension": 8, "pooling_mode": pooling, "include_prompt": False})
    put(
        folder / "2_Normalize/config.json",
        dict.fromkeys(("module_input_name", "module_output_name"), "sentence_embedding"),
    )
    put(folder / "sentence_bert_config.json", files.pop("sentence_bert_config", PLAIN))
    put(folder / "config.json", {"model_type": "x", "dtype": "float32", "max_position_embeddings": 77})
    put(
        folder / "tokenizer_config.json",
        {"tokenizer_class": "TokenizersBackend", "model_max_length": 64, "is_local": True},
    )
    for name, value in files.items():
        put(folder / f"{name}.json", value)
    make_compatible(folder)
    return folder


def test_module_types_have_their_first_paths_and_strangers_keep_theirs(tmp_path: Path) -> None:
    rows = [
        {"type": TRUNK, "path": ""},
        {"type": "mine.Pooling", "path": "9"},
        {"type": "sentence_transformers.x.LogitScore"},
    ]
    folder = saved(tmp_path, modules=rows)
    assert [row["type"] for row in got(folder / "modules.json")] == [
        "sentence_transformers.models.Transformer", "mine.Pooling", "sentence_transformers.x.LogitScore"
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("mode", "on"),
    [
        ("cls", {"cls_token"}),
        ("lasttoken", {"lasttoken"}),
        ("weightedmean", {"weightedmean_tokens"}),
        (["cls", "mean"], {"cls_token", "mean_tokens"}),
    ],
)
def test_pooling_is_told_by_booleans(tmp_path: Path, mode: Any, on: set[str]) -> None:
    config = got(saved(tmp_path, pooling=mode) / "1_Pooling/config.json")
    assert config.pop("word_embedding_dimension") == 8 and config.pop("include_prompt") is False
    assert len(config) == 6 and {name for name, value in config.items() if value} == {
        f"pooling_mode_{one}" for one in on
    }


def test_a_concatenation_that_booleans_cannot_order_keeps_its_own_words(tmp_path: Path) -> None:
    config = got(saved(tmp_path, pooling=["mean", "cls"]) / "1_Pooling/config.json")
    assert config == {"embedding_dimension": 8, "pooling_mode": ["mean", "cls"], "include_prompt": False}


def test_the_length_is_written_and_what_says_nothing_is_not(tmp_path: Path) -> None:
    folder = saved(tmp_path / "text", sentence_bert_config={**PLAIN, "unpad_inputs": False})
    assert got(folder / "sentence_bert_config.json") == {"max_seq_length": 64, "do_lower_case": False}
    assert not (folder / "2_Normalize/config.json").exists()
    ranker = {**PLAIN, "transformer_task": "sequence-classification"}
    config = got(saved(tmp_path / "ranker", sentence_bert_config=ranker) / "sentence_bert_config.json")
    assert config == {"max_seq_length": 64, "do_lower_case": False, **ranker}
    other = {**PLAIN, "processing_kwargs": {"text": {"truncation": "only_first"}}}
    config = got(saved(tmp_path / "other", sentence_bert_config=other) / "sentence_bert_config.json")
    assert config["processing_kwargs"], "an older reader must stop at what it cannot do"


def test_a_tokenizer_without_a_limit_has_the_models(tmp_path: Path) -> None:
    unlimited = {"tokenizer_class": "X", "model_max_length": 1000000000000000019884624838656}
    folder = saved(tmp_path, tokenizer_config=unlimited)
    assert got(folder / "sentence_bert_config.json")["max_seq_length"] == 77


def test_the_tokenizer_is_one_that_transformers_4_knows(tmp_path: Path) -> None:
    token = {"content": "<a>", "lstrip": False, "special": True, "__type": "AddedToken"}
    config = {"tokenizer_class": "TokenizersBackend", "model_max_length": 9, "pad_token": "[P]", "eos_token": token,
              "extra_special_tokens": ["<x>"], "backend": "tokenizers", "add_eos_token": True}  # fmt: skip
    vocabulary = {"b": 1, "a": 0, "##c": 2}
    folder = saved(tmp_path, tokenizer_config=config, tokenizer={"model": {"type": "WordPiece", "vocab": vocabulary}})
    assert got(folder / "tokenizer_config.json") == {
        "tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 9, "pad_token": "[P]", "eos_token": token,
        "add_eos_token": True, "additional_special_tokens": ["<x>"],
    }  # fmt: skip
    assert got(folder / "special_tokens_map.json") == {
        "pad_token": "[P]", "eos_token": {"content": "<a>", "lstrip": False}, "additional_special_tokens": ["<x>"]
    }  # fmt: skip
    assert (folder / "vocab.txt").read_text() == "a\nb\n##c\n"


def test_what_a_call_left_in_the_tokenizer_is_forgotten(tmp_path: Path) -> None:
    state = {"truncation": {"max_length": 128}, "padding": {"strategy": "BatchLongest"}, "model": {"type": "BPE"}}
    limits = {"tokenizer_class": "X", "model_max_length": 256, "max_length": 128}
    folder = saved(tmp_path, tokenizer=state, tokenizer_config=limits)
    assert got(folder / "tokenizer.json") == {**state, "truncation": None, "padding": None}
    assert "max_length" not in got(folder / "tokenizer_config.json")


def test_inputs_that_the_model_does_not_take(tmp_path: Path) -> None:
    folder = saved(tmp_path)
    assert "model_input_names" not in got(folder / "tokenizer_config.json")
    make_compatible(folder, None, ["input_ids", "attention_mask"])
    assert got(folder / "tokenizer_config.json")["model_input_names"] == ["input_ids", "attention_mask"]


def test_an_adapter_leaves_out_what_peft_of_before_stops_at(tmp_path: Path) -> None:
    from peft import LoraConfig

    made: Any = LoraConfig
    config = made(r=4, target_modules=["query"]).to_dict() | {"peft_type": "LORA", "target_modules": ["query"]}
    later = set(config) - {"r", "lora_alpha", "target_modules", "peft_type"}
    assert "peft_version" in later or len(later) > 20
    older = got(saved(tmp_path / "plain", adapter_config={**config, "newer_part": 1}) / "adapter_config.json")
    assert older["r"] == 4 and older["newer_part"] == 1, "what acts must stay, and stop a reader that lacks it"
    assert "corda_config" not in older
    other = {"peft_type": "IA3", "newer_part": None}
    assert got(saved(tmp_path / "other", adapter_config=other) / "adapter_config.json") == other


def test_config_keys_of_before() -> None:
    assert older_config({"dtype": "bfloat16"}, None)["torch_dtype"] == "bfloat16"
    default = older_config({"rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}}, None)
    assert default["rope_theta"] == 5e5 and "rope_scaling" not in default
    scaled = older_config({"rope_parameters": {"rope_theta": 5e5, "rope_type": "yarn", "factor": 4.0}}, None)
    assert scaled["rope_scaling"] == {"rope_type": "yarn", "factor": 4.0}
    two = older_config({"architectures": ["XForSequenceClassification"]}, None)
    assert two["id2label"] == {"0": "LABEL_0", "1": "LABEL_1"} and two["label2id"] == {"LABEL_0": 0, "LABEL_1": 1}
    named = older_config({"architectures": ["XForTokenClassification"], "id2label": {"0": "no"}}, None)
    assert named["label2id"] == {"no": 0}
    ranker = older_config({}, None, activation="torch.nn.modules.linear.Identity")
    assert ranker["sbert_ce_default_activation_function"] == ranker["sentence_transformers"]["activation_fn"]
    family = Family(name="mine", exports=Exports(legacy_config=lambda config: {"old": config["new"]}))
    assert older_config({"new": 3}, family) == {"new": 3, "old": 3}


@pytest.mark.parametrize(
    ("kinds", "step"), [("fssf", 3), ("fsfsf", 2), ("ff", 1), ("fss", 3), ("sfs", None), ("ffs", None), ("fsff", None)]
)
def test_modernberts_whole_layers_as_one_number(kinds: str, step: int | None) -> None:
    names = {"f": "full_attention", "s": "sliding_attention"}
    assert modernbert.every([names[kind] for kind in kinds]) == step
    if step is not None:  # transformers 4: `layer_id % n != 0` is local
        assert kinds == "".join("s" if place % step else "f" for place in range(len(kinds)))


def test_gemmas_two_rotary_bases() -> None:
    config = gemma.sample("tiny").to_dict()
    config["rope_parameters"]["full_attention"] = {"rope_theta": 7.0, "rope_type": "linear", "factor": 8.0}
    older = gemma.older(config)
    assert older["rope_theta"] == 7.0 and older["rope_local_base_freq"] == 10000.0
    assert older["rope_scaling"] == {"rope_type": "linear", "factor": 8.0}


def test_a_layout_that_is_none() -> None:
    check_layout("native")
    with pytest.raises(ConfigError, match=r"^layout: 'classic' is unknown\. Pass 'compatible' or 'native'"):
        check_layout("classic")
