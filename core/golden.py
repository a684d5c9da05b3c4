"""Golden vectors: what a saved model gives for a few texts, in float32, so that anybody can check any server by them.

`golden.json` lies beside the weights. Its texts are what consumers are known to differ in: no text at all, one longer
than the model takes, letters of many scripts, white space, and each prompt.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from .deploy import longest_of
from .loading import room_of
from .packing import padded
from .quantised import layers
from .stored_table import StoredTable

if TYPE_CHECKING:
    from numpy.typing import NDArray

FILE = "golden.json"
SCHEMA = 1
# A text of so many words is cut off by a model that takes fewer tokens, and costs others no more than this.
LONGEST = 640
BATCH = 8
# Characters: all texts below but the one that is cut off.
_SHORT = 200
TEXTS = (
    "A cat sits on the mat.",
    "",
    " ",
    "x",
    "Which planet is known as the Red Planet?",
    "Mars, known for its reddish appearance, is often referred to as the Red Planet.",
    "UPPER CASE, lower case and miXed cAsE",
    "naïve café, Straße, İstanbul, Łódź: e\u0301 and é",
    "火星は、その赤みを帯びた外観から、しばしば「赤い惑星」と呼ばれています。",
    "يُعرف المريخ بالكوكب الأحمر",
    "मंगल को लाल ग्रह कहा जाता है",
    "emoji 👩‍🚀🚀 and ﬁne ligatures, ½ ± № ∑",
    "tabs\tand\nlines\r\n  and   many   blanks ",
    "def f(x: int) -> str: return f'{x:>4}'  # 3.14e-10, 0xFF, $9.99",
    "https://example.org/a/b?q=1&r=%20#top, name@example.org",
    "Donaudampfschifffahrtselektrizitätenhauptbetriebswerkbauunterbeamtengesellschaft" * 2,
)
PAIRS = (
    ("Which planet is known as the Red Planet?", TEXTS[5]),
    ("Which planet is known as the Red Planet?", "Venus is often called Earth's twin."),
    ("Which planet is known as the Red Planet?", ""),
    ("", "A cat sits on the mat."),
    ("", ""),
    ("x", "y"),
    ("how to sort a list", "sorted(values, key=len) gives a new list; values.sort() sorts in place."),
    ("how to sort a list", "A cat sits on the mat."),
    ("naïve café", TEXTS[7]),
    ("赤い惑星", TEXTS[8]),
    ("الكوكب الأحمر", TEXTS[9]),
    ("लाल ग्रह", TEXTS[10]),
    ("emoji 🚀", TEXTS[11]),
    ("UPPER CASE", "upper case"),
    ("tabs\tand\nlines", TEXTS[12]),
    ("price", TEXTS[13]),
)
_WORDS = ("planet", "river", "music", "seven", "garden", "theory", "market", "ocean", "winter", "engine", "paper")


def long_text(tokens: int | None, room: int | None = None) -> str:
    """A text of more words than `tokens`, up to `LONGEST` of them; of a model that cuts texts to more tokens than the
    `room` of its positions, and fails on them, a text that surely fits: a word is ten tokens at the most."""
    count = min(LONGEST, tokens + tokens // 4 + 8) if tokens else LONGEST
    if room is not None and (tokens is None or tokens > room):
        count = max(1, room // 10)
    return " ".join(_WORDS[(place * 7 + place * place // 5) % len(_WORDS)] for place in range(count))


def texts_for(longest: int | None, prompts: Mapping[str, str], room: int | None = None) -> list[tuple[str, str]]:
    """(text, name of its prompt or "") of everything a model of embeddings is asked."""
    plain = [(text, "") for text in (*TEXTS, long_text(longest, room))]
    return plain + [(text, name) for name, prompt in sorted(prompts.items()) if prompt for text in TEXTS[4:6]]


def pairs_for(longest: int | None, room: int | None = None) -> list[tuple[str, str]]:
    """The pairs that a reranker is asked, one of them longer than it takes."""
    return [*PAIRS, ("planet music", long_text(longest, room))]


def write_golden(model: Any, folder: Path, *, rounded: str | None = None) -> str | None:
    """Ask the model and write what it says; returns why nothing was written, or None.

    The model is asked in evaluation mode, padded, its weights taken to float32 one module at a time, and is left as it
    was. A model whose answers here are not those of what is saved has no golden vectors.

    Args:
        model: A SentenceTransformer or a CrossEncoder, plain or Burnish's.
        folder: Where `golden.json` goes.
        rounded: Why the saved weights are not those of `model`, where they are not.
    """
    reason = rounded or _unlike_saved(model)
    if reason is not None:
        return reason
    try:
        with reference(model):
            found = _asked(model)
    except Exception as error:  # the model itself is saved whatever a few texts do to it
        reason = " ".join(str(error).split()) or type(error).__name__
        warnings.warn(f"no golden vectors are saved with the model: {reason}", UserWarning, stacklevel=3)
        return reason
    (folder / FILE).write_text(_as_text(found), encoding="utf-8")
    return None


def _unlike_saved(model: nn.Module) -> str | None:
    """Why what the model computes here is not what its saved folder computes elsewhere."""
    from torch.distributed.tensor import DTensor

    if any(True for _ in layers(model)):
        return "the base is quantised here and need not be elsewhere; save_pretrained_merged writes them"
    if any(isinstance(module, StoredTable) for module in model.modules()):
        return "embedding tables are stored in fewer bits here; save_pretrained_merged writes them"
    if any(isinstance(parameter, DTensor) or parameter.is_meta for parameter in model.parameters()):
        return "the weights are spread over several devices"
    return None


def _asked(model: Any) -> dict[str, Any]:
    from sentence_transformers import CrossEncoder
    from sentence_transformers.base.modules import Transformer

    longest = longest_of(model)
    first = model[0]  # a static model has no transformer
    room = room_of(first.config, first._infer_flatten_position_offset()) if isinstance(first, Transformer) else None
    common = {"schema": SCHEMA, "dtype": "float32"}
    if isinstance(model, CrossEncoder):
        pairs = pairs_for(longest, room)
        ids = [_token_ids(model, pair) for pair in pairs]
        return {**common, "kind": "scores", "inputs": pairs, "token_ids": ids, "outputs": score(model, pairs)}
    asked = texts_for(longest, model.prompts, room)
    vectors = embed(model, asked)
    prompts = [name or None for _, name in asked]
    texts = [model.prompts.get(name, "") + text for text, name in asked]
    return {
        **common, "kind": "embeddings", "inputs": [text for text, _ in asked], "prompts": prompts, "texts": texts,
        "token_ids": [_token_ids(model, text) for text in texts], "outputs": vectors,
    }  # fmt: skip


def embed(model: Any, asked: Sequence[tuple[str, str]]) -> NDArray[Any]:
    """(N, dimensions) float32 embeddings of (text, prompt name or ""), at the model's full width."""
    found: list[Any] = [None] * len(asked)
    width, model.truncate_dim = model.truncate_dim, None
    try:
        for name in sorted({name for _, name in asked}):
            named = [place for place, (_, one) in enumerate(asked) if one == name]
            # A default prompt of the model's is kept out: what was asked is what stands in the file.
            prompt = model.prompts[name] if name else ""
            for places in _alike(named, [len(text) for text, _ in asked]):
                texts = [asked[place][0] for place in places]
                rows = model.encode(texts, prompt=prompt, batch_size=BATCH, show_progress_bar=False)
                for place, row in zip(places, rows, strict=True):
                    found[place] = row
    finally:
        model.truncate_dim = width
    return np.stack(found).astype(np.float32)


def score(model: Any, pairs: Sequence[tuple[str, str]]) -> NDArray[Any]:
    """(N,) or (N, labels) float32 logits of pairs."""
    found: list[Any] = [None] * len(pairs)
    for places in _alike(range(len(pairs)), [len(one) + len(other) for one, other in pairs]):
        asked = [pairs[place] for place in places]
        rows = model.predict(asked, batch_size=BATCH, activation_fn=nn.Identity(), show_progress_bar=False)
        for place, row in zip(places, rows, strict=True):
            found[place] = row
    return np.asarray(found, dtype=np.float32)


def _alike(places: Sequence[int], characters: Sequence[int]) -> list[list[int]]:
    """The long texts apart from the others, which would be padded to their length: the real MiniLM is asked in 700
    tokens in place of 2,200."""
    short = [place for place in places if characters[place] <= _SHORT]
    return [some for some in (short, [place for place in places if characters[place] > _SHORT]) if some]


def _token_ids(model: Any, given: Any) -> list[int] | None:
    """What the tokenizer makes of one input, special tokens included; None for a model without such a tokenizer."""
    ids = model.preprocess([given]).get("input_ids")
    return None if ids is None or ids.dim() != 2 else [int(number) for number in ids[0]]


def _as_text(found: dict[str, Any]) -> str:
    """JSON with one input a line, floats in the fewest digits that are the same float32."""
    head = {key: value for key, value in found.items() if not isinstance(value, list | np.ndarray)}
    columns = {key: list(value) for key, value in found.items() if key not in head}
    lines = [json.dumps(head)[:-1]]
    for key, values in columns.items():
        rows = ",\n".join(f"  {_row(value)}" for value in values)
        lines.append(f" {json.dumps(key)}: [\n{rows}\n ]")
    return ",\n".join(lines) + "}\n"


def _row(value: Any) -> str:
    if isinstance(value, np.ndarray):
        return f"[{', '.join(str(number) for number in value.astype(np.float32))}]"
    return str(value) if isinstance(value, np.floating) else json.dumps(value, ensure_ascii=False)


@contextmanager
def reference(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, padded input and float32 throughout, for the length of a block; nothing of it is left behind."""
    modes = [(module, module.training) for module in model.modules()]
    device = next((parameter.device.type for parameter in model.parameters()), "cpu")
    with ExitStack() as stack:
        model.eval()
        for module, mode in modes:
            stack.callback(setattr, module, "training", mode)
        stack.enter_context(padded(next(iter(model.children()))))
        stack.enter_context(torch.autocast(device, enabled=False))
        for module in model.modules():
            if any(_half(value) for value in module._parameters.values()):
                _widen(module, stack)
        yield


def _half(value: Tensor | None) -> bool:
    return value is not None and value.dtype in (torch.float16, torch.bfloat16)


def _widen(module: nn.Module, stack: ExitStack) -> None:
    """Let a module compute with float32 copies of its own parameters, which are there only while it runs."""
    kept: list[dict[str, nn.Parameter | None]] = []

    def enter(module: nn.Module, inputs: Any) -> None:
        kept.append(dict(module._parameters))
        for name, value in kept[-1].items():
            if value is not None and _half(value):
                module._parameters[name] = nn.Parameter(value.detach().float(), requires_grad=False)

    def leave(module: nn.Module, inputs: Any, output: Any) -> None:
        module._parameters.update(kept.pop())

    stack.callback(lambda: module._parameters.update(kept[0]) if kept else None)
    stack.callback(module.register_forward_pre_hook(enter, prepend=True).remove)
    stack.callback(module.register_forward_hook(leave, always_call=True).remove)
