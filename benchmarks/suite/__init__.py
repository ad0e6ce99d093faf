"""Many measurements in one command: jobs on the devices of a machine, within a time limit."""
