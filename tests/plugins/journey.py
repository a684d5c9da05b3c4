"""What the plugin tests run in an interpreter of its own: plugins are listed, asked, and a model trains with them.

Usage: journey.py FOLDER MODULE [met]: the model, a plugin's module whose import is watched, and whether the parts that
are wrong in themselves are tried too. The last line is JSON.
"""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Callable
from typing import Any

Report = dict[str, Any]


def listed() -> Report:
    """What the metadata say, before anything heavy or strange is imported."""
    from burnish.core.registry import registry

    plugins = [plugin for plugin in registry().plugins if not plugin.own]
    return {
        "labels": {plugin.name: plugin.label for plugin in plugins},
        "states": {plugin.name: f"{plugin.state} {plugin.reason}".strip() for plugin in plugins},
        "claims": {plugin.name: sorted(".".join(claim) for claim in plugin.claims) for plugin in plugins},
        "loaded": sorted({"torch", "transformers", *(plugin.module for plugin in plugins)} & sys.modules.keys()),
    }


def resolved(watched: str) -> Report:
    """Which family some configs get, and after which of them the watched module had been imported."""
    from transformers import BertConfig, ElectraConfig, MPNetConfig

    from burnish.core.registry import registry
    from burnish.core.selection import choose_family

    answers: Report = {}
    for config in (BertConfig(), MPNetConfig(), ElectraConfig()):
        choice = choose_family(registry(), config)
        answers[config.model_type] = [choice.family.name, choice.plugin.id, watched in sys.modules]
    answers["without plugins"] = choose_family(registry([]), ElectraConfig()).family.name
    answers["file"] = getattr(sys.modules.get(watched), "__file__", None)
    return answers


TEXTS = ["a short text", "one that is quite a bit longer than all of the others", "third", "and the last one"]


def one_step(model: Any) -> float:
    """The loss of one step on the CPU."""
    from datasets import Dataset  # type: ignore[import-untyped]
    from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss

    from burnish import Trainer, TrainingArguments

    arguments = TrainingArguments(
        output_dir="runs", max_steps=1, per_device_train_batch_size=4, learning_rate=1e-2, use_cpu=True,
        save_strategy="no", report_to="none", disable_tqdm=True, logging_steps=1,
    )  # fmt: skip
    pairs = Dataset.from_dict({"anchor": TEXTS, "positive": [text[::-1] for text in TEXTS]})
    trainer = Trainer(model, args=arguments, train_dataset=pairs, loss=MultipleNegativesRankingLoss(model))
    return float(trainer.train().training_loss)


def trained(folder: str) -> Report:
    """Load, adapt and train the model for one step."""
    import torch

    from burnish import FastSentenceTransformer

    torch.set_num_threads(1)
    texts = TEXTS
    padded = FastSentenceTransformer.from_pretrained(folder, device="cpu", packed=False)
    model = FastSentenceTransformer.from_pretrained(folder, device="cpu")
    assert model.burnish is not None
    embeddings = [one.encode(texts, convert_to_tensor=True) for one in (model, padded)]
    rows = [len(one.preprocess(texts)["input_ids"]) for one in (model, padded)]
    FastSentenceTransformer.get_peft_model(model, r=4)
    adapters = {name: value.detach().clone() for name, value in model.named_parameters() if value.requires_grad}
    loss = one_step(model)
    moved = sum(not torch.equal(adapters[name], value) for name, value in model.named_parameters() if name in adapters)
    decision = model.burnish.decision
    return {
        "family": f"{decision.family.family.name} of {decision.family.plugin.id}: {decision.family.reason}",
        "backend": f"{decision.backend.spec.name} of {decision.backend.plugin.id}",
        "kernel": decision.attention and f"{decision.attention.spec.name} of {decision.attention.plugin.id}",
        "passed over": {item.plugin.name: item.reason for item in decision.family.considered},
        "pooling": model.burnish.pooling,
        "rows": rows,
        "apart": float((embeddings[0] - embeddings[1]).abs().max()),
        "size": float(embeddings[1].abs().max()),
        "loss": loss,
        "adapters": len(adapters),
        "moved": moved,
    }


def checked() -> Report:
    """What `burnish plugins --check` says of each plugin, and the errors of the models that need the broken ones."""
    from transformers import PretrainedConfig

    from burnish.core.doctor import plugin_rows
    from burnish.core.errors import BurnishError
    from burnish.core.machine import describe
    from burnish.core.registry import registry
    from burnish.core.selection import choose_backend, choose_family

    errors = {}
    for kind, value in sorted(claim for plugin in registry().plugins if not plugin.own for claim in plugin.claims):
        try:
            if kind == "model_type":
                choose_family(registry(), type("Config", (PretrainedConfig,), {"model_type": value})())
            elif kind == "backend":
                choose_backend(registry(), describe("cpu"), value)
        except BurnishError as error:
            errors[f"{kind}.{value}"] = str(error)
    rows, broken = plugin_rows(check=True)
    return {"health": {row[0]: row[-1] for row in rows}, "broken": broken, "errors": errors}


def met(folder: str) -> Report:
    """What a user meets who asks for a part that is wrong in itself, and whether the model is as before afterwards."""
    import torch
    from transformers import ElectraConfig

    from burnish import FastSentenceTransformer
    from burnish.core.doctor import explain
    from burnish.core.errors import BurnishError
    from burnish.core.testing.report import check_distribution

    def load(**options: Any) -> Any:
        return FastSentenceTransformer.from_pretrained(folder, device="cpu", full_finetuning=True, **options)

    def check(model_type: str) -> None:
        from burnish.core.testing.find import sample_config

        sample_config(model_type)

    ElectraConfig(num_hidden_layers=1).save_pretrained("electra")
    before = load().encode(TEXTS, convert_to_tensor=True)
    attempts: dict[str, Callable[[], Any]] = {
        "a sample that raises": lambda: check_distribution("sampler", only=["state dict"]),
        "a sample of another type": lambda: check("sampler_other"),
        "a patch over a built-in's": lambda: load(plugins=["patcher"]),
        "a patch of the model's name": lambda: explain("electra", device="cpu"),
        "a kernel's wrong shape": lambda: load(plugins=["crooked"]).encode(TEXTS),
        "a step's wrong loss": lambda: one_step(load(backend="crooked")),
    }
    errors: Report = {}
    for name, attempt in attempts.items():
        try:
            attempt()
        except BurnishError as error:
            errors[name] = [str(error), error.exit_code]
    after = load()
    moved = float((after.encode(TEXTS, convert_to_tensor=True) - before).abs().max())
    return {"errors": errors, "moved": moved, "loss": one_step(after), "finite": bool(torch.isfinite(before).all())}


def main(folder: str, watched: str, *more: str) -> Report:
    """Everything, with the warnings of the time in which the model was loaded and trained."""
    report: Report = {"listed": listed(), "resolved": resolved(watched)}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        report["trained"] = trained(folder)
    report["warnings"] = [str(item.message) for item in caught if item.category.__name__ == "PluginWarning"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        report["checked"] = checked()
        report |= {name: {"met": met}[name](folder) for name in more}
    return report


if __name__ == "__main__":
    print(json.dumps(main(*sys.argv[1:])))
