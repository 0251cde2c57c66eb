"""Replays arrivals against a policy and a performance model: numpy, no Ray, no clock."""
