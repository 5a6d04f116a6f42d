"""What this machine and installation let kvlayer do: checks behind ``kvlayer doctor``."""
