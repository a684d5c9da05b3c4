"""Two models of different families alive in one process: one by a plugin with patches, one by a built-in family.

Usage: beside.py STRANGER BUILT_IN: two models' folders. The last line is JSON.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import torch

TEXTS = ["a short text", "one that is quite a bit longer than all of the others", "third", "and the last one"]


def embed(model: Any) -> torch.Tensor:
    """(N, width) embeddings with a gradient."""
    found: torch.Tensor = model(model.preprocess(TEXTS))["sentence_embedding"]
    return found


def step(model: Any) -> float:
    """One step of plain gradient descent on its adapter; returns how far the embeddings moved."""
    before = embed(model)
    torch.autograd.backward((before * torch.arange(before.shape[1])).sum())
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter -= 1e-2 * parameter.grad
        return float((embed(model) - before).abs().max())


def owners(model: Any) -> list[str]:
    """The modules that the classes of a model's parts come from, without the libraries'."""
    libraries = {"torch", "transformers", "sentence_transformers", "peft"}
    modules = {type(module).__module__ for module in model.modules()}
    return sorted(module for module in modules if module.partition(".")[0] not in libraries)


def main(stranger: str, built_in: str) -> dict[str, Any]:
    """Load both, train the one and then the other, and take the patches back."""
    from sentence_transformers import SentenceTransformer

    from burnish import FastSentenceTransformer

    torch.set_num_threads(1)
    models: dict[str, Any] = {}
    for name, folder in (("stranger", stranger), ("built in", built_in)):
        models[name] = FastSentenceTransformer.from_pretrained(folder, device="cpu")
        FastSentenceTransformer.get_peft_model(models[name], r=4)
    theirs: Any = SentenceTransformer(stranger, device="cpu")
    pooled = torch.nn.functional.normalize(torch.from_numpy(theirs.encode(TEXTS)), dim=1)
    report: dict[str, Any] = {
        "families": {name: model.burnish.decision.family.family.name for name, model in models.items()},
        "plugins": {name: model.burnish.decision.family.plugin.id for name, model in models.items()},
        "patches": {name: model.burnish.plan.rows() for name, model in models.items()},
        "owners": {name: owners(model) for name, model in models.items()},
        "apart from stock": float((embed(models["stranger"]).detach() - pooled).abs().max()),
        "moved": {},
        "other moved": {},
    }
    for name, other in (("stranger", "built in"), ("built in", "stranger")):
        still = embed(models[other]).detach()
        report["moved"][name] = step(models[name])
        report["other moved"][name] = float((embed(models[other]).detach() - still).abs().max())
    trained = embed(models["built in"]).detach()
    models["stranger"].undo_patches()
    report["owners after undoing"] = {name: owners(model) for name, model in models.items()}
    report["undoing moved the other"] = float((embed(models["built in"]).detach() - trained).abs().max())
    return report


if __name__ == "__main__":
    print(json.dumps(main(*sys.argv[1:])))
