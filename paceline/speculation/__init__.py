"""The coupling and the sources of candidates. No Ray, no gRPC, no model."""
