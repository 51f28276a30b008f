"""Measurements and guards: run as modules from the repository's root (`python -m benchmarks.run`)."""
