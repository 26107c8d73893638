"""The worker process: one Faust app with one agent. Only this package imports Faust."""
