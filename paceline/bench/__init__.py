"""Measuring the engine: against its own floor, and against peers in the same run on the same weights."""
