"""What a server tells about single requests: spans of a distributed trace, and lines of a log."""
