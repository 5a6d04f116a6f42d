"""What a cache is to be: a configuration, where it is read from, and plugins by name."""
