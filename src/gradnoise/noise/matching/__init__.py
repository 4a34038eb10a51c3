"""Runs made alike: one follows another's exposure, a fixed total in one phase, the same drift."""
