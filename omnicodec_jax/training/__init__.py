"""Training: one jitted, sharded step and the loop around it."""
