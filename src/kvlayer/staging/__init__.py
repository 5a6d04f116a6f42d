"""Copies between an engine's KV tensors and host payloads. The only package that touches torch.

``address`` and ``slots`` decide what lies where, ``torch_stager`` serves every torch device and is
the oracle for the others. Importing this package, or any module in it, does not import torch.
"""
