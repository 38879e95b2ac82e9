"""``minillm compare``: which of several evaluated models is better, on which prompts, and how sure that is.

``evaluated`` reads the folders and refuses what cannot be compared, ``pairs`` and ``diversity`` are the statistics,
``extremes`` finds the prompts that differ most, ``summary`` puts all of it into one record, ``words`` says it,
``tables`` and ``html`` show it, ``command`` writes it. From Python: ``minillm.compare.command.compare``.
"""
