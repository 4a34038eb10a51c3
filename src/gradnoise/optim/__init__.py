"""Optimizers whose noise has a chosen covariance, and the sketches that they learn it with."""
