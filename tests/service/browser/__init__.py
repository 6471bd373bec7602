"""Tests in a real Chromium, which share it and a running service: one process of several takes them all."""
