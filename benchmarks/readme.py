"""Paste the benchmark's tables and figures into README.md; see `bench/readme.py` and --help."""

from bench.readme import main

if __name__ == "__main__":
    main()
