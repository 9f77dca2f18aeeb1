"""Models: where they come from, how they are loaded, and how a change is added to their weights."""
