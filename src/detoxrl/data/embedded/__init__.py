"""The embedded corpus: generated quarrels, their facts and phrases."""
