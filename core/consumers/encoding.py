"""What scripts of runtimes without torch share; it lies beside them, where Python looks first."""

import json
import os

import tokenizers


def batches(tokenizer, inputs, size=8):
    """Encodings in batches, each padded to its longest, as a server does it."""
    for start in range(0, len(inputs), size):
        yield tokenizer.encode_batch(
            [tuple(one) if isinstance(one, list) else one for one in inputs[start : start + size]]
        )


def load_tokenizer(folder, longest):
    """The folder's tokenizer, cutting at `longest` tokens and padding at the right."""
    tokenizer = tokenizers.Tokenizer.from_file(os.path.join(folder, "tokenizer.json"))
    with open(os.path.join(folder, "special_tokens_map.json"), encoding="utf-8") as file:
        pad = json.load(file).get("pad_token", "")
    pad = pad["content"] if isinstance(pad, dict) else pad
    # What a tokenizer.json was saved with may be a shorter limit than the model's.
    tokenizer.no_truncation()
    if longest is not None:
        tokenizer.enable_truncation(longest)
    tokenizer.enable_padding(pad_id=tokenizer.token_to_id(pad) or 0, pad_token=pad)
    return tokenizer
