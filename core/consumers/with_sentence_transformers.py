"""Sentence Transformers, 3.4 and newer: prompts by their names, as `encode_query` takes them."""

import sentence_transformers
import torch
import transformers
from exchange import answer, asked

MAJOR, MINOR = (int(part) for part in sentence_transformers.__version__.split(".")[:2])


def cross_encoder(request, options):
    """The folder's CrossEncoder. What an adapter says of its labels is read from 6.0 on, and told to those before."""
    folder, base = request["folder"], request["deploy"]["adapter_of"]
    if MAJOR < 4:
        options["automodel_args"] = options.pop("model_kwargs")
    if base is None or MAJOR >= 6:
        return sentence_transformers.CrossEncoder(folder, **options)
    labels = len(request["deploy"]["labels"])
    if (MAJOR, MINOR) >= (5, 4):
        options["model_kwargs"]["num_labels"] = labels
        return sentence_transformers.CrossEncoder(folder, **options)
    from peft import PeftModel

    model = sentence_transformers.CrossEncoder(base, num_labels=labels, **options)
    model.model = PeftModel.from_pretrained(model.model, folder).eval()
    model.tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    return model


def main() -> None:
    """Answer the request in the file that is named first, in the file named second."""
    request = asked()
    version = tuple(int(part) for part in transformers.__version__.split(".")[:2])
    options = {"device": "cpu", "model_kwargs": {"dtype" if version >= (4, 56) else "torch_dtype": torch.float32}}
    if request["kind"] == "scores":
        model = cross_encoder(request, options)
        pairs = [tuple(pair) if isinstance(pair, list) else pair for pair in request["inputs"]]
        name = "activation_fn" if MAJOR >= 4 else "activation_fct"
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
