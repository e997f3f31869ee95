"""One thread for all tests and the processes that they start: networks so small would only wait for a second one."""

import os

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported
