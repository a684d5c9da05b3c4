"""Unpadded input on a Sentence Transformers model: no padding token is computed in a transformer layer.

Sentence Transformers can already flatten a batch of texts into one row where FlashAttention is installed. Here the same
path is opened for any device, with attention from the registry, for families that say it is exact. Two transformers
registries get one new name each (`burnish_packed_…`); nothing of theirs is replaced, and only this model's config names
it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import sentence_transformers
import torch
from packaging.version import Version
from torch import Tensor, nn
from transformers import AttentionInterface, DataCollatorWithFlattening
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from .contracts import Packing
from .errors import PluginError

if TYPE_CHECKING:
    from sentence_transformers.base.modules import Transformer

# What a packed batch carries beside the token ids; the model hands these to its attention modules.
PACKED_KEYS = frozenset({"cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx", "position_ids"})

# Sentence Transformers before 6.2 pools packed texts without their prompt otherwise than padded ones: the first token
# is the prompt's, and a text cut shorter than the prompt shortens it for the whole batch.
POOLS_PACKED_PROMPTS = Version(sentence_transformers.__version__) >= Version("6.2")

# Before 6.2 it also adds up packed tokens in the dtype they have: in bfloat16 the mean of a text of 128 tokens is off
# by four times what padded input gives (H100, BERT of 768; 0.86 against 0.23 in the norm of the error).
POOLS_PACKED_HALVES = POOLS_PACKED_PROMPTS

# Losses of Sentence Transformers that read a batch of token ids as rows of texts, or hand it to a model that would.
PADDED_LOSSES = {
    "GISTEmbedLoss": "it hands the tokens to its guide model",
    "CachedGISTEmbedLoss": "it hands the tokens to its guide model",
    "ContrastiveTensionLoss": "it compares the texts' token ids row by row",
    "ContrastiveTensionLossInBatchNegatives": "it compares the texts' token ids row by row",
    "DenoisingAutoEncoderLoss": "it feeds the token ids to a decoder",
}


def needs_padding(loss: nn.Module) -> str | None:
    """Why `loss`, or a loss inside it, must be given padded input; None if it takes packed input."""
    for module in loss.modules():
        for kind in type(module).__mro__:
            if kind.__name__ in PADDED_LOSSES:
                return f"{kind.__name__}: {PADDED_LOSSES[kind.__name__]}"
    return None


def _attention(operation: Callable[..., Tensor], owner: str) -> Callable[..., tuple[Tensor, Tensor | None]]:
    """An attention function for transformers: packed where the batch is, transformers' own where it is padded."""

    def forward(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        dropout: float = 0.0,
        scaling: float | None = None,
        sliding_window: int | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        bounds = kwargs.get("cu_seq_lens_q")
        causal = bool(kwargs.get("is_causal", getattr(module, "is_causal", False)))
        if bounds is None:
            if attention_mask is None and sliding_window is not None:
                attention_mask = _window_mask(query.shape[2], sliding_window, causal, query.device)
            return sdpa_attention_forward(
                module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
            )
        # (1, heads, tokens, size) to (tokens, heads, size) and back to (1, tokens, heads, size)
        packed = [states[0].transpose(0, 1) for states in (query, key, value)]
        settings: dict[str, Any] = {"scale": scaling, "dropout": dropout, "causal": causal, "window": sliding_window}
        if (bias := kwargs.get("relative_bias")) is not None:
            settings["bias"] = bias
        out = operation(*packed, bounds, int(kwargs["max_length_q"]), **settings)
        # The model's next view would make sense of anything with as many numbers, and train on.
        if getattr(out, "shape", None) != packed[0].shape:
            found = f"the shape {tuple(out.shape)}" if isinstance(out, Tensor) else f"a {type(out).__name__}"
            what = f"packed_attention returned {found}, not {tuple(packed[0].shape)}"
            raise PluginError(what, where=owner, fix="Mend or disable it")
        return out[None], None

    return forward


def _window_mask(length: int, window: int, causal: bool, device: torch.device) -> Tensor:
    place = torch.arange(length, device=device)
    distance = place[:, None] - place
    mask = distance.abs() < window
    return (mask & (distance >= 0) if causal else mask)[None, None]


def _mask(*args: Any, attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor | None:
    """No mask for a packed (or full) batch, transformers' own for a padded one. Without this function registered,
    transformers would hand no mask at all to an attention it does not know, and padding would be attended to."""
    return None if attention_mask is None else sdpa_mask(*args, **{**kwargs, "attention_mask": attention_mask})


# What each of our names stands for in transformers' two registries.
_known: dict[str, Callable[..., Tensor]] = {}


def register_attention(name: str, operation: Callable[..., Tensor], owner: str = "packed attention") -> str:
    """Make `operation` known to transformers, once; returns the attention name to load or set.

    Args:
        name: The implementation's name.
        operation: `packed_attention`, or what takes its place.
        owner: How an error names whose it is.
    """
    # "flash" in the name would make Sentence Transformers look for the flash-attn package.
    full = f"burnish_packed_{name}".replace("flash", "fa")
    if _known.get(full) is not operation:
        AttentionInterface.register(full, _attention(operation, owner))
        AttentionMaskInterface.register(full, _mask)
        _known[full] = operation
    return full


def name_attention(model: Any, name: str) -> None:
    """Have the model's config name an attention, from which its modules look it up.

    transformers refuses that, with a line in the log, for architectures whose own modules do not look; a family that
    has patched them to (`Packing.attention` "patch") needs the name all the same.
    """
    if model._can_set_attn_implementation():
        model.set_attn_implementation(name)
    else:
        model.config._attn_implementation_internal = name


def pool_packed(module: Any) -> None:
    """Have a Pooling module add up packed tokens in float32, in the same order each time, without asking the device.

    Sentence Transformers' own mean waits for the device to count the tokens, adds them up in whatever order its threads
    come, and before 6.2 in the tokens' own dtype. A bound method and, for the modes it leaves, two hooks: saved
    nowhere, and not met by padded input.
    """
    module._forward_flattened = partial(_pool, module)
    if not POOLS_PACKED_HALVES:
        module.register_forward_pre_hook(_widen)
        module.register_forward_hook(_narrow)


def _pool(module: Any, tokens: Tensor, features: dict[str, Any], prompt_length: int | None = None) -> list[Tensor]:
    modes = (module.pooling_mode,) if isinstance(module.pooling_mode, str) else tuple(module.pooling_mode)
    if modes != ("mean",) or prompt_length:
        stock: Callable[..., list[Tensor]] = type(module)._forward_flattened
        return stock(module, tokens, features, prompt_length=prompt_length)
    return [packed_mean(tokens[0], features["cu_seq_lens_q"])]


def packed_mean(tokens: Tensor, bounds: Tensor) -> Tensor:
    """The mean token of each text, added up in float32 or better; that of an empty text is zero.

    Args:
        tokens: (T, D).
        bounds: (N + 1,) integer, the first token of each text and T at the end.

    Returns:
        (N, D) in the dtype of `tokens`.
    """
    wide = tokens.float() if tokens.dtype in (torch.float16, torch.bfloat16) else tokens
    lengths = bounds[1:] - bounds[:-1]
    if tokens.is_cuda:  # no atomics; unsafe, since checking the bounds, which are right, waits for the device
        sums = torch.segment_reduce(wide, "sum", offsets=bounds.long(), axis=0, unsafe=True, initial=0)
    else:  # on a CPU, where it adds in order, 2.4 times as fast (128 texts of 105 tokens of 384, with the backward)
        text = torch.repeat_interleave(lengths, output_size=tokens.shape[0])
        sums = wide.new_zeros(len(lengths), tokens.shape[1]).index_add(0, text, wide)
    return (sums / lengths.clamp(min=1)[:, None]).to(tokens.dtype)


def _widen(module: nn.Module, arguments: tuple[dict[str, Any], ...]) -> None:
    features = arguments[0]
    tokens = features["token_embeddings"]
    if "cu_seq_lens_q" in features and tokens.dtype in (torch.float16, torch.bfloat16):
        features["token_embeddings"], features["narrow_tokens"] = tokens.float(), tokens


def _narrow(module: nn.Module, arguments: tuple[Any, ...], features: dict[str, Any]) -> None:
    tokens = features.pop("narrow_tokens", None)
    if tokens is not None:
        features["token_embeddings"] = tokens
        features["sentence_embedding"] = features["sentence_embedding"].to(tokens.dtype)


@contextmanager
def padded(module: Any) -> Iterator[None]:
    """Let the first module of a model pad its batches for the length of a block, if it packs them."""
    packs = getattr(module, "can_flatten_inputs", False)
    if packs:
        module.can_flatten_inputs = False
    try:
        yield
    finally:
        if packs:
            module.can_flatten_inputs = True


@dataclass(slots=True)
class PackedInput:
    """Packing switched on for one `Transformer` module; `undo` puts everything back."""

    module: Transformer
    attention_before: str
    forward_params_before: set[str] | None

    def undo(self) -> None:
        """Go back to padded input and the attention the model came with."""
        name_attention(self.module.model, self.attention_before)
        self.module.model_forward_params = self.forward_params_before
        self.module.unpad_inputs = self.module.unpad_inputs  # its setter works the rest out again


@dataclass(frozen=True, slots=True)
class Flattening:
    """Texts and pairs in one row, as transformers' `DataCollatorWithFlattening` lays them out, with their token types.

    Args:
        filler: The token that stands for a text without any, as one of padding tokens alone does in padded input. None
            leaves it empty.
    """

    filler: int | None

    def __call__(self, texts: Sequence[Mapping[str, Sequence[int]]]) -> dict[str, Any]:
        """Tokens of each text to `input_ids`, `position_ids` and, where there are any, `token_type_ids` (1, T) int64;
        `cu_seq_lens_q` and `_k` (N + 1,) int32; `max_length_q` and `_k`."""
        filled = {} if self.filler is None else {"input_ids": [self.filler], "token_type_ids": [0]}
        rows = [text if text["input_ids"] else {**text, **filled} for text in texts]
        lengths = [len(row["input_ids"]) for row in rows]
        bounds = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
        kinds = ["input_ids", *(["token_type_ids"] if "token_type_ids" in texts[0] else [])]
        batch: dict[str, Any] = {
            kind: torch.tensor([token for row in rows for token in row[kind]], dtype=torch.int64)[None]
            for kind in kinds
        }
        batch["position_ids"] = torch.cat([torch.arange(length) for length in lengths])[None]
        longest = max(lengths)
        return batch | {
            "cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds, "max_length_q": longest, "max_length_k": longest
        }  # fmt: skip


def pack_inputs(module: Transformer, packing: Packing, attention: str) -> PackedInput:
    """Let `module` flatten every batch of texts.

    Args:
        module: The first module of a SentenceTransformer; texts that it preprocesses come out as (1, T) token ids with
            `cu_seq_lens_q` (N + 1,) int32 and `position_ids` (1, T) that start at the family's offset in each text.
        packing: What the family says about packed input.
        attention: A name from `register_attention`.
    """
    before = PackedInput(module, module.config._attn_implementation, module.model_forward_params)
    name_attention(module.model, attention)
    if module.model_forward_params is not None:
        module.model_forward_params = module.model_forward_params | PACKED_KEYS
    flattening: dict[str, bool] = {
        "return_seq_idx": False,
        "return_flash_attn_kwargs": True,
        "return_position_ids": True,
    }
    module.data_collator = DataCollatorWithFlattening(**flattening)  # type: ignore[no-untyped-call]
    module._flatten_position_offset = packing.position_offset
    module.can_flatten_inputs = True
    return before
