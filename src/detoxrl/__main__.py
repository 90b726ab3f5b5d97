"""What does `python -m detoxrl` run?"""

from detoxrl.cli import main

if __name__ == "__main__":
    main()
