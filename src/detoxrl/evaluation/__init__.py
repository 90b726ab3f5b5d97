"""Measuring a policy: judges, metrics and statistics."""
