"""The step loop: scheduler, KV cache, runner, attention, sampling, drafter. No Ray, no gRPC."""
