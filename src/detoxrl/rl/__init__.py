"""Pure tensor maths of reinforcement learning: no models, no loops over steps, no state."""
