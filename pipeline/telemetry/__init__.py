"""What a process tells of itself: metrics, health, traces. Nothing here decides anything."""
