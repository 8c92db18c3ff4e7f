"""Predicts the cost of a run before it is started: memory, communication, time."""
