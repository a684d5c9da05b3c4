"""YAML as people mean it: `1e-3` is a number, and a key that stands twice is an error. Needs PyYAML."""

from __future__ import annotations

import re
from typing import Any

import yaml

# YAML 1.2's floats. PyYAML follows 1.1, where 1e-3 is text for want of a dot.
_FLOAT = re.compile(r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)|[-+]?(?:\.[0-9]+|[0-9]+\.[0-9]*)")


class Loader(yaml.SafeLoader):
    """A safe loader with these two rules."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """The mapping; a `yaml.constructor.ConstructorError` with its line for a key that stands there twice."""
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    problem = f"the key {key.value!r} stands there twice"
                    raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
                seen.add(key.value)
        return super().construct_mapping(node, deep)


Loader.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(rf"^(?:{_FLOAT.pattern})$"), list("-+0123456789."))
