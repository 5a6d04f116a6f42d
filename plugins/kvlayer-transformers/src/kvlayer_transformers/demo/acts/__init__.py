"""The three acts of the demo, one file each."""
