"""What can be found wrong with a run before it starts: ``minillm doctor``.

``examine`` makes all checks; those that cost next to nothing are also made by every run (``at_start``). The figures of
memory are not among them.
"""
