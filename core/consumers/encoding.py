"""What scripts of runtimes without torch share; it lies beside them, where Python looks first."""

import json
import os

import numpy
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


def graph_answers(request, takes, run):
    """(outputs, token ids) of a request by a graph.

    `takes` names its inputs. `run` gets them as int64 arrays by name and gives a float array, one row for each input.
    """
    tokenizer = load_tokenizer(request["folder"], request["deploy"]["max_seq_length"])
    outputs, ids = [], []
    for rows in batches(tokenizer, request["inputs"] if request["kind"] == "scores" else request["texts"]):
        fed = {
            "input_ids": [row.ids for row in rows],
            "attention_mask": [row.attention_mask for row in rows],
            "token_type_ids": [row.type_ids for row in rows],
        }
        fed = {name: numpy.array(value, dtype=numpy.int64) for name, value in fed.items() if name in takes}
        outputs += run(fed).astype(numpy.float32).tolist()
        ids += [[one for one, seen in zip(row.ids, row.attention_mask) if seen] for row in rows]  # noqa: B905
    return outputs, ids
