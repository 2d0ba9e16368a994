"""`python cli.py ...` is the console script `xfactor ...`."""

from xfactor_peft.cli import main

if __name__ == "__main__":
    main()
