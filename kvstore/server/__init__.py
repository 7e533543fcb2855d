"""The daemon. STORE is `store.py`, FETCH is `fetch.py`; `service.py` and `admin.py` are the RPC edge."""
