"""The programs `gradnoise` and `python -m gradnoise`: the command line where its packages are installed."""

import sys


def main() -> None:
    """Entry point; where only the library is installed, one line on standard error and status 2."""
    try:
        from gradnoise.cli import main as command_line
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] == "gradnoise":
            raise
        needed = "the command line needs the study's packages: pip install 'gradnoise[study]'"
        print(f"gradnoise: {needed}", file=sys.stderr)
        raise SystemExit(2) from None
    command_line()


if __name__ == "__main__":
    main()
