"""The command line: ``hf-flash-mc env``."""

from hf_flash_mc.cli.app import app

__all__ = ["app"]
