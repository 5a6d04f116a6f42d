"""Figures beside their physical ceilings, taken in the same run: what ``kvlayer bench`` prints."""
