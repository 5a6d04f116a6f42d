"""Copies between an engine's CUDA tensors and host memory, at the speed of the link.

::

    store   engine's blocks --gather kernel--> ring slot --copy engine--> host slab
    load    host slab --copy engine--> ring slot --scatter kernel--> engine's blocks
            host slab --copy engine--> engine's blocks            where runs are long enough

``stager``      the Stager of an engine: which device, pipeline or torch, batches, cancelling
``pipeline``    one device: streams, the order of its work, what waits for what
``ring``        slots of device memory between kernels and copy engines
``programs``    what a batch queues, worked out beforehand: pure arithmetic
``fills``       which layers of which payloads share a slot: pure arithmetic
``runs``        stretches of bytes for a copy engine: joined, cut: pure arithmetic
``copies``      how runs are handed to a copy engine, one by one or in a batch
``tables``      memory for what kernels read, one arena for each batch in flight
``pinned``      the slab's pages, pinned in pieces
``calibration`` thresholds of one kind of device, and where they are kept
``runtime``     the slice of CUDA that is used, by the names CuPy gives it

Importing this package imports neither CuPy nor torch nor numpy.
"""
