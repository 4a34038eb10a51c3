"""The audit: checks A01 to A30 of a study, each of which looks for itself and trusts nothing that it checks."""
