"""Several ways to train, several training seeds, one evaluation: ``minillm study`` and the cells that it leaves."""
