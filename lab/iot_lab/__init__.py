"""The lab: hosts on one machine that run the pipeline as production would, and their tools.

Everything up to `lab setup` runs on the standard library alone.
"""
