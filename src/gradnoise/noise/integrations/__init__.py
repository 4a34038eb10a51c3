"""The meter in other people's training loops; each module needs its library, and nothing else does."""
