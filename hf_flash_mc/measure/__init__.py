"""Measuring on the user's own device: benchmark cells and peers, the accuracy suite, the search for tile sizes."""
