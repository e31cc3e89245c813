"""Paths in the repository."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TRAIN_PROCESS = Path(__file__).with_name("train_process.py")
