"""The node agent: keeps every process of a slice inside it."""
