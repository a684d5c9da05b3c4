"""OpenVINO and the tokenizers library, without torch: the exported graph pools and normalises by itself."""

import json
import os
import sys

import numpy
import openvino
import tokenizers
from encoding import batches, load_tokenizer


def main() -> None:
    """Answer the request in the file that is named first, in the file named second."""
    with open(sys.argv[1], encoding="utf-8") as file:
        request = json.load(file)
    folder, deploy = request["folder"], request["deploy"]
    core = openvino.Core()
    model = core.read_model(os.path.join(folder, request["variant"] or deploy["runtime_file"]))
    # By itself it computes in bfloat16 where the processor has it.
    compiled = core.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    tokenizer = load_tokenizer(folder, deploy["max_seq_length"])
    takes = {one.get_any_name() for one in compiled.inputs}
    gives = compiled.output("logits" if request["kind"] == "scores" else "sentence_embedding")
    outputs, ids = [], []
    for rows in batches(tokenizer, request["inputs"] if request["kind"] == "scores" else request["texts"]):
        fed = {
            "input_ids": [row.ids for row in rows],
            "attention_mask": [row.attention_mask for row in rows],
            "token_type_ids": [row.type_ids for row in rows],
        }
        fed = {name: numpy.array(value, dtype=numpy.int64) for name, value in fed.items() if name in takes}
        outputs += compiled(fed)[gives].astype(numpy.float32).tolist()
        ids += [[one for one, seen in zip(row.ids, row.attention_mask) if seen] for row in rows]  # noqa: B905
    answer = {
        "versions": {one.__name__: one.__version__ for one in (openvino, tokenizers)},
        "outputs": outputs,
        "token_ids": ids,
    }
    with open(sys.argv[2], "w", encoding="utf-8") as file:
        json.dump(answer, file)


if __name__ == "__main__":
    main()
