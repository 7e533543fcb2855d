"""Faults from outside: kills, power cuts, disks that fail, damage. At length: `python -m tests.faults`."""
