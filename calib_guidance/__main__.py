"""``python -m calib_guidance`` is the same as ``calib-guidance``."""

from calib_guidance.cli import main

if __name__ == "__main__":
    main()
