"""Leaves a report on the control host. The module copy takes several programs for that."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ansible.plugins.action import ActionBase


class ActionModule(ActionBase):  # type: ignore[misc] # Ansible has no types.
    """Writes its argument `report` as JSON into `file`."""

    def run(self, tmp: str | None = None, task_vars: dict[str, Any] | None = None) -> Any:
        """Return that nothing has changed: a report is no state of a host. Raises OSError."""
        result = super().run(tmp, task_vars)
        arguments = self._task.args
        Path(arguments["file"]).write_text(json.dumps(arguments["report"]) + "\n")
        return result | {"changed": False}
