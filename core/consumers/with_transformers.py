"""transformers alone: the model as AutoModel reads it, pooled by hand as `deploy.json` says."""

import sys

import torch
import transformers
from exchange import answer, asked
from transformers import AutoModel, AutoModelForSequenceClassification, AutoTokenizer


def pooled(states, mask, mode):
    """(N, hidden) vectors of (N, tokens, hidden) states by one of Sentence Transformers' modes."""
    wide = mask[..., None].to(states.dtype)
    if mode == "cls":
        first = mask.argmax(1)
        return states[torch.arange(len(states)), first]
    if mode == "lasttoken":
        last = mask.shape[1] - 1 - mask.flip(1).argmax(1)
        return states[torch.arange(len(states)), last]
    if mode == "max":
        return states.masked_fill(wide == 0, -1e9).max(1).values
    if mode == "weightedmean":
        wide = wide * torch.arange(1, states.shape[1] + 1, dtype=states.dtype)[None, :, None]
    total = (states * wide).sum(1)
    count = wide.sum(1).clamp(min=1e-9)
    return total / (count.sqrt() if mode == "mean_sqrt_len_tokens" else count)


def main() -> None:
    """Answer the request in the file that is named first, in the file named second."""
    request = asked()
    deploy, folder = request["deploy"], request["folder"]
    scores = request["kind"] == "scores"
    if scores and deploy["modules"] != ["Transformer"]:
        sys.exit(f"its scores come from {', '.join(deploy['modules'][1:])}, which transformers alone does not compute")
    if deploy["dense"]:
        sys.exit("the model has Dense layers after its pooling, which transformers alone does not compute")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    # An adapter's folder has no config of its own to say how many labels there are.
    labels = {"num_labels": len(deploy["labels"])} if scores and deploy["adapter_of"] else {}
    model = (AutoModelForSequenceClassification if scores else AutoModel).from_pretrained(folder, **labels)
    model = model.float().eval()
    outputs, ids = [], []
    for text in request["inputs"] if scores else request["texts"]:
        # As lists: given one by one, an empty second text counts as none.
        given = [[part] for part in text] if isinstance(text, list) else [[text]]
        batch = tokenizer(*given, truncation=True, max_length=deploy["max_seq_length"], return_tensors="pt")
        with torch.no_grad():
            found = model(**batch)
        if scores:
            vector = found.logits
        else:
            modes = deploy["pooling"] if isinstance(deploy["pooling"], list) else [deploy["pooling"]]
            vector = torch.cat([pooled(found.last_hidden_state, batch["attention_mask"], mode) for mode in modes], 1)
            vector = torch.nn.functional.normalize(vector) if deploy["normalize"] else vector
        outputs.append(vector[0].tolist())
        ids.append(batch["input_ids"][0].tolist())
    answer([transformers, torch], outputs, ids)


if __name__ == "__main__":
    main()
