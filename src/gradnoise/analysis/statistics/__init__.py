"""Statistics for few seeds: frames and column names in, frozen results out. No plan is known here."""
