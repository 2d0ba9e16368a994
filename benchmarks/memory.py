"""Memory and step time of GPT-2 Medium's shape against the usual stack; see `lowmem/run.py` and --help."""

from lowmem.run import main

if __name__ == "__main__":
    main()
