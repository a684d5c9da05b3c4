"""Task heads on packed input: their logits and gradients are the stock model's on padded input, and they are kept."""

from __future__ import annotations

import copy
from collections.abc import Callable
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..adapters import reads_saved_modules
from ..contracts import Head
from ..fast_cross_encoder import FastCrossEncoder
from ..heads import head_modules, read_vectors
from ..machine import describe
from ..packing import name_attention, register_attention
from ..patching import PatchPlan, patched
from ..registry import registry
from ..selection import choose_family, choose_kernel
from .subject import Subject, compare_gradients, compare_outputs, enliven, quietly
from .tokenizer import save_tokenizer, words

LENGTHS = (7, 1, 19, 4, 2)
CLASSIFY = "sequence-classification"


def error(subject: Subject, task: str) -> float:
    """The largest error of logits and gradients, packed against padded."""
    head = subject.family.heads[task]
    model = subject.exactly(_model(subject, task, subject.still))
    ids, kinds = _ids(subject), _kinds(model)
    expected = _padded(model, head, ids, kinds, subject)
    reference = _gradients(model, expected)
    _check_live(model, head_modules(model, head), head)
    drawn = _in_training(model, lambda: _padded(model, head, ids, kinds, subject))
    choice = choose_family(registry(subject.plugins), subject.config)
    plan = PatchPlan(choice.claims(model, describe(subject.device)))
    kernel = choose_kernel(registry(subject.plugins), describe(subject.device), "packed_attention")
    assert kernel is not None and subject.family.packing is not None
    with patched(model, plan):
        name_attention(model, register_attention(kernel.spec.name, kernel.load()))
        bounds = torch.tensor([0, *torch.tensor(LENGTHS).cumsum(0).tolist()], dtype=torch.int32, device=subject.device)
        offset = subject.family.packing.position_offset
        positions = torch.cat([torch.arange(length) + offset for length in LENGTHS])[None].to(subject.device)
        batch = {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds}
        if kinds:
            batch["token_type_ids"] = torch.cat(kinds)[None].to(subject.device)
        hidden = model.base_model(
            input_ids=torch.cat(ids)[None], position_ids=positions, max_length_q=max(LENGTHS),
            max_length_k=max(LENGTHS), **batch,
        ).last_hidden_state[0]  # fmt: skip
        vectors = read_vectors(head, hidden, bounds)
        found = head.logits(model, vectors)
        gradients = _gradients(model, found)
        some = _columns(model, head, vectors.detach(), subject.tolerance)
        dropped = _in_training(model, lambda: head.logits(model, vectors.detach()))
    apart = compare_outputs(found.detach(), expected.detach(), subject.tolerance, f"the logits for {task}")
    _compare_dropout(dropped, drawn, found, subject)
    return max(apart, some, compare_gradients(gradients, reference, subject.tolerance))


def _model(subject: Subject, task: str, config: Any) -> Any:
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoModelForTokenClassification

    kinds: dict[str, Any] = {
        CLASSIFY: AutoModelForSequenceClassification,
        "text-generation": AutoModelForCausalLM,
        "token-classification": AutoModelForTokenClassification,
    }
    assert task in kinds, f"there is no task {task!r}; known: {', '.join(kinds)}"
    config = copy.deepcopy(config)
    config.num_labels = 3
    config.use_cache = False
    torch.manual_seed(subject.seed)
    model = kinds[task].from_config(config)
    enliven(model)
    return model.eval().to(subject.device)


def _ids(subject: Subject) -> list[Tensor]:
    """Token ids of each text, none of them padding."""
    pad = int(getattr(subject.config, "pad_token_id", None) or 0)
    draw = torch.Generator().manual_seed(3)
    return [torch.randint(pad + 1, 40, (length,), generator=draw).to(subject.device) for length in LENGTHS]


def _kinds(model: Any) -> list[Tensor]:
    """Token types of pairs, for a model that has more than one: the last third of each text is its second part."""
    takes = "token_type_ids" in signature(model.base_model.forward).parameters
    if not takes or int(getattr(model.config, "type_vocab_size", 0) or 0) < 2:
        return []
    return [(torch.arange(length) >= 2 * length / 3).long() for length in LENGTHS]


def _padded(model: Any, head: Head, ids: list[Tensor], kinds: list[Tensor], subject: Subject) -> Tensor:
    """The stock model's logits: of each text, or of each token that is no padding."""
    pad = int(getattr(subject.config, "pad_token_id", None) or 0)
    grid = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=pad)
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in ids], batch_first=True)
    types = torch.nn.utils.rnn.pad_sequence(kinds, batch_first=True).to(grid.device) if kinds else None
    more = {} if types is None else {"token_type_ids": types}
    logits: Tensor = model(input_ids=grid, attention_mask=mask, **more).logits
    if logits.dim() == 2:
        return logits
    if head.reads == "every":
        return logits[mask.bool()]
    places = mask.sum(1) - 1 if head.reads == "last" else torch.zeros(len(ids), dtype=torch.long, device=logits.device)
    return logits[torch.arange(len(ids), device=logits.device), places]


def _gradients(model: Any, logits: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(4)).to(logits)
    torch.autograd.backward((logits * weights).sum())
    return {name: value.grad.clone() for name, value in model.named_parameters() if value.grad is not None}


def _in_training(model: Any, run: Callable[[], Tensor]) -> Tensor | None:
    """What `run` gives with half of what the head reads dropped, by a fixed seed; None where the head drops nothing.

    The base model keeps everything, so that the same numbers are drawn whatever the input's layout.
    """
    base = model.base_model
    inside = {id(module) for module in base.modules()}
    drops = [one for one in model.modules() if isinstance(one, torch.nn.Dropout) and id(one) not in inside]
    if not drops:
        return None
    before = [one.p for one in drops]
    for one in drops:
        one.p = 0.5
        one.train()
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(5)
        found = run()
    for one, rate in zip(drops, before, strict=True):
        one.p = rate
        one.eval()
    return found


def _compare_dropout(found: Tensor | None, expected: Tensor | None, still: Tensor, subject: Subject) -> None:
    """Dropout before the classifier is drawn as the stock model draws it; for every token at least it is drawn."""
    if found is None or expected is None:
        return
    assert float((found - still.detach()).abs().max()) > 1e-3, "the head's dropout is not drawn in training"
    if found.shape[0] == len(LENGTHS):
        compare_outputs(found, expected, subject.tolerance, "the logits in training, with the head's dropout,")


def _check_live(model: Any, parts: list[str], head: Head) -> None:
    """Every weight of the head has a gradient, in the stock model already: else comparing them would prove nothing."""
    for suffix in head.inside:
        assert any(part.endswith(f".{suffix}") for part in parts), f"the head has no {suffix} inside the base model"
    assert parts, "the model has no module outside of its base model: this is no head"
    for part in parts:
        for name, value in model.get_submodule(part).named_parameters():
            live = value.grad is not None and float(value.grad.abs().max()) > 0
            assert live, f"no gradient reaches {part}.{name}: the head does not read it"


def _columns(model: Any, head: Head, vectors: Tensor, tolerance: float) -> float:
    """The error of some logits alone against the same ones of all, where the head can compute some."""
    if head.columns is None:
        return 0.0
    with torch.no_grad():
        every = head.logits(model, vectors)
        asked = torch.tensor([every.shape[1] - 1, 0], device=vectors.device)
        return compare_outputs(head.columns(model, vectors, asked), every[:, asked], tolerance, "the logits of columns")


def survival(subject: Subject) -> float:
    """The largest error of scores after an adapter with its head was saved, merged and read again; a text is a pair."""
    from sentence_transformers import CrossEncoder

    place = subject.folder / "headed"
    _model(subject, CLASSIFY, subject.still).float().save_pretrained(place / "base")
    first = subject.family.heads[CLASSIFY].reads != "last"
    save_tokenizer(place / "base", subject.config, first=first, max_length=subject.longest, token_types=_two(subject))
    pairs = [(words(9, 1), words(4, 2)), (words(1, 3), words(subject.longest, 4)), ("", words(3, 5)), ("", "")]

    def load(folder: Path) -> Any:
        given: dict[str, Any] = {"backend": subject.backend, "plugins": subject.plugins, "dtype": "float32"}
        with quietly():
            return FastCrossEncoder.from_pretrained(folder, device=subject.device, **given)

    with quietly():
        model = FastCrossEncoder.get_peft_model(load(place / "base"), r=4, lora_alpha=64)
    reason = "not prepared" if model.burnish is None else model.burnish.decision.packed_reason
    assert model.packed_scores is not None, f"input is padded: {reason}"
    before = model.predict(pairs, convert_to_tensor=True)
    _train(model, pairs)
    live = model.predict(pairs, convert_to_tensor=True)
    assert float((live - before).abs().max()) > 1e-3, "training changes nothing: nothing would be proved"
    with quietly():
        model.save_pretrained(str(place / "adapter"))
        model.save_pretrained_merged(place / "merged")
    worst = 0.0
    for read in ("adapter", "merged"):
        readers: list[Callable[[Path], Any]] = [load]
        if read == "merged" or reads_saved_modules():
            readers.append(lambda folder: CrossEncoder(str(folder), device=subject.device))
        for reader in readers:
            found = reader(place / read).predict(pairs, convert_to_tensor=True)
            what = f"the scores of the {read}, read by {'Burnish' if reader is load else 'Sentence Transformers'},"
            worst = max(worst, compare_outputs(found, live, 10 * subject.tolerance, what))
    return worst


def _two(subject: Subject) -> bool:
    return bool(_kinds(_model(subject, CLASSIFY, subject.still)))


def _train(model: Any, pairs: list[tuple[str, str]]) -> None:
    """A step that moves the adapter and the head."""
    trained = [value for value in model.parameters() if value.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.05)
    for _ in range(2):  # an adapter's first gradient reaches one of its two matrices only
        optimizer.zero_grad()
        features = {
            key: value.to(model.device) if torch.is_tensor(value) else value
            for key, value in model.preprocess(pairs).items()
        }
        torch.autograd.backward(model(features)["scores"].square().mean())
        optimizer.step()
    still = [name for name, value in model.named_parameters() if value.requires_grad and not value.grad.any()]
    assert not still, f"no gradient reaches {still[0]} under an adapter ({len(still)} in all)"
