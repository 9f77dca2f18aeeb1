"""Paths and command lines for the rules."""
