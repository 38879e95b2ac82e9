"""Planning before launch: what a run takes of each GPU and of the host, what it moves, how long a step is.

Everything here is computed from sizes; nothing is downloaded and no weight is made. ``minillm bench plan`` holds it
against what a real step takes.
"""
