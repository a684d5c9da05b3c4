"""Sentence Transformers, 3.4 and newer: prompts by their names, as `encode_query` takes them."""

import sentence_transformers
import torch
import transformers
from exchange import answer, asked


def main() -> None:
    """Answer the request in the file that is named first, in the file named second."""
    request = asked()
    version = tuple(int(part) for part in transformers.__version__.split(".")[:2])
    options = {"device": "cpu", "model_kwargs": {"dtype" if version >= (4, 56) else "torch_dtype": torch.float32}}
    if request["kind"] == "scores":
        if int(sentence_transformers.__version__.split(".")[0]) < 4:
            options["automodel_args"] = options.pop("model_kwargs")
        if request["deploy"]["adapter_of"]:  # whose folder has no config of its own to say how many labels there are
            options["num_labels"] = len(request["deploy"]["labels"])
        model = sentence_transformers.CrossEncoder(request["folder"], **options)
        pairs = [tuple(pair) if isinstance(pair, list) else pair for pair in request["inputs"]]
        name = "activation_fn" if int(sentence_transformers.__version__.split(".")[0]) >= 4 else "activation_fct"
        outputs = model.predict(pairs, **{name: torch.nn.Identity()})
        ids = None
    else:
        model = sentence_transformers.SentenceTransformer(request["folder"], **options)
        rows = zip(request["inputs"], request["prompts"])  # noqa: B905 (Python 3.9 has no `strict`)
        outputs = [model.encode(text, **({"prompt_name": name} if name else {"prompt": ""})) for text, name in rows]
        tokens = getattr(model, "preprocess", model.tokenize)
        ids = [tokens([text])["input_ids"][0].tolist() for text in request["texts"]]
    rows = [[float(number) for number in (row if getattr(row, "ndim", 0) else [row])] for row in outputs]
    answer([sentence_transformers, transformers, torch], rows, ids)


if __name__ == "__main__":
    main()
