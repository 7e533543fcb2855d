"""The Admin service and what only it does. `admin.py` is its RPC edge; each verb runs on threads of its own."""
