"""Who may call, how much at once, and what an error becomes: checked before a call's message is read."""
