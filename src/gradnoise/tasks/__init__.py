"""Samplers with their exact oracles."""
