"""Built-in targets of `burnish export`, each a plugin like anybody's: a module that an entry point names."""
