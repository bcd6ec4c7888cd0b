"""What things take: calibration of a machine, measured lanes, counters."""
