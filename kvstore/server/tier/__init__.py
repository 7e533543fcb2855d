"""The remote tier as the daemon uses it. Begin with `remote_path.py`; the objects themselves are `kvstore.remote`."""
