"""`burnish.json` and the card's section in every folder that a model is saved to, read back, and no one's obstacle."""

from __future__ import annotations

import copy
import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss

from burnish import FastSentenceTransformer, SentenceTransformer, Trainer, TrainingArguments
from burnish.core.exporting import export_folder
from burnish.core.registry import PluginWarning

Make = Callable[..., Any]
TITLE = "## Training provenance"


def record(folder: Path) -> dict[str, Any]:
    """What a folder's `burnish.json` says."""
    found: dict[str, Any] = json.loads((folder / "burnish.json").read_text(encoding="utf-8"))
    return found


def card(folder: Path) -> str:
    return (folder / "README.md").read_text(encoding="utf-8")


def row(folder: Path, name: str) -> str:
    """A row of the card's table."""
    (line,) = [line for line in card(folder).splitlines() if line.startswith(f"| {name} |")]
    return line.split(" | ", 1)[1].rstrip(" |")


def change(folder: Path, **changes: Any) -> None:
    (folder / "burnish.json").write_text(json.dumps(record(folder) | changes), encoding="utf-8")


@pytest.fixture(scope="module")
def saved(adapted: Make, texts: list[str], tmp_path_factory: pytest.TempPathFactory) -> Any:
    """(folder that holds `adapter` and `merged`, the trained model's embeddings). Copy what you change."""
    folder = tmp_path_factory.mktemp("saved")
    model = adapted()
    model.save_pretrained(str(folder / "adapter"))
    model.save_pretrained_merged(folder / "merged")
    return folder, model.encode(texts)


def test_an_adapter_and_a_merged_folder_say_how_they_were_trained(saved: Any, tiny_bert_st: Path) -> None:
    assert not (tiny_bert_st / "burnish.json").exists() and TITLE not in card(tiny_bert_st)
    folder, _ = saved
    adapter, merged = record(folder / "adapter"), record(folder / "merged")
    assert adapter["purpose"] == "adapters" and adapter["trained_with"] == []
    own = {"distribution": "burnish", "version": adapter["burnish"]}
    assert adapter["family"] == {"name": "bert", "plugin": "bert", **own}
    assert adapter["backend"] == {"name": "reference", "plugin": "reference", **own}
    assert [kernel["operation"] for kernel in adapter["kernels"]] == ["packed_attention"]
    assert adapter["input"]["layout"] == "packed"
    assert {patch["state"] for patch in adapter["patches"]} == {"applied"}
    settings = adapter["adapter"]
    assert (settings["type"], settings["r"], settings["lora_alpha"], settings["merged"]) == ("LORA", 4, 16, False)
    assert "query" in settings["target_modules"]
    assert merged == adapter | {"adapter": settings | {"merged": True}}
    for name in ("adapter", "merged"):
        assert str(folder) not in (folder / name / "burnish.json").read_text(encoding="utf-8")
        assert card(folder / name).count(TITLE) == 1 and row(folder / name, "Family").startswith("bert of bert (burni")
    assert row(folder / "merged", "Adapter") == "LORA, r=4, lora_alpha=16, merged into the weights"
    assert row(folder / "adapter", "Adapter") == "LORA, r=4, lora_alpha=16"


def test_two_saves_are_equal(adapted: Make, tmp_path: Path) -> None:
    model = adapted()
    for name in ("one", "two"):
        model.save_pretrained(str(tmp_path / name))
    model.save_pretrained(str(tmp_path / "one"))
    files = [(tmp_path / name / "burnish.json").read_bytes() for name in ("one", "two")]
    assert files[0] == files[1]


@pytest.mark.parametrize("name", ["adapter", "merged"])
def test_plain_sentence_transformers_loads_them_as_ever(
    saved: Any, plain: Make, texts: list[str], tmp_path: Path, name: str
) -> None:
    folder, live = saved
    bare = shutil.copytree(folder / name, tmp_path / name)
    (bare / "burnish.json").unlink()
    with_record = plain(folder / name).encode(texts)
    assert abs(with_record - live).max() <= 1e-5
    assert (with_record == plain(bare).encode(texts)).all()


def test_what_became_of_the_model_since_is_recorded(load: Make, tiny_bert_st: Path, tmp_path: Path) -> None:
    model = load(tiny_bert_st, full_finetuning=True, use_gradient_checkpointing=True)
    model.save_pretrained(str(tmp_path / "before"))
    model.undo_patches()
    model.save_pretrained(str(tmp_path / "after"))
    before, after = record(tmp_path / "before"), record(tmp_path / "after")
    assert before["purpose"] == "full" and before["adapter"] is None and before["checkpointing"] != "off"
    assert {patch["state"] for patch in before["patches"]} == {"applied"} and before["kernels"]
    assert {patch["state"] for patch in after["patches"]} == {"undone"} and after["kernels"] == []
    assert after["input"] == {"layout": "padded", "reason": "patches undone"}


def test_the_card_is_left_alone_when_none_is_asked_for(load: Make, tiny_bert_st: Path, tmp_path: Path) -> None:
    model = load(tiny_bert_st, full_finetuning=True)
    model.save_pretrained(str(tmp_path / "none"), create_model_card=False)
    assert not (tmp_path / "none" / "README.md").exists() and (tmp_path / "none" / "burnish.json").exists()
    (tmp_path / "none" / "README.md").write_text("mine")
    model.save_pretrained(str(tmp_path / "none"), create_model_card=False)
    assert card(tmp_path / "none") == "mine"


def test_a_card_that_is_written_again_holds_the_section_once(
    saved: Any, load: Make, step: Make, tmp_path: Path
) -> None:
    folder, _ = saved
    text = card(folder / "merged")
    (tmp_path / "mine").mkdir()
    source = shutil.copytree(folder / "merged", tmp_path / "mine" / "model")
    (source / "README.md").write_text(f"{text}\n## Mine\n\nWords.\n", encoding="utf-8")
    again = load(source, full_finetuning=True)
    step(again)
    again.save_pretrained(str(tmp_path / "again"))
    found = card(tmp_path / "again")
    assert found.count(TITLE) == 1 and found.endswith("\n## Mine\n\nWords.\n")
    assert row(tmp_path / "again", "Adapter") == "none" and row(folder / "merged", "Adapter") != "none"
    assert row(tmp_path / "again", "Before").startswith("1 other set-up")
    load(tmp_path / "again", full_finetuning=True).save_pretrained(str(tmp_path / "third"))
    assert card(tmp_path / "third") == found


def test_training_on_keeps_the_history(saved: Any, load: Make, step: Make, tmp_path: Path) -> None:
    folder, _ = saved
    first = record(folder / "adapter")
    again = load(folder / "adapter")
    assert again.trained_with.record == first
    step(again)
    again.save_pretrained(str(tmp_path / "again"))
    assert record(tmp_path / "again") == first, "the same set-up is no other training"
    full = load(folder / "merged", full_finetuning=True)
    step(full)
    full.save_pretrained(str(tmp_path / "full"))
    found = record(tmp_path / "full")
    assert (found["purpose"], [one["purpose"] for one in found["trained_with"]]) == ("full", ["adapters"])
    assert found["trained_with"][0]["adapter"]["merged"] is True


def test_the_exporter_keeps_what_the_adapter_recorded(saved: Any, tmp_path: Path) -> None:
    folder, _ = saved
    files = export_folder(folder / "adapter", tmp_path / "exported", "merged", ())
    assert tmp_path / "exported" / "burnish.json" in files
    found, before = record(tmp_path / "exported"), record(folder / "adapter")
    assert found["purpose"] == "inference" and found["family"] is None and found["adapter"]["merged"] is True
    assert [one | {"trained_with": []} for one in found["trained_with"]] == [before]
    assert row(tmp_path / "exported", "Adapter") == "LORA, r=4, lora_alpha=16, merged into the weights"
    assert row(tmp_path / "exported", "Backend").startswith("reference of reference (burnish ")
    stock = SentenceTransformer(str(tmp_path / "exported"), device="cpu")
    stock.save_pretrained(str(tmp_path / "on"))
    assert [one["purpose"] for one in record(tmp_path / "on")["trained_with"]] == ["adapters"]


def test_a_checkpoint_has_it(load: Make, tiny_bert_st: Path, pairs: Any, plain: Make, tmp_path: Path) -> None:
    model = FastSentenceTransformer.get_peft_model(load(tiny_bert_st), r=4)
    arguments = TrainingArguments(
        str(tmp_path / "run"), max_steps=2, save_steps=1, per_device_train_batch_size=4, report_to="none",
        use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    trainer = Trainer(model, arguments, train_dataset=pairs, loss=MultipleNegativesRankingLoss(model))
    trainer.train()
    found = record(tmp_path / "run" / "checkpoint-2")
    assert found["adapter"]["r"] == 4 and found == record(tmp_path / "run" / "checkpoint-1")
    assert card(tmp_path / "run" / "checkpoint-2").count(TITLE) == 1
    plain(tmp_path / "run" / "checkpoint-2")
    trainer.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-1"))  # a warning would be an error
    assert model.trained_with is None


@pytest.fixture
def pushed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Where the files land that a push uploads."""

    def upload(folder: Path, _: Any) -> str:
        shutil.copytree(folder, tmp_path / "pushed")
        return "https://hub.test/commit/1"

    monkeypatch.setenv("HF_TOKEN", "hf_test")
    monkeypatch.setattr("burnish.core.hub.upload", upload)
    return tmp_path / "pushed"


@pytest.mark.parametrize("how", ["adapter", "merged", "with tokenizer"])
def test_what_is_pushed_has_it(adapted: Make, pushed: Path, texts: list[str], plain: Make, how: str) -> None:
    model = adapted()
    if how == "adapter":
        model.push_to_hub("me/model")
    else:
        model.push_to_hub_merged("me/model", tokenizer=model.tokenizer if how == "with tokenizer" else None)
    assert record(pushed)["adapter"]["merged"] is (how != "adapter")
    assert card(pushed).count(TITLE) == 1 and 'SentenceTransformer("me/model"' in card(pushed)
    assert abs(plain(pushed).encode(texts) - model.encode(texts)).max() <= 1e-5


def test_it_is_read_from_the_hub_at_the_revision_that_is_loaded(hub_cache: Path, load: Make, tmp_path: Path) -> None:
    cache = Path(shutil.copytree(hub_cache, tmp_path / "cache", symlinks=True))
    first = load("org/tiny", cache_folder=str(cache), full_finetuning=True)
    assert first.trained_with is None
    first.save_pretrained(str(tmp_path / "made"))
    shutil.copy(tmp_path / "made" / "burnish.json", cache / "models--org--tiny" / "snapshots" / ("1" * 40))
    assert load("org/tiny", cache_folder=str(cache)).trained_with is None
    found = load("org/tiny", cache_folder=str(cache), revision="v2").trained_with
    assert found.record["purpose"] == "full"


def test_a_missing_plugin_is_told_and_does_not_matter(
    saved: Any, load: Make, plain: Make, texts: list[str], tmp_path: Path
) -> None:
    folder = shutil.copytree(saved[0] / "adapter", tmp_path / "adapter")
    part = {"name": "fine", "plugin": "fine", "distribution": "burnish-fine", "version": "1.2"}
    change(folder, family=part)
    message = r"adapter: trained with family fine of fine \(burnish-fine 1\.2\), and burnish-fine is not installed; .*"
    with pytest.warns(PluginWarning, match=message + r"Run `pip install burnish-fine==1\.2`$") as caught:
        model = load(folder)
    assert len(caught) == 1 and model.trained_with.record["family"] == part
    assert abs(model.encode(texts) - saved[1]).max() <= 1e-5
    assert abs(load(folder, for_inference=True).encode(texts) - saved[1]).max() <= 1e-5
    assert abs(plain(folder).encode(texts) - saved[1]).max() <= 1e-5
    model.save_pretrained(str(tmp_path / "on"))
    found = record(tmp_path / "on")
    assert found["family"]["name"] == "bert" and [one["family"] for one in found["trained_with"]] == [part]
    load(tmp_path / "on")  # trained on with what is here now: nothing is missing from that


@pytest.mark.parametrize("text", ["{", '{"schema": 99}'])
def test_a_file_that_cannot_be_read_does_not_matter(
    saved: Any, load: Make, texts: list[str], tmp_path: Path, text: str
) -> None:
    folder = shutil.copytree(saved[0] / "merged", tmp_path / "merged")
    (folder / "burnish.json").write_text(text, encoding="utf-8")
    with pytest.warns(PluginWarning, match=r"merged: its burnish.json is not read \(") as caught:
        model = load(folder)
    assert len(caught) == 1 and model.trained_with is None
    assert abs(model.encode(texts) - saved[1]).max() <= 1e-5


def test_it_goes_with_a_copy_and_a_pickle(saved: Any, load: Make) -> None:
    model = load(saved[0] / "adapter")
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert other.trained_with == model.trained_with is not None


def test_a_new_model_saved_over_an_old_one_takes_its_record_away(
    saved: Any, tmp_path: Path, tiny_bert_st: Path
) -> None:
    from sentence_transformers.sentence_transformer.modules import StaticEmbedding

    folder = shutil.copytree(saved[0] / "merged", tmp_path / "over")
    tokenizer = SentenceTransformer(str(tiny_bert_st), device="cpu").tokenizer
    static = SentenceTransformer(modules=[StaticEmbedding(tokenizer.backend_tokenizer, embedding_dim=8)], device="cpu")
    assert static.burnish is None
    static.save_pretrained(str(folder))
    assert not (folder / "burnish.json").exists() and TITLE not in card(folder)
