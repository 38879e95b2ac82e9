"""The long campaigns of faults, ``scripts/soak.sh`` and ``scripts/faults.sh``: whole runs that are killed, stopped and
damaged, and what they end as."""
