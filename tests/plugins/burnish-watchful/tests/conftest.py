"""The tests run off the network, seeded, quiet and on one thread."""

pytest_plugins = ["burnish.core.testing.plugin"]
