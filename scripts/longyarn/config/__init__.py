"""The configuration: its defaults, its checks, and the phases, cells and variants that follow from it."""
