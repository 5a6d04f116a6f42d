"""What proves a cache or a backend: simulation, faults, invariants. Needs no test framework."""
