"""STORE in the daemon. Begin with `store.py`: it plans what a worker sends and turns it into blocks."""
