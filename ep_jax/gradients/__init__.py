"""Gradient estimators: one module each, one signature for all."""
