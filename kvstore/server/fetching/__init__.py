"""FETCH in the daemon. Begin with `fetch.py`: it plans from the index and leases; `stream_out.py` sends."""
