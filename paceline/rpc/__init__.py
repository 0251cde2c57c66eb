"""gRPC: conversions, the draft server and client, the public service. No Ray."""
