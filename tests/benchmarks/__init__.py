"""What the project costs beside the leanest script and the stock Prefect flow: `python -m tests.benchmarks`.

Every contestant does the same work, in a fresh process, against the sandbox, its S3 server and a Prefect server.
Needs Linux, whose /proc has the processes' CPU time and memory. Nothing is asserted: read the tables.
"""
