"""`python -m dots_align`: what `accelerate launch -m dots_align` runs on every process."""

from dots_align.cli import main

if __name__ == "__main__":
    main()
