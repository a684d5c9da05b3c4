"""`burnish plugins new`: a complete distribution for a family, whose facts were found by trying them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import TYPE_CHECKING

from .contracts import FamilySpec
from .discovery import OWN, Plugin
from .errors import ConfigError
from .files import atomic_folder
from .registry import Registry, blame, registry
from .scaffold_text import Encoder, family_words, found, plugin_words

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from .fitting import Sizes

_LONGEST = 30  # of a name, so that no line that holds two grows too long
# Where each template goes; `modeling` only where transformers does not know the encoder.
_PLACES = {
    "pyproject.toml": "pyproject.toml",
    "family.py": "{module}.py",
    "modeling.py": "modeling_{stem}.py",
    "conftest.py": "tests/conftest.py",
    "test.py": "tests/test_{stem}.py",
    "README.md": "README.md",
    "ci.yml": ".github/workflows/ci.yml",
    "gitignore": ".gitignore",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Scaffold:
    """A distribution before it is written.

    Args:
        folder: The name of its folder, which is the distribution's.
        files: Path inside the folder to text.
        found: (what, value) of what was tried on the architecture, for the author to read.
    """

    folder: str
    files: Mapping[str, str]
    found: tuple[tuple[str, str], ...]

    def write(self, parent: Path) -> list[Path]:
        """Write it into a folder of its own below `parent`, whole or not at all; returns the files.

        Raises:
            ConfigError: If that folder is there and not empty, or cannot be written.
        """
        target = free_folder(parent, self.folder)
        with atomic_folder(target) as staging:
            for name, text in self.files.items():
                path = staging / name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(text, encoding="utf-8")
        return [target / name for name in self.files]


def new_plugin(name: str, like: str, folder: Path, model_type: str | None = None) -> list[Path]:
    """Write a complete plugin distribution for one model family; returns its files.

    Args:
        name: What the plugin is called; the distribution is `burnish-NAME`.
        like: The family to start from.
        folder: Where the distribution's folder is made.
        model_type: `config.model_type` of the models it takes; None means `name`.

    Raises:
        ConfigError: If a name will not do, there is no such family, or the folder is taken.
        ModelError: If transformers has the type and no tiny model of it reads token ids.
    """
    check_name(name)
    free_folder(folder, f"burnish-{name}")
    return plan_plugin(name, like, model_type).write(folder)


def free_folder(parent: Path, name: str) -> Path:
    """The folder `name` below `parent`, which is not there or empty.

    Raises:
        ConfigError: If it is there with something in it.
    """
    target = parent / name
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        fix = "Move it away, or choose another name or --folder"
        raise ConfigError("is there already and not empty", where=str(target), fix=fix)
    return target


def check_name(name: str, where: str = "NAME") -> None:
    """Refuse what cannot be part of a distribution's name, an entry point's and a module's all at once."""
    if name.startswith("burnish-"):
        fix = f"Write {name.removeprefix('burnish-')}"
        raise ConfigError(f"the distribution of {name!r} would be called burnish-{name}", where=where, fix=fix)
    if name == OWN:
        raise ConfigError(f"{OWN!r} is Burnish's own name", where=where, fix="Choose another")
    if not re.fullmatch(r"[A-Za-z]([A-Za-z0-9_-]*[A-Za-z0-9])?", name) or len(name) > _LONGEST:
        fix = f"Use letters, digits, - and _, at most {_LONGEST}, from a letter to a letter or digit"
        raise ConfigError(f"{name!r} is no name for a plugin", where=where, fix=fix)


def plan_plugin(name: str, like: str, model_type: str | None = None) -> Scaffold:
    """Everything that `new_plugin` writes, before it is written; the arguments and errors are the same."""
    check_name(name)
    if model_type is not None:
        check_name(model_type, "--model-type")
    from .fitting import quiet

    plugins = registry()
    plugin, spec = _family(plugins, like)
    with quiet():
        return _plan(name, plugins, plugin, spec, model_type)


def _plan(name: str, plugins: Registry, plugin: Plugin, spec: FamilySpec, model_type: str | None) -> Scaffold:
    from .fitting import fit

    encoder = _encoder(spec, plugin, model_type or name)
    kind = model_type or name if encoder.own else encoder.config.model_type
    tiny = encoder.config(**encoder.sizes["tiny"])
    with blame(plugin, f"family {spec.name}"):
        # What the family says of its own models; one that is for no architecture in particular says it of any.
        sample = tiny if spec.sample is None else spec.sample("tiny")
        family = spec.build(sample)
        pooling = family.default_pooling(sample, frozenset())
    facts = fit(tiny, pooling, family.precision)
    claimants = plugins.claimants("model_type", kind)
    owners = [owner for owner in claimants if not owner.called(f"burnish-{name}")]  # an earlier one of this name is not
    words = plugin_words(name, kind, encoder, owners)
    words |= family_words(family, facts, encoder, words)
    places = {template: place for template, place in _PLACES.items() if encoder.own or template != "modeling.py"}
    written = {place.format_map(words): _filled(template, words) for template, place in places.items()}
    return Scaffold(folder=f"burnish-{name}", files=written, found=tuple(found(kind, encoder, family, facts, owners)))


def _family(plugins: Registry, name: str) -> tuple[Plugin, FamilySpec]:
    """The installed family called `name`. Others are only imported where it is not found under its own name."""
    claimants = {plugin.id: plugin for kind in ("model_type", "fallback") for plugin in plugins.claimants(kind)}
    first = [plugin for plugin in claimants.values() if name in (plugin.name, *plugin.values("model_type"))]
    known: set[str] = set()
    for tier in (first, [plugin for plugin in claimants.values() if plugin not in first]):
        offers = plugins.collect(tier, "burnish_register_families", FamilySpec)
        for plugin, spec in offers:
            if spec.name == name:
                return plugin, spec
        known |= {spec.name for _, spec in offers}
    near = get_close_matches(name, known, 1)
    hint = f"Did you mean {near[0]!r}? " if near else ""
    fix = f"{hint}Known: {', '.join(sorted(known)) or 'none'}"
    raise ConfigError(f"no family is called {name!r}", where="--like", fix=fix)


def _encoder(spec: FamilySpec, plugin: Plugin, model_type: str) -> Encoder:
    """What to make tiny models of: transformers' own classes if it knows the type, else those of the family."""
    from transformers import CONFIG_MAPPING

    from .fitting import sample_sizes

    same = [known for known in CONFIG_MAPPING if known.replace("-", "_") == model_type.replace("-", "_")]
    same = [known for known in same if _of_transformers(CONFIG_MAPPING[known])]
    if same:
        config: type[PretrainedConfig] = CONFIG_MAPPING[model_type if model_type in same else same[0]]
        return Encoder(config=config, own=False, sizes=sample_sizes(config))
    if spec.sample is None:
        what = f"family {spec.name} has no sample config, and transformers no model type {model_type!r}"
        raise ConfigError(what, where="--like", fix="Name a family that is for one architecture")
    sizes = {}
    for size in ("tiny", "base"):
        with blame(plugin, f"the {size} sample of family {spec.name}"):
            sample = spec.sample(size)
            sizes[size] = _arguments(sample)
    if not _of_transformers(type(sample)):
        what = f"family {spec.name} is for an encoder of its plugin's own, and transformers has no type {model_type!r}"
        raise ConfigError(what, where="--like", fix="Name a family whose encoder transformers has")
    return Encoder(config=type(sample), own=True, sizes=sizes)


def _of_transformers(kind: type) -> bool:
    """Whether a class is transformers' own; plugins register theirs in the same tables."""
    return kind.__module__.startswith("transformers.")


def _arguments(config: PretrainedConfig) -> Sizes:
    """The fewest arguments that make this config again: what other arguments imply is left out."""
    kind, whole = type(config), config.to_dict()
    bookkeeping = ("model_type", "architectures", "transformers_version")
    given = {key: value for key, value in config.to_diff_dict().items() if key not in bookkeeping}
    for name in list(given):
        fewer = {key: value for key, value in given.items() if key != name}
        try:
            same = kind(**fewer).to_dict() == whole
        except Exception:  # a config class checks that its arguments go together: this one is needed
            same = False
        given = fewer if same else given
    return given


def _filled(template: str, words: Mapping[str, str]) -> str:
    text = files(__package__).joinpath("scaffold_files", f"{template}.tmpl").read_text(encoding="utf-8")
    return Template(text).substitute(words).rstrip() + "\n"
