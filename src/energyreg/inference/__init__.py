"""From an energy f(x, ·) to answers: nodes, weights, chains, modes. No network."""
