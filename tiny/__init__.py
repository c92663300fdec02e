"""The policy a laptop trains: how it is built, and how it is taught to read before RL."""
