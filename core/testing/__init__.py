"""What plugin authors test with: the conformance suite, as pytest classes and as a table."""
