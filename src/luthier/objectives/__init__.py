"""One file, one objective: pure maths over log-probabilities of scored tokens. The file's name is its recipe name."""
