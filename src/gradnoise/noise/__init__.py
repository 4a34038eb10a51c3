"""Measuring the noise of the gradient that training really used."""
