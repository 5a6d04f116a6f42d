"""CUDA kernels that copy rows between paged KV memory and staging memory, and how they are called.

One plan is one launch. A caller that has checked its copies (``staging.moves.plan_moves``) cuts
them into pieces, says where each lies in staging memory, uploads the plan's table and launches::

    layers = [Layer((cache.data_ptr(),), at=0), ...]  # where each layer lies, in both memories
    pieces = [Piece(transfer.runs, base=ring), ...]   # one for each payload of one shape
    plan = gather_plan(transfer.strips, layers, pieces)
    ...                                               # copy plan.table to device memory `table`
    kernels.launch(stream, plan, table, blocks=16)

What belongs together in one plan: pieces whose payloads have the same part and number of tokens
(their transfers have equal ``strips`` and ``runs.geometry``), and the same layers of each.
``Piece.base + Layer.at`` is where a layer of a piece begins; within a layer rows lie as in the
payload (``[K|V][head][token][dim]``, or the engine's own blocks), so that a piece whose layers are
spaced like the payload's travels to the host in one copy. A base is any address the device can
reach: a ring in device memory, or pinned host memory that is read in place.

The table is read by the launch, asynchronously, from device memory or from mapped pinned memory; it
must stay untouched until the launch has ended. The kernels read and write nothing but the table,
the rows named in it, and staging memory at those rows. They take no lock and allocate nothing;
``blocks`` bounds how many thread blocks run, hence how many multiprocessors are disturbed.

``plan``     what one launch does: ``gather_plan``, ``scatter_plan``
``rotation`` K re-rotated to other positions on its way: ``rotate_plans``
``int8``     rows as int8 with a scale each: ``quantize_plan``, ``dequantize_plan``
``tables``   the arrays a kernel reads: planes, bases, rows; ``Layer`` and ``Piece``
``build``    from the ``.cu`` files to functions of one device, through CuPy: ``Builder``
``launch``   ``Kernels(Builder(device)).launch(stream, plan, table, blocks=16)``

The sources need no CUDA headers: ``kv.cuh`` declares what they use, and the tests compile the same
files for the CPU.
"""
