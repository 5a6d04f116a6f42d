"""The storage backends shipped with kvlayer, registered like anybody else's: by entry point."""
