"""What moves bytes between engine, host memory and lower tiers."""
