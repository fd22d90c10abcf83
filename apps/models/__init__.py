"""Weights that ship with the package: see README.md, the model card."""
