"""The command line: options from dataclass fields, no logic of its own."""
