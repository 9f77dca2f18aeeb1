"""Real containers for the tests; see images.py."""
