"""How a step is executed, one file a backend. Each is a plugin like any stranger's."""
