"""Host memory: one page-aligned slab and the arithmetic that hands it out."""
