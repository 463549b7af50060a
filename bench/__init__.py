"""Benchmarks: they print what was measured beside its ceiling and write JSON with the machine it ran on."""
