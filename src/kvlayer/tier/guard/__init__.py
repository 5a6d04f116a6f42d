"""What stands between a request and a tier: turns, deadlines, retries, breakers, estimates."""
