"""How close a result must be: the bounds live with the ops, because `dsv4 selftest` judges by them too."""

from ffi_kernels.compare import BOUNDS, Bounds, assert_bits, assert_close, bits

__all__ = ["BOUNDS", "Bounds", "assert_bits", "assert_close", "bits"]
