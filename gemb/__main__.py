"""`python -m gemb`: the same door as the console script."""

from importlib import import_module

if __name__ == "__main__":
    import_module("gemb.commands").main()
