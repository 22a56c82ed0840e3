"""The program behind `python -m minsd.generate`: options, prompts files, jobs, runs. The model itself is minsd/pipeline.py."""
