"""The served model: the teacher's decoder with edited attention, built from vLLM's layers."""
