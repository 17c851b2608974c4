"""XLA's flags under which tests compile: most of a test's time is compilation.

Without optimisation, and as one piece of code, it takes least.
"""

QUICKLY = "--xla_backend_optimization_level=0 --xla_cpu_parallel_codegen_split_count=1"
