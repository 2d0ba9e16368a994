"""What moved between two folders of results beyond noise; see `bench/compare.py` and --help."""

from bench.compare import main

if __name__ == "__main__":
    main()
