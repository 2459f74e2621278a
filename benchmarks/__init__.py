"""One script a question; `make bench` asks them all. Results stand in `benchmarks/results/`."""
