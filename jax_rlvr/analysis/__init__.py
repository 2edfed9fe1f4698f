"""What the two papers measure, of batches and of the logs of runs.

Pure functions on the host, in NumPy and float64: `entropy_law`, `covariance`,
`forking`.
"""
