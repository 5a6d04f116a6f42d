"""How work leaves a loop and comes back: threads, offloading, other people's code."""
