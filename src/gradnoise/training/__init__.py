"""One readable loop, its checkpoints, and the branches that are annealed and scored."""
