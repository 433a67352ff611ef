"""`python -m t5x_ext` is the `t5x_ext` command."""

from t5x_ext.cli.main import run

if __name__ == "__main__":
    run()
