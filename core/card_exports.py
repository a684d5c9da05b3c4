"""The card of an exported folder: the source's own, and what each file in the folder was measured to be."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from . import deploy
from .model_card import with_section


def complete_export(source: Path, folder: Path) -> None:
    """Give an exported folder the source's card, with the quality of what was exported.

    Nothing is done where the exporter measured nothing, or where neither folder has a card.
    """
    described = deploy.read(folder) if (folder / deploy.FILE).exists() else {}
    card = next((path for path in (source / "README.md", folder / "README.md") if path.is_file()), None)
    if not described.get("quality") or card is None:
        return
    # What an adapter's card says of serving is how to merge it, which was done here.
    merged = (source / "adapter_config.json").exists()
    text = with_section(card.read_text(encoding="utf-8"), "serving" if merged else "exports", section(described))
    (folder / "README.md").write_text(text, encoding="utf-8")


def section(described: Mapping[str, Any]) -> str:
    """The section in Markdown, from what `deploy.json` says."""
    scores = described["kind"] == "scores"
    measure = "Largest difference of a logit" if scores else "Smallest cosine"
    lines = [
        "## What was exported",
        "",
        f"Files for {described['runtime']}. Each was run on the inputs of `golden.json` and compared with the model in "
        "float32 as Sentence Transformers computes it; "
        f"`burnish verify FOLDER --variant {described['quality'][0]['file']}` does it again.",
        "",
        f"| File | Weights | MB | {measure} | {'Pairs' if scores else 'Neighbours'} in the same order |",
        "| --- | --- | ---: | ---: | ---: |",
    ]
    for row in described["quality"]:
        far = f"{row['largest_difference']:.1e}" if scores else f"{row['cosine_min']:.6f}"
        cells = [f"`{row['file']}`", row["precision"], f"{row['bytes'] / 1e6:.1f}", far, f"{row['same_order']:.1%}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)
