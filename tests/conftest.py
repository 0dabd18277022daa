"""The whole suite sees eight CPU devices, and torch keeps to one thread (the machine is shared by parallel tests)."""

import os

os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
os.environ.setdefault("OMP_NUM_THREADS", "1")  # torch, whose threads otherwise fight with XLA's
