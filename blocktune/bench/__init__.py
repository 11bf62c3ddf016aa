"""Speed on this machine, and the best that the machine can do."""
