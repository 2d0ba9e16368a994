"""Full fine-tuning against LoRA: what an adapter loses, and what it saves.

arms, presets, plan     what is run
process, worker         each arm in a fresh process, one JSON a run
measure, floor, texts   what is measured in it
checks                  the correctness checks that come first
runner, progress        the loop over runs, with resume
results, stats          from JSON files to means and intervals
tables, plots, report   Markdown, PNG, HTML
"""
