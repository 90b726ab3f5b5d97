"""One HTML page that says what a run changed, and by how much."""
