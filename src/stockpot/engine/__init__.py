"""Runs a plan: blocks, statistics, arithmetic, journal, publishing, verifying."""
