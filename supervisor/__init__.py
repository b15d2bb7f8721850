"""What ``make serve`` runs: the engine processes and one Triton, watched, restarted and stopped."""
