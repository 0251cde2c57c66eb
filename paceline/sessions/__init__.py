"""Sessions: who holds what, and where a request goes. Imports neither Ray nor gRPC."""
