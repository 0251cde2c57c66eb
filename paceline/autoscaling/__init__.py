"""How many replicas there should be: pure functions over a snapshot. No Ray, no clock, no input or output."""
