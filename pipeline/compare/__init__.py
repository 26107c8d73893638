"""Comparison of a replayed database with the live one."""
