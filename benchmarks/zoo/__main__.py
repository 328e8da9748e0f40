"""`python -m benchmarks.zoo`: the coverage suite."""

from benchmarks.zoo.run import main

main()
