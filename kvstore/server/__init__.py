"""The daemon. STORE is the room `storing`, FETCH is `fetching`, and `handlers.py` is the RPC edge of both.

`calls` decides who may call and how much at once, `policy` what is written and how small, `tier` asks the remote tier,
`admin` is for people. `daemon.py` makes all of it and ends it; `threads.py` has every thread.
"""
