"""Metrics for monitoring systems."""
