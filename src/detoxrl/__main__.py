"""What does `python -m detoxrl` do?"""

from detoxrl.cli import main

if __name__ == "__main__":
    main()
