"""The extension in C++ that repeats calls with little host time (host_sources/), where there is one.

It is used for tensors on a CUDA device, where a call only has to launch. Without it, or where it cannot be compiled,
the same is done in Python (call_cache.py, replay.py), which takes two to three times as long.
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
import logging
import os
import threading
from typing import Any

import torch

from tdc_fast.errors import invalid
from tdc_fast.ops import host_build

VARIABLE = "TDC_FAST_HOST"
_SETTINGS = ("auto", "on", "off")
_NAME = "tdc_fast_host"
_log = logging.getLogger("tdc_fast.host")
_lock = threading.Lock()
_loaded: list[Any] = []  # the module, or None where there is none; empty before it was asked for


def extension(device: torch.device) -> Any:
    """The extension, compiled and loaded at the first need, or None.

    Args:
        device: Where the tensors of a call are. TDC_FAST_HOST=on serves every device, "off" none.

    Raises:
        ValueError: TDC_FAST_HOST has another value.
    """
    setting = os.environ.get(VARIABLE) or "auto"
    if setting not in _SETTINGS:
        raise invalid(VARIABLE, setting, "auto, on or off")
    if setting == "off" or (setting == "auto" and device.type != "cuda"):
        return None
    with _lock:
        if not _loaded:
            _loaded.append(_load())
    return _loaded[0]


def _load() -> Any:
    try:
        path = str(host_build.built())
        loader = importlib.machinery.ExtensionFileLoader(_NAME, path)
        spec = importlib.util.spec_from_file_location(_NAME, path, loader=loader)
        assert spec is not None
        module = importlib.util.module_from_spec(spec)
        loader.exec_module(module)
    except (ImportError, OSError, RuntimeError) as error:
        _log.warning("calls are repeated in Python, which takes longer: the extension in C++ is missing: %s", error)
        return None
    return module
