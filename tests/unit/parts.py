"""Something shaped like a model, for tests of what is whole on the disk and what is not."""

from __future__ import annotations

from pathlib import Path

from burnish.core.files import atomic_folder

PARTS = ("model.safetensors", "tokenizer.json", "1_Pooling/config.json", "modules.json", "config.json")


def save(target: Path, version: str, parts: tuple[str, ...] = PARTS) -> None:
    """Save something shaped like a model, every file of which says its version."""
    with atomic_folder(target) as staging:
        for part in parts:
            (staging / part).parent.mkdir(exist_ok=True)
            (staging / part).write_text(version)


def read(target: Path, parts: tuple[str, ...] = PARTS) -> set[str | None]:
    """The versions in a folder that a reader would take for a model; empty where there is no model to read."""
    if not any((target / marker).exists() for marker in ("config.json", "adapter_config.json")):
        return set()
    return {(target / part).read_text() if (target / part).exists() else None for part in parts}


def litter(folder: Path) -> list[str]:
    """The names of what a save has not cleaned up."""
    return [entry.name for entry in folder.rglob(".burnish-*")]
