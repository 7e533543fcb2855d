"""What a daemon knows of its traffic: requests, counters by namespace and session, history, why prompts missed."""
