"""What stands before and around a text: the model's prompts, and the chat template that embeddings do without."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .prepared import Prepared

Notes = list[tuple[str, str]]


def texts_as_they_are(module: Any) -> Notes:
    """Have the first module of a model without `modules.json` tokenise texts as they are; says so if it did otherwise.

    Sentence Transformers puts every text into the tokenizer's chat template where there is one. An embedding model is
    trained and served on the texts themselves: with the template around them, recall@10 of Qwen3-Embedding falls from
    35 to 23 (unslothai/unsloth issue 6881).

    Args:
        module: Sentence Transformers' `Transformer` module.
    """
    known: dict[str, Any] = module.modality_config
    if "message" not in known or "text" not in known:
        return []
    module.modality_config = {name: how for name, how in known.items() if name != "message"}
    module.input_formatter.supported_modalities = list(module.modality_config)
    return [("texts", "tokenised as they are, without the tokenizer's chat template")]


def prompt_notes(model: Prepared, given: frozenset[str], *, bare: bool) -> Notes:
    """Give a model without `modules.json` its family's prompts, and say which prompts the model has and whence.

    Args:
        model: A prepared model.
        given: Names of the prompts that the user passed, which stay.
        bare: Whether the repository has no `modules.json`.
    """
    assert model.burnish is not None
    family = model.burnish.decision.family.family
    added = {}
    if bare:
        added = {
            name: text for name, text in family.prompts.items() if name not in given and not model.prompts.get(name)
        }
        model.prompts = {**model.prompts, **added}
    names = [name for name, text in model.prompts.items() if text]
    if not names:
        return []
    source = f"default of family {family.name}, no modules.json" if added else "saved with the model, or given"
    return [("prompts", f"{', '.join(names)} ({source})")]


def said_of_prompts(model: Any, arguments: Any) -> str | None:
    """Which prompts a run puts before its texts, or that it puts none and the model has some; None if it has none."""
    names = [name for name, text in (getattr(model, "prompts", None) or {}).items() if text]
    if given := getattr(arguments, "prompts", None):
        return f"prompts before the training texts: {given!r}"
    if not names:
        return None
    fix = "TrainingArguments(prompts={column: text}) puts one before each text of a column"
    return f"the model's prompts ({', '.join(names)}) are not put before the training texts; {fix}"
