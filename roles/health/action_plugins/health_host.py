"""Runs the module health_host between two looks at the control host's clock."""

from __future__ import annotations

import time
from typing import Any

from ansible.plugins.action import ActionBase


class ActionModule(ActionBase):  # type: ignore[misc] # Ansible has no types.
    """The module, with what its times tell of the host's clock."""

    def run(self, tmp: str | None = None, task_vars: dict[str, Any] | None = None) -> Any:
        """Return the module's result, with `clock`."""
        result = super().run(tmp, task_vars)
        asked = time.time()
        result |= self._execute_module(module_name="health_host", task_vars=task_vars)
        answered = time.time()
        if "began" in result:
            # It began after it was asked, and ended before its answer was here.
            result["clock"] = {
                "least": round(result.pop("ended") - answered, 3),
                "most": round(result.pop("began") - asked, 3),
            }
        return result
