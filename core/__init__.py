"""The trainer and the contract. Core knows no architecture by name: families and backends come through the registry."""
