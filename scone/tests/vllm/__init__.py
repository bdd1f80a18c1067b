"""Tests of scone.vllm."""
