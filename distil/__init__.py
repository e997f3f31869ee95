"""What makes the method practical: data, networks of others, sampling, scores. The method is in lift_place.py."""

import sys

if sys.argv[:1] == ["-m"]:  # `python -m distil.NAME`: Ctrl-C is answered in one line while torch is loaded, too
    from distil.command import leave_on_signals

    leave_on_signals("distil")
