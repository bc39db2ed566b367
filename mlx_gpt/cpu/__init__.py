"""What makes the networks quick on a CPU. Only `device.py` looks in here; without it everything works, slowly."""
