"""`python -m finetune`, as launchers of several processes call it."""

from finetune.cli.main import run_process

if __name__ == "__main__":
    run_process()
