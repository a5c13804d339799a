"""Speed, memory and exactness of gemb against its peers, measured on the machine at hand.

Not part of the installed package. `python -m benchmarks` runs the quick set; every module with a
command line runs alone, as `python -m benchmarks.encode --help` shows. README.md says how to read
the results.
"""
