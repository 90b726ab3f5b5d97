"""Prompts: the embedded corpus, and rows turned into prompts."""
