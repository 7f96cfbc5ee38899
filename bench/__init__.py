"""Speed, measured: whole runs on a real federation beside a calibration of the machine and the floor of its parts (DESIGN 13)."""
