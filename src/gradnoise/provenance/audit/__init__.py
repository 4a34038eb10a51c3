"""The audit: checks A01 to A30 of a study. Each looks for itself and trusts nothing that it checks."""
