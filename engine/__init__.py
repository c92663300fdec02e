"""What makes it fast, large and safe: samplers, shared prompts, packing, checkpoints, cost."""
