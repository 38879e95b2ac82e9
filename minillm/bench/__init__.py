"""What the parts cost, each beside its slow obvious twin, measured in turns in one process (``minillm bench``)."""
