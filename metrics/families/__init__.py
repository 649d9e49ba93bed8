"""The families of metrics, by what they are about: requests, runs, the process."""
