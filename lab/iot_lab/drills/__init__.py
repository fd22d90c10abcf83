"""Drills: a running lab is broken on purpose while images flow, and the audit is the judge.

What a drill does stands in a file of tests/drills; what can be done to a host stands in faults.py.
"""
