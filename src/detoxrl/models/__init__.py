"""The text generator: a backbone, its adapters, a value head, and decoding."""
