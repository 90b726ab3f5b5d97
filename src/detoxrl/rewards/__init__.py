"""Scores of responses: classifiers, and the rules around them."""
