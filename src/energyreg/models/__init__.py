"""Networks, a base and a target space as one model, and what it answers."""
