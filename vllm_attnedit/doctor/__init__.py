"""Checks of an installation, behind ``attnedit doctor``."""

from vllm_attnedit.doctor.ascend import ASCEND_CHECKS
from vllm_attnedit.doctor.checks import CHECKS, DEVICES
from vllm_attnedit.doctor.host import Finding, Host, ProbeError

__all__ = ["ASCEND_CHECKS", "CHECKS", "DEVICES", "Finding", "Host", "ProbeError"]
