"""A plugin for a contract that this Burnish does not speak. It must not even be imported."""

raise SystemExit("imported in spite of its contract")
