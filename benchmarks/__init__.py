"""Speed and endurance: rollouts, a training step, indexing at size, runs that are killed."""
