"""Folding recorded events once more: into another Redis to compare with the live one, or into an emptied one."""
