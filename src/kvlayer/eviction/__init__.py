"""Eviction: the policies that come with kvlayer, and the order a tier keeps by one of them."""
