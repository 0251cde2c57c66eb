"""What outlives a request: so far the streaming window, by which a sequence goes on for ever in constant memory."""
