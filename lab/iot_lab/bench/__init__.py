"""`make bench`: measures the pipeline on the running lab.

`measure` runs the real programs on the hosts and writes figures as JSON, `page` makes the tables
and plots of docs/benchmarks.md from them. What runs on the hosts is in tests/bench.
"""
