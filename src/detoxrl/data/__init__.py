"""Prompts: the embedded corpus, a user's files, and rows turned into prompts."""
