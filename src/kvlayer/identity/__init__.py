"""What names KV: tokens, links, chains, keys, namespaces and weights."""
