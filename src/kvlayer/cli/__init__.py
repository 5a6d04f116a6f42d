"""The ``kvlayer`` program. Its commands are plugins, the built-in ones too."""
