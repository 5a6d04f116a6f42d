"""The interfaces plugins implement."""
