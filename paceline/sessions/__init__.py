"""Sessions: what was said, who holds its KV, where its next turn goes. Imports neither Ray nor gRPC."""
