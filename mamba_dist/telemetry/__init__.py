"""What a run tells: log lines, metrics, progress; never changes training state."""
