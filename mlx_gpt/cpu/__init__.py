"""Makes the networks fast on a CPU. Only `device.py` imports this; without it everything works, but slowly."""
