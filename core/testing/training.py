"""Checks of what a user does with a family: adapt, train, save, merge and read back."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch

from ..fast import FastSentenceTransformer
from .subject import (
    NotApplicable,
    Subject,
    backward,
    compare_outputs,
    embed,
    live_linears,
    quietly,
    unchanged,
)
from .tokenizer import words


def adapted(subject: Subject, **options: Any) -> Any:
    """The model with a LoRA adapter that acts: PEFT starts with B = 0."""
    loaded = subject.ours(adapters=True, **{"dtype": "float32", **options})
    with quietly():
        model = FastSentenceTransformer.get_peft_model(loaded, r=4, lora_alpha=8)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_B." in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.05)
    return model


def lora_reach(subject: Subject) -> str:
    """LoRA adapts every linear layer that the embeddings depend on and no other; each adapter gets a gradient."""
    alive = live_linears(subject.plain(), subject.texts)
    model = adapted(subject)
    found = {
        name.partition(".model.")[2].split(".lora_A")[0] for name, _ in model.named_parameters() if ".lora_A" in name
    }
    assert alive, "no linear layer gets a gradient: nothing would be proved"
    dead, missing = sorted(found - alive), sorted(alive - found)
    assert not dead, f"an adapter on {dead[0]} would be dead: nothing reads its output"
    assert not missing, f"{missing[0]} has no adapter ({len(missing)} layers in all)"
    _, gradients = backward(model, subject.texts)
    still = [name for name in gradients if ".lora_" in name and float(gradients[name].abs().max()) == 0]
    assert not still and len(gradients) == 2 * len(found), f"no gradient reaches {(still or ['some adapter'])[0]}"
    return f"{len(found)} layers"


def merging(subject: Subject) -> str:
    """Saved, merged and read back by plain Sentence Transformers, the embeddings are the live model's."""
    model = adapted(subject)
    base = embed(subject.ours(), subject.texts).detach()
    live = embed(model, subject.texts).detach()
    assert float((live - base).abs().max()) > 1e-3, "the adapter changes nothing: nothing would be proved"
    adapter, merged = subject.folder / "adapter", subject.folder / "merged"
    with quietly():
        model.save_pretrained(str(adapter))
        model.save_pretrained_merged(merged)
    read = subject.read(merged)
    keys, stock = list(read[0].model.state_dict()), list(subject.plain()[0].model.state_dict())
    assert keys == stock, "the merged weights have other names than the stock model's"
    tolerance = 10 * subject.tolerance
    errors = [
        compare_outputs(embed(other, subject.texts).detach(), live, tolerance)
        for other in (read, subject.read(adapter))
    ]
    again = subject.ours(adapter, adapters=True, dtype="float32")
    errors.append(compare_outputs(embed(again, subject.texts).detach(), live, tolerance))
    return f"{max(errors):.0e}"


def state_dict(subject: Subject) -> str:
    """The state dict has the stock model's keys in their order, and what is saved holds the stock model's modules only:
    those of libraries, and of whoever brings the encoder itself."""
    ours, theirs = subject.ours(), subject.plain()
    assert list(ours.state_dict()) == list(theirs.state_dict()), "the keys differ"
    folder = subject.folder / "full"
    with quietly():
        ours.save_pretrained(str(folder))
    needed, stock = (
        {kind.__module__.partition(".")[0] for kind in map(type, model.modules())}
        for model in (subject.read(folder), theirs)
    )
    assert needed <= stock, f"the saved model needs {sorted(needed - stock)} beside {sorted(stock)}"
    error = compare_outputs(
        embed(subject.read(folder), subject.texts).detach(),
        embed(theirs, subject.texts).detach(),
        10 * subject.tolerance,
    )
    return f"{len(list(theirs.state_dict()))} keys, {error:.0e}"


def masters(subject: Subject) -> str:
    """A half-precision checkpoint trains in float32 masters, says so, and keeps its dtype only where asked to."""
    from transformers import AutoModel

    half = subject.folder / "half"
    if not half.exists():
        model = AutoModel.from_pretrained(subject.repository, dtype=torch.bfloat16)
        model.save_pretrained(half)
        for file in subject.repository.glob("tokenizer*"):
            (half / file.name).write_bytes(file.read_bytes())
    ours = subject.ours(half)
    assert {parameter.dtype for parameter in ours.parameters()} == {torch.float32}, "the masters are not float32"
    assert "the checkpoint is bfloat16" in str(ours.burnish), "nothing says that the checkpoint is in half precision"
    kept = subject.ours(half, dtype="auto")
    assert {parameter.dtype for parameter in kept.parameters()} == {torch.bfloat16}
    return "float32 masters"


def dropout(subject: Subject) -> str:
    """Each dropout of the config acts on packed input as it does on the stock model, and as strongly."""
    said = []
    texts, draws = subject.texts[:4], max(4, min(12, subject.examples))
    for name in subject.dropouts:
        setting: dict[str, Any] = {name: 0.3}
        spread = _spread(subject.plain(**setting), texts, draws)
        ours = _spread(subject.ours(config_kwargs=setting), texts, draws)
        if spread < NOISE:
            assert ours < NOISE, f"{name} acts, and on the stock model it does not"
            continue
        assert 0.7 < ours / spread < 1.4, f"{name} moves the embeddings {ours / spread:.2f} times as much as stock"
        said.append(f"{name} {ours / spread:.2f}")
    assert _spread(subject.ours(), texts, draws) < NOISE, "a dropout that the config does not have"
    if not said:
        raise NotApplicable("the config has no dropout that acts on embeddings")
    return ", ".join(said)


# Sums in no fixed order, as a GPU adds packed texts up, move an embedding of size 1 by 1e-7 from draw to draw.
NOISE = 1e-5


def _spread(model: Any, texts: list[str], draws: int) -> float:
    """How far the embeddings move from draw to draw in training mode."""
    model.train()
    torch.manual_seed(7)
    with torch.no_grad():
        found = torch.stack([embed(model, texts) for _ in range(draws)])
    return float(found.std(0).mean())


def prompts(subject: Subject) -> str:
    """Prompts live through loading, a training step and saving, and act when they are asked for."""
    given = {"query": "w1 w2 w3", "passage": "w4"}
    model = subject.ours(prompts=given)
    backward(model, subject.texts)
    folder = subject.folder / "prompted"
    with quietly():
        model.save_pretrained(str(folder))
    read, again = subject.read(folder), subject.ours(folder)
    defaults = {name: text for name, text in subject.family.prompts.items() if name not in given and text}
    for other in (model, read, again):
        kept = {name: text for name, text in other.prompts.items() if text}
        assert kept == {**defaults, **given}, f"the prompts came back as {kept}"
    texts = subject.texts[:3]
    found, expected = (other.encode(texts, prompt_name="query", convert_to_tensor=True) for other in (again, read))
    bare = again.encode(texts, convert_to_tensor=True)
    assert float((found - bare).abs().max()) > 1e-3, "the prompt changes nothing"
    return f"{len(given) + len(defaults)} prompts, {compare_outputs(found, expected, 10 * subject.tolerance):.0e}"


def trainer(subject: Subject) -> str:
    """Four steps of the trainer, by the backend in question, have plain Sentence Transformers' losses and weights."""
    from sentence_transformers import SentenceTransformerTrainer

    from ..trainer import Trainer

    mine, loss = _train(subject, Trainer, subject.ours(), subject.folder / "run-ours")
    stock, reference = _train(subject, SentenceTransformerTrainer, subject.plain(), subject.folder / "run-plain")
    assert len(reference) == 4 and reference[0] - reference[-1] > 1e-3, f"the losses do not fall: {reference}"
    apart = max(abs(one - other) / abs(other) for one, other in zip(loss, reference, strict=True))
    assert apart <= 100 * subject.tolerance, f"losses {loss} against {reference}"
    error = compare_outputs(mine, stock, 100 * subject.tolerance, "the embeddings after training")
    return f"losses {apart:.0e}, embeddings after it {error:.0e}"


# At which the losses of random tiny models fall, and stay finite for those of published size.
RATE = 2e-3


def _train(subject: Subject, kind: Any, model: Any, folder: Path) -> tuple[torch.Tensor, list[float]]:
    from datasets import Dataset  # type: ignore[import-untyped]
    from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss

    from ..arguments import TrainingArguments

    pairs = Dataset.from_dict(
        {"anchor": [words(3 + n % 5, n) for n in range(16)], "positive": [words(9 + n % 7, n + 3) for n in range(16)]}
    )
    # Plain gradient descent without clipping: Adam and a clipped norm would hide a gradient of the wrong size.
    arguments = TrainingArguments(
        output_dir=str(folder), max_steps=4, per_device_train_batch_size=8, learning_rate=RATE, logging_steps=1,
        optim="sgd", max_grad_norm=0.0, lr_scheduler_type="constant",
        report_to="none", save_strategy="no", disable_tqdm=True, use_cpu=subject.device == "cpu", seed=11,
    )  # fmt: skip
    with quietly():
        run = kind(model, args=arguments, train_dataset=pairs, loss=MultipleNegativesRankingLoss(model))
        run.remove_callback(_printer())
        run.train()
    losses = [row["loss"] for row in run.state.log_history if "loss" in row]
    model.eval()
    return embed(model, subject.texts).detach(), losses


def _printer() -> Any:
    from transformers.trainer_callback import PrinterCallback

    return PrinterCallback


def heads(subject: Subject) -> str:
    """A task head that reads a packed batch gives the logits and gradients of the stock model on padded input, token
    types of pairs included; every weight of it trains; an adapter with a classification head is saved, merged and read
    back by plain Sentence Transformers with the live model's scores."""
    if subject.family.packing is None or not subject.family.heads:
        raise NotApplicable("the family says of no head how it reads a packed batch")
    from . import heads as packed_heads

    tasks = sorted(subject.family.heads)
    told = [f"{task} {packed_heads.error(subject, task):.0e}" for task in tasks]
    kept = [f"saved and read {packed_heads.survival(subject):.0e}"] if packed_heads.CLASSIFY in tasks else []
    return ", ".join([*told, *kept])


def copies(subject: Subject) -> str:
    """A prepared model can be copied and pickled; each copy works, and undoes its own patches only."""
    import pickle

    model = subject.ours()
    expected = embed(model, subject.texts).detach()
    kinds = [type(module) for module in model.modules()]
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert unchanged(embed(other, subject.texts), expected), "a copy gives other embeddings"
        other.undo_patches()
        compare_outputs(embed(other, subject.texts).detach(), expected, 10 * subject.tolerance)
        with torch.no_grad():
            next(iter(other.parameters())).zero_()
    assert [type(module) for module in model.modules()] == kinds, "undoing a copy's patches undid the model's"
    assert unchanged(embed(model, subject.texts), expected), "a change to a copy changed the model"
    return "deepcopy and pickle"
