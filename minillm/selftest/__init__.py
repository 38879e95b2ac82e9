"""The library's promises, proved on a user's own machine: ``minillm selftest``."""
