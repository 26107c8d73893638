"""Replay: the log folded again, into another Redis to compare with the live one, or into its own Redis after a rebuild."""
