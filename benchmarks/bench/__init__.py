"""The benchmarks' framework.

process, session           jobs, each in a fresh process, one after another
store                      records: one JSON file a job, with where it comes from
tables, stats              from figures to Markdown
training                   full fine-tuning against LoRA (run.sh)
memory, rate               the usual stack against this one (memory.py); the price of a rate (rate.py)
tiny                       what soak.py, fuzz_adapters.py and kill_and_resume.py share
"""
