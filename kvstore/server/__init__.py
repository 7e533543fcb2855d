"""The daemon. STORE is `store.py`, FETCH is `fetch.py`; `handlers.py` and `admin.py` are the RPC edge."""
